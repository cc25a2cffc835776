"""The changes of the time embedding against the model's own modules, called by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dicache.anatomy import survey
from dicache.anatomy.inputs import capture_inputs
from dicache.anatomy.time_embedding import find_time_embedding
from dicache.profiler.recorder import Recorder
from dicache.profiler.time_signal import measure_time
from tests.timed import STEPS, anatomy_of, cogvideox, hidream, wan
from tests.tiny import dit, generate, pipeline_of


def embedded(pipe: Any) -> dict[str, list[Tensor]]:
    """Return what the model makes of the scheduler's timesteps, by signal and step, by calling its modules."""
    model = pipe.transformer
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[:, None]:
            if hasattr(model, "condition_embedder"):
                embedder = model.condition_embedder
                e = embedder.time_embedder(embedder.timesteps_proj(t))
                found.setdefault("time", []).append(e)
                found.setdefault("time_projected", []).append(embedder.time_proj(embedder.act_fn(e)))
            elif hasattr(model, "time_embedding"):
                found.setdefault("time", []).append(model.time_embedding(model.time_proj(t)))
            else:
                found.setdefault("time", []).append(model.t_embedder(t, torch.float32))
    return found


def relative(values: list[Tensor]) -> np.ndarray:
    """Return mean |e_i - e_(i-1)| / mean |e_(i-1)|."""
    pairs = zip(values[1:], values[:-1], strict=True)
    return np.array([float((now - before).abs().mean() / before.abs().mean()) for now, before in pairs])


@pytest.mark.parametrize("build", [wan, cogvideox, hidream])
def test_the_changes_are_those_of_the_models_own_modules(build: Any) -> None:
    pipe, run = build()
    measured = measure_time(pipe, anatomy_of(pipe, run), run)
    by_hand = embedded(pipe)
    assert measured.keys() == by_hand.keys()
    for name, values in by_hand.items():
        assert measured[name] == pytest.approx(relative(values), rel=1e-4)
        assert len(measured[name]) == STEPS - 1


@pytest.mark.parametrize("build", [wan, cogvideox, hidream])
def test_the_blocks_run_in_the_first_step_only(build: Any) -> None:
    pipe, run = build()
    anatomy = anatomy_of(pipe, run)
    calls: list[int] = []
    last = pipe.transformer.get_submodule(anatomy.blocks[-1].module)
    hook = last.register_forward_hook(lambda *_: calls.append(1))
    run()
    each = len(calls) // STEPS
    calls.clear()
    capture_inputs(pipe.transformer, run)  # measure_time looks at one call's arguments first
    before = run()
    calls.clear()
    measure_time(pipe, anatomy, run)
    assert 1 <= len(calls) <= each
    hook.remove()
    assert torch.equal(run(), before)  # and nothing stays behind


def test_a_profile_holds_the_same_in_every_run_and_guidance_pass() -> None:
    pipe, run = wan()
    anatomy, inputs = anatomy_of(pipe, run), capture_inputs(pipe.transformer, run)
    time = find_time_embedding(pipe.transformer, inputs, anatomy)
    rows = []
    with Recorder(pipe, pipe.transformer, anatomy, 1, time=time) as recorder:
        assert recorder.time_signals == ("time", "time_projected")
        for seed in (0, 1):
            run(seed)
            rows += [found.arrays(STEPS) for [found] in recorder._passes.values()]
    assert len(rows) == 4
    for name, want in measure_time(pipe, anatomy, run).items():
        for row in rows:
            pairs = row[f"teacache/{name}"]
            assert np.isnan(pairs[0]).all()
            assert pairs[1:, 0] / pairs[1:, 1] == pytest.approx(want, rel=1e-4)


def test_a_model_that_embeds_its_timestep_inside_the_blocks_has_none() -> None:
    pipe = pipeline_of(dit)
    assert measure_time(pipe, survey(pipe.transformer), lambda: generate(pipe)) == {}
