import numpy as np
import pytest
import torch
from torch import Tensor

from dicache.profiler.guided import GuidedSteps, PassOutput, guidance_weights


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weights", [(7.5, -6.5), (-3.0, 4.0), (1.0, 0.0)])
def test_the_weights_of_guidance_are_found_in_any_order_and_sign(weights: tuple[float, float]) -> None:
    one = noise(4, 8, 8)
    two = one + 1e-3 * noise(4, 8, 8, seed=1)  # the halves are nearly alike at the first steps
    found = guidance_weights([one, two], weights[0] * one + weights[1] * two)
    assert found == pytest.approx(weights, abs=1e-2)


def test_learned_variances_are_left_out() -> None:
    one, two = noise(8, 4, 4), noise(8, 4, 4, seed=1)
    assert guidance_weights([one, two], 2 * one[:4] - two[:4]) == pytest.approx([2, -1])


def test_what_is_no_weighted_sum_is_not_taken_for_one() -> None:
    one, two = noise(4, 8, 8), noise(4, 8, 8, seed=1)
    assert guidance_weights([one, two], one * two) is None
    assert guidance_weights([one, two], noise(4, 4, 4)) is None
    assert guidance_weights([one, one * torch.nan], one) is None


def test_products_are_those_of_the_guided_sums() -> None:
    steps = GuidedSteps(("attn", "mlp", "attn"), 3)
    residuals, outputs = [], []
    for step in range(3):
        output, residual, sketch = noise(2, 4, 4, 4, seed=step), noise(2, 60, seed=10 + step), noise(3, 2, 7, seed=step)
        guided = 3 * output[0] - 2 * output[1]
        steps.add(step, {"0": PassOutput(output, [residual[:, :20], residual[:, 20:]], sketch)}, guided)
        residuals.append(3 * residual[0] - 2 * residual[1])
        outputs.append(guided.flatten())
    arrays = steps.arrays([("0", 0), ("0", 1)])
    for name, rows in (("body/gram", residuals), ("body/output", outputs)):
        assert arrays[name] == pytest.approx((torch.stack(rows) @ torch.stack(rows).T).numpy(), rel=1e-4)
    assert arrays["body/weights"] == pytest.approx(np.array([[3.0, -2.0]] * 3), abs=1e-4)
    sketched = torch.stack([3 * s[:, 0] - 2 * s[:, 1] for s in (noise(3, 2, 7, seed=i) for i in range(3))])  # (3, 3, 7)
    attn = sketched[:, [0, 2]].flatten(1)
    assert arrays["body/branches"][0] == pytest.approx((attn @ attn.T).numpy(), rel=1e-4, abs=1e-3)


def test_passes_of_their_own_calls_are_put_together() -> None:
    steps = GuidedSteps(("attn",), 1)
    cond, uncond = noise(1, 4, 4, 4), noise(1, 4, 4, 4, seed=1)
    passes = {
        name: PassOutput(out, [out.reshape(1, -1)], noise(1, 1, 5))
        for name, out in (("cond", cond), ("uncond", uncond))
    }
    steps.add(0, passes, (5 * cond - 4 * uncond)[0])
    arrays = steps.arrays([("cond", 0), ("uncond", 0)])
    assert arrays["body/weights"][0] == pytest.approx([5, -4], abs=1e-4)
    assert arrays["body/gram"][0, 0] == pytest.approx(arrays["body/output"][0, 0], rel=1e-4)


def test_a_step_whose_guidance_is_unknown_is_a_gap() -> None:
    steps = GuidedSteps(("attn",), 2)
    out = noise(2, 4, 4, 4)
    given = {"0": PassOutput(out, [out.flatten(1)], noise(1, 2, 5))}
    steps.add(0, given, out[0] * out[1])
    steps.add(1, given, out[0])
    arrays = steps.arrays([("0", 0), ("0", 1)])
    assert np.isnan(arrays["body/gram"][0]).all()
    assert np.isfinite(arrays["body/gram"][1, 1])
    assert np.isfinite(arrays["body/output"]).all()  # what the scheduler is given is known in any case
