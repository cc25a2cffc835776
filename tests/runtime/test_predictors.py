"""What stands in for an output that is not computed: Taylor expansions and feature maps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dicache import Cache, Schedule, apply
from dicache.schedules import Plan, Rule, Target
from dicache.schedules.plan import Weights
from tests.runtime.interleaving import out_of_phase
from tests.runtime.test_oracle import expansion
from tests.tiny import Build, arguments, denoise, every_model, predict, sample, scheduled
from tests.toys import written

LENGTH = 9


class Curve(nn.Module):
    """A branch whose output is a polynomial in the step, of another one for every element."""

    def __init__(self, degree: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(degree + 1, 1, 2, 3, generator=generator, dtype=torch.float64)
        self.weights = nn.Parameter(weights)  # (powers, 1, tokens, channels)

    def forward(self, step: Tensor) -> Tensor:
        powers = step ** torch.arange(len(self.weights), dtype=torch.float64)
        return (powers[:, None, None, None] * self.weights).sum(0)


class CurvedBlock(nn.Module):
    def __init__(self, degree: int, seed: int) -> None:
        super().__init__()
        self.attn1, self.ff = Curve(degree, seed), Curve(degree, seed + 1)

    def forward(self, hidden_states: Tensor, step: Tensor) -> Tensor:
        out: Tensor = hidden_states + self.attn1(step) + self.ff(step)
        return out


class Toy(nn.Module):
    """Two blocks that add to the latents what depends on nothing but the step."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CurvedBlock(degree, seed) for seed in (0, 10))
        self.eval()

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep)
        return hidden_states


def outputs(model: Toy, *steps: int, cache: Cache | None = None) -> list[Tensor]:
    """Return what a toy gives at some steps."""
    found = []
    if cache is not None:
        cache.begin_generation()
    for step in range(max(steps) + 1):
        if cache is not None:
            cache.begin_step()
        if step in steps:
            with torch.no_grad():
                found.append(model(torch.zeros(1, 2, 3, dtype=torch.float64), torch.tensor(float(step))))
    return found


def toy_schedule(letters: str, order: int, action: Any) -> Schedule:
    plan = Plan(len(letters), (Rule(action, letters, predictor="taylor", order=order),))
    return Schedule("test", {}, written(2), Target(), len(letters), plan)


@every_model
@pytest.mark.parametrize("action", ["reuse", "skip"])
def test_an_expansion_of_order_zero_holds_bit_for_bit(build: Build, action: Any) -> None:
    held, expanded = (
        Rule(action, "CC..C.C..", predictor="hold"),
        Rule(action, "CC..C.C..", predictor="taylor", order=0),
    )
    outputs = []
    for rule in (held, expanded):
        model = build()
        with apply(model, scheduled(build, rule)) as cache:
            outputs.append(sample(model, cache, steps=LENGTH))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("action", ["reuse", "skip"])
@pytest.mark.parametrize("letters", ["CC.......", "C.C..C...", "CCC.C.CC."])
def test_an_expansion_of_order_one_is_exact_on_lines(letters: str, action: Any) -> None:
    model = Toy(degree=1)
    want = outputs(model, *range(LENGTH))
    with apply(model, toy_schedule(letters, 1, action)) as cache:
        got = outputs(model, *range(LENGTH), cache=cache)
    # With one output there is no line yet, and it is held.
    lines = [step for step in range(LENGTH) if letters[:step].count("C") > 1]
    for step in lines:
        assert torch.allclose(got[step], want[step], atol=1e-10)


@pytest.mark.parametrize("action", ["reuse", "skip"])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("letters", ["CC.......", "CC..C..C.", "CCCCC.C.."])
def test_an_expansion_is_what_the_published_table_of_differences_gives(letters: str, order: int, action: Any) -> None:
    model = Toy(degree=4)
    plain = outputs(model, *range(LENGTH))
    computed: list[tuple[int, Tensor]] = []
    with apply(model, toy_schedule(letters, order, action)) as cache:
        for step, got in enumerate(outputs(model, *range(LENGTH), cache=cache)):
            if letters[step] == "C":
                computed.append((step, plain[step]))
            assert torch.allclose(got, expansion(computed, order, step), rtol=1e-10)


def test_the_published_expansion_is_off_on_squares_by_interval_times_distance() -> None:
    # It takes backward differences for derivatives: of k^2 with interval h, 2k - h for 2k.
    model = Toy(degree=2)
    (want,) = outputs(model, 8)
    with apply(model, toy_schedule("C..C..C..", 2, "skip")) as cache:
        error = want - outputs(model, *range(LENGTH), cache=cache)[8]
    squares = torch.stack([module.weights[2] for module in model.modules() if isinstance(module, Curve)]).sum(0)
    assert torch.allclose(error, squares * 3 * 2, atol=1e-9)


@pytest.mark.parametrize("action", ["reuse", "skip"])
def test_a_forecast_is_the_weighted_sum_of_the_outputs_that_it_names(action: Any) -> None:
    weights: dict[int, Weights] = {1: ((0, 0.5),), 4: ((3, 1.5), (2, -0.25), (0, 0.125)), 5: ((3, 1.0), (2, -2.0))}
    plan = Plan(6, (Rule(action, "C.CC..", predictor="forecast", weights=weights),))
    model = Toy(degree=3)
    plain = outputs(model, *range(6))
    with apply(model, Schedule("test", {}, written(2), Target(), 6, plan)) as cache:
        got = outputs(model, *range(6), cache=cache)
    for step, sources in weights.items():
        # The latents are zero, so that what the blocks add is the model's output.
        want = torch.stack([weight * plain[source] for source, weight in sources]).sum(0)
        assert torch.allclose(got[step], want, rtol=1e-10)


@every_model
@pytest.mark.parametrize("action", ["reuse", "skip"])
def test_a_forecast_with_the_weights_of_an_expansion_is_that_bit_for_bit(build: Build, action: Any) -> None:
    weights: dict[int, Weights] = {2: ((1, 2.0), (0, -1.0)), 4: ((3, 1.5), (1, -0.5)), 5: ((3, 2.0), (1, -1.0))}
    pair = (
        Rule(action, "CC.C..CCC", predictor="taylor", order=1),
        Rule(action, "CC.C..CCC", predictor="forecast", weights=weights),
    )
    made = []
    for rule in pair:
        model = build()
        with apply(model, scheduled(build, rule)) as cache:
            made.append(sample(model, cache, steps=LENGTH))
    assert torch.equal(*made)


@every_model
@pytest.mark.parametrize(
    "rule",
    [
        Rule("reuse", "CCC.C..C.", predictor="taylor", order=2),
        Rule("skip", "C..C.C...", predictor="feature"),
        Rule("skip", "C.CCCCCC.", predictor="forecast", weights={1: ((0, 0.9),), 8: ((7, 1.4), (6, -0.3))}),
    ],
    ids=["taylor", "feature", "forecast"],
)
class TestEveryGeneration:
    """A generation is what it is on a model of its own."""

    def test_starts_with_nothing_kept(self, build: Build, rule: Rule) -> None:
        model = build()
        with apply(model, scheduled(build, rule)) as cache:
            want = sample(model, cache, steps=LENGTH)
            turns = denoise(model, cache, steps=LENGTH, seed=7)
            for _ in range(5):  # and is broken off
                next(turns)
            turns.close()
            assert torch.equal(sample(model, cache, steps=LENGTH), want)

    def test_takes_turns_with_another_one(self, build: Build, rule: Rule) -> None:
        want = []
        for seed in range(2):
            model = build()
            with apply(model, scheduled(build, rule)) as cache:
                want.append(sample(model, cache, steps=LENGTH, seed=seed))
        model = build()
        with apply(model, scheduled(build, rule)) as cache:

            def turns(seed: int) -> Any:
                with cache.request():
                    yield from denoise(model, cache, steps=LENGTH, seed=seed)

            got = out_of_phase(turns(0), turns(1), LENGTH)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])

    def test_keeps_its_guidance_passes_apart(self, build: Build, rule: Rule) -> None:
        def alone(seed: int) -> list[Tensor]:
            model = build()
            with apply(model, scheduled(build, rule)) as cache:
                cache.begin_generation()
                return [self._step(model, cache, step, seed)[0] for step in range(LENGTH)]

        want = alone(1), alone(2)
        model = build()
        with apply(model, scheduled(build, rule)) as cache:
            cache.begin_generation()
            got = [self._step(model, cache, step, 1, 2) for step in range(LENGTH)]
        assert all(torch.equal(both[k], want[k][step]) for step, both in enumerate(got) for k in range(2))

    def _step(self, model: nn.Module, cache: Cache, step: int, *seeds: int) -> list[Tensor]:
        cache.begin_step()
        return [predict(model, arguments(model, seed=seed, timestep=900 - 90 * step)) for seed in seeds]


def test_a_pass_that_missed_a_step_starts_its_expansion_anew() -> None:
    model = Toy(degree=3)
    plain = outputs(model, *range(LENGTH))
    with apply(model, toy_schedule("CCC.C.C..", 3, "reuse")) as cache:
        got = outputs(model, 0, 1, 2, 3, 5, 6, 7, 8, cache=cache)  # not 4, so that 5 is computed
    assert torch.equal(got[4], plain[5])
    for step, found in zip((7, 8), got[6:], strict=True):
        assert torch.allclose(found, expansion([(5, plain[5]), (6, plain[6])], 3, step))


@every_model
def test_a_feature_map_that_is_held_makes_the_blocks_forget_what_enters_them(build: Build) -> None:
    model = build()
    last = len(scheduled(build).anatomy.blocks) - 1
    with apply(model, scheduled(build, Rule("skip", "C.", f"0-{last}", predictor="feature"))) as cache:
        cache.begin_generation()
        cache.begin_step()
        one = predict(model, arguments(model, seed=1))
        cache.begin_step()
        assert torch.equal(predict(model, arguments(model, seed=2) | same_conditions(model)), one)


def same_conditions(model: nn.Module) -> dict[str, Any]:
    """Return what is given to a model besides its latents."""
    return {name: value for name, value in arguments(model, seed=1).items() if name != "hidden_states"}


def test_in_half_precision_an_expansion_is_as_close_as_its_last_bit() -> None:
    model = Toy(degree=1)
    want = outputs(model, *range(4))
    model.to(torch.bfloat16)
    with apply(model, toy_schedule("CC..", 1, "reuse")) as cache:
        got = outputs(model, *range(4), cache=cache)
    for step in (2, 3):
        assert torch.allclose(got[step].double(), want[step], rtol=0.03, atol=0.05)
