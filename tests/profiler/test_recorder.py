from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dicache.anatomy import survey
from dicache.anatomy.overrides import Overrides
from dicache.profiler.recorder import Recorder
from dicache.runtime.apply import denoiser
from tests.tiny import both_models, generate, pipeline_of

STEPS = 4
LAGS = 2


def measured(build: Any) -> tuple[Recorder, dict[str, np.ndarray], dict[str, list[Tensor]]]:
    """Return the recorder's arrays of one generation, and what the model's modules really gave at each step."""
    pipeline = pipeline_of(build)
    model = denoiser(pipeline)
    anatomy = survey(model)
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else next(iter(kwargs.values()))
            seen.setdefault(f"{name} in", []).append(first.clone())
            out = forward(*args, **kwargs)
            seen.setdefault(name, []).append((out if isinstance(out, Tensor) else out[0]).clone())
            return out

        return run

    with Overrides() as overrides:
        names = {"model": model, "first": model.get_submodule("transformer_blocks.0")}
        names |= {"last": model.get_submodule(anatomy.blocks[-1].module)}
        names |= {"1.attn": model.get_submodule("transformer_blocks.1.attn1")}
        names |= {"1": model.get_submodule("transformer_blocks.1")}
        names |= {"0.attn": model.get_submodule("transformer_blocks.0.attn1")}
        for name, module in names.items():
            overrides.set(module, watch(name, module.forward))
        with Recorder(pipeline, model, anatomy, LAGS) as recorder:
            generate(pipeline, steps=STEPS)
            return recorder, recorder.arrays(recorder.contexts), seen


@both_models
def test_site_statistics_are_those_of_the_outputs(build: Any) -> None:
    recorder, arrays, seen = measured(build)
    assert recorder.contexts == ("0",)
    place = recorder._anatomy.sites.index("1.attn")
    out = [x.double() for x in seen["1.attn"]]
    for step in range(STEPS):
        assert arrays["sites/abs_l1"][0, step, place, 0] == pytest.approx(out[step].abs().mean().item(), rel=1e-6)
        assert arrays["sites/norm2"][0, step, place, 0] == pytest.approx(out[step].square().sum().item(), rel=1e-6)
        for lag in range(1, LAGS + 1):
            diff, dot = (arrays[f"sites/{name}"][0, step, place, lag - 1] for name in ("diff_l1", "dot"))
            if step < lag:
                assert np.isnan(diff)
                assert np.isnan(dot)
                continue
            assert diff == pytest.approx((out[step] - out[step - lag]).abs().mean().item(), rel=1e-6)
            assert dot == pytest.approx((out[step] * out[step - lag]).sum().item(), rel=1e-6)


@both_models
def test_the_delta_cosine_is_that_of_output_minus_input(build: Any) -> None:
    _, arrays, seen = measured(build)
    delta = [(a - b).double().flatten() for a, b in zip(seen["1"], seen["1 in"], strict=True)]
    cosine = arrays["delta/cosine"][0, :, 1]
    assert np.isnan(cosine[0])
    for step in range(1, STEPS):
        want = torch.cosine_similarity(delta[step], delta[step - 1], dim=0).item()
        assert cosine[step] == pytest.approx(want, rel=1e-5)


@both_models
def test_teacache_pairs_are_those_of_the_four_signals(build: Any) -> None:
    _, arrays, seen = measured(build)
    residual = [a - b for a, b in zip(seen["last"], seen["first in"], strict=True)]
    signals = {"input": seen["0.attn in"], "residual": residual, "body": seen["last"], "output": seen["model"]}
    for name, values in signals.items():
        assert np.isnan(arrays[f"teacache/{name}"][0, 0]).all()
        for step in range(1, STEPS):
            change = (values[step] - values[step - 1]).abs().mean().item()
            size = values[step - 1].abs().mean().item()
            assert arrays[f"teacache/{name}"][0, step] == pytest.approx([change, size], rel=1e-5), name


@both_models
def test_recording_changes_nothing_and_leaves_nothing(build: Any) -> None:
    pipeline = pipeline_of(build)
    model = denoiser(pipeline)
    want = generate(pipeline, steps=STEPS)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with Recorder(pipeline, model, survey(model), LAGS):
        assert torch.equal(generate(pipeline, steps=STEPS), want)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert "step" not in vars(pipeline.scheduler)


@both_models
def test_a_nan_is_found_with_its_step_and_site(build: Any, tmp_path: Path) -> None:
    pipeline = pipeline_of(build)
    model = denoiser(pipeline)
    anatomy = survey(model)
    calls = []
    mlp = model.get_submodule("transformer_blocks.1.ff")

    def spoil(hidden_states: Tensor, *args: Any) -> Tensor:
        calls.append(1)
        out: Tensor = type(mlp).forward(mlp, hidden_states)
        return out * torch.nan if len(calls) == 3 else out

    vars(mlp)["forward"] = spoil
    with Recorder(pipeline, model, anatomy, LAGS) as recorder:
        generate(pipeline, steps=STEPS)
        assert recorder.failure() == "step 2 in 1.mlp"
