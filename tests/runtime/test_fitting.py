"""Law 7: every stated field is compared, all differences are told at once, and the default is to refuse."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from torch import nn

from dicache import Schedule, ScheduleError, apply
from dicache.anatomy.clock import noise_levels, timesteps
from dicache.anatomy.fingerprint import fingerprint
from dicache.schedules import Rule
from tests.counting import broken
from tests.tiny import (
    STEPS,
    Build,
    anatomy_of,
    arguments,
    dit,
    every_transformer,
    generate,
    pipeline_of,
    pixart,
    predict,
    randomised,
    replay,
    sample,
    scheduled,
)


def stated(pipe: Any, steps: int = STEPS, **wrong: Any) -> dict[str, Any]:
    """Return all that a schedule can state, true for a pipeline but for what is given."""
    generate(pipe, steps=steps)  # pipelines choose timesteps of their own
    return {
        "weights": fingerprint(pipe.transformer),
        "dtype": "float32",
        "latents": tuple(arguments(pipe.transformer)["hidden_states"].shape[1:]),
        "scheduler": type(pipe.scheduler).__name__,
        "num_inference_steps": steps,
        "timesteps": timesteps(pipe.scheduler),
        "noise_levels": noise_levels(pipe.scheduler),
        **wrong,
    }


def reusing(build: Build, **made_for: Any) -> Schedule:
    return scheduled(build, Rule("reuse", "C.C."), **made_for)


WRONG_MODEL: list[tuple[str, Any, str]] = [
    ("weights", "0123456789abcdef", "weights 0123456789abcdef, found "),
    ("dtype", "bfloat16", "dtype bfloat16, found float32"),
    ("scheduler", "PNDMScheduler", "scheduler PNDMScheduler, found "),
]
WRONG_STEPS: list[tuple[str, Any, str]] = [
    ("num_inference_steps", 5, "num inference steps 5, found 4"),
    ("timesteps", (800.0, 500.0, 250.0, 0.0), "timestep 800 at step 0, found "),
    ("noise_levels", (9.0, 1.0, 0.0, -2.0), "noise level 9 at step 0, found "),
]


@every_transformer
def test_a_schedule_that_states_everything_truly_is_replayed(build: Build) -> None:
    pipe = pipeline_of(build)
    with apply(pipe, reusing(build, **stated(pipe))) as cache:
        generate(pipe)
        assert list(cache.stats.steps.values()) == ["C.C."]


@every_transformer
@pytest.mark.parametrize(("name", "value", "message"), WRONG_MODEL)
def test_what_differs_in_the_model_is_refused_at_once_unless_allowed(
    build: Build, name: str, value: Any, message: str
) -> None:
    pipe = pipeline_of(build)
    schedule = reusing(build, **stated(pipe, **{name: value}))
    with pytest.raises(ScheduleError, match=message) as refused:
        apply(pipe, schedule)
    assert "Calibrate for this model, or name what may differ in apply(..., allow=...)" in str(refused.value)
    assert ";" not in str(refused.value)  # and nothing else differs
    with apply(pipe, schedule, allow={name}) as cache:
        generate(pipe)
        assert cache.stats.reused_sites > 0


@every_transformer
@pytest.mark.parametrize(("name", "value", "message"), WRONG_STEPS)
def test_what_differs_in_the_steps_is_refused_when_the_generation_begins_unless_allowed(
    build: Build, name: str, value: Any, message: str
) -> None:
    pipe = pipeline_of(build)
    schedule = reusing(build, **stated(pipe, **{name: value}))
    with apply(pipe, schedule) as cache, pytest.raises(ScheduleError, match=message) as refused:
        generate(pipe)
    assert cache.stats.calls == 0
    assert "or pass fit='resample'" in str(refused.value)
    with apply(pipe, schedule, allow={name}) as cache:
        generate(pipe)
        assert cache.stats.reused_sites > 0


@every_transformer
def test_latents_of_another_size_are_refused_unless_allowed(build: Build) -> None:
    pipe = pipeline_of(build)
    schedule = reusing(build, **stated(pipe, latents=(4, 16, 16)))
    found = re.escape(str(anatomy_of(build).latents))
    message = rf"made for latents of shape \(4, 16, 16\), but the model is called with {found}"
    with apply(pipe, schedule), pytest.raises(ScheduleError, match=message):
        generate(pipe)
    with apply(pipe, schedule, allow={"latents"}) as cache:
        generate(pipe)
        assert cache.stats.reused_sites > 0


@every_transformer
def test_latents_are_found_wherever_they_stand_among_the_keywords(build: Build) -> None:
    model = build()
    given = arguments(model)
    reversed_order = dict(reversed(given.items()))
    want = predict(model, given)
    with apply(model, reusing(build, latents=anatomy_of(build).latents)) as cache:
        assert torch.equal(replay(model, cache, [reversed_order])[0], want)


@every_transformer
def test_all_that_differs_in_the_model_is_told_in_one_message(build: Build) -> None:
    pipe = pipeline_of(build)
    schedule = reusing(build, **stated(pipe, **{name: value for name, value, _ in WRONG_MODEL}))
    with pytest.raises(ScheduleError) as refused:
        apply(pipe, schedule)
    for _, _, message in WRONG_MODEL:
        assert message in str(refused.value)
    apply(pipe, schedule, allow=[name for name, _, _ in WRONG_MODEL]).detach()


@every_transformer
def test_all_that_differs_in_the_steps_is_told_in_one_message(build: Build) -> None:
    pipe = pipeline_of(build)
    schedule = reusing(build, **stated(pipe, **{name: value for name, value, _ in WRONG_STEPS}))
    with apply(pipe, schedule), pytest.raises(ScheduleError) as refused:
        generate(pipe)
    for _, _, message in WRONG_STEPS:
        assert message in str(refused.value)


def test_another_class_of_model_is_refused_along_with_all_else_that_differs() -> None:
    schedule = reusing(dit, dtype="float16", scheduler="DDIMScheduler")
    with pytest.raises(ScheduleError) as refused:
        apply(pipeline_of(pixart), schedule)
    for message in (
        "a DiTTransformer2DModel, found PixArtTransformer2DModel",
        "dtype float16, found float32",
        "scheduler DDIMScheduler, found DPMSolverMultistepScheduler",
    ):
        assert message in str(refused.value)


def test_a_model_with_fewer_blocks_or_without_a_named_module_is_refused_even_if_it_is_allowed_to_differ() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = nn.ModuleList(list(dit().transformer_blocks)[:3])  # type: ignore[arg-type]

    with pytest.raises(ScheduleError, match="4 blocks in transformer_blocks, found 3"):
        apply(Other().eval(), reusing(dit), allow={"model"})
    bare = dit()
    del bare.transformer_blocks[2].ff  # type: ignore[union-attr,index]
    with pytest.raises(ScheduleError, match=r"a model with transformer_blocks\.2\.ff, found none"):
        apply(bare, reusing(dit))


@every_transformer
def test_other_weights_are_found_out(build: Build) -> None:
    pipe = pipeline_of(build)
    schedule = reusing(build, **stated(pipe))
    randomised(pipe.transformer, seed=1)
    with pytest.raises(ScheduleError, match="weights"):
        apply(pipe, schedule)


@every_transformer
def test_a_step_count_that_nothing_binds_is_refused_all_the_same(build: Build) -> None:
    pipe = pipeline_of(build)
    for allow in ((), ("num_inference_steps", "timesteps", "noise_levels")):
        with apply(pipe, reusing(build), allow=allow), pytest.raises(ScheduleError, match="4 steps, found 7"):
            generate(pipe, steps=7)


@every_transformer
def test_a_generation_that_was_refused_leaves_nothing_behind(build: Build) -> None:
    pipe, other = pipeline_of(build), pipeline_of(build)
    with apply(pipe, reusing(build, **stated(pipe))), apply(other, reusing(build)):
        with pytest.raises(ScheduleError, match="4 steps, found 7"):
            generate(pipe, steps=7)
        assert torch.equal(generate(pipe), generate(other))


@every_transformer
def test_a_refused_generation_does_not_go_on_with_the_one_before_it(build: Build) -> None:
    pipe = pipeline_of(build)
    given = arguments(pipe.transformer)
    want = predict(pipe.transformer, given)
    with apply(pipe, scheduled(build, Rule("reuse", "C..."))):
        with broken(pipe.transformer, call=2):
            generate(pipe)
        with pytest.raises(ScheduleError, match="4 steps, found 7"):
            generate(pipe, steps=7)
        assert torch.equal(predict(pipe.transformer, given), want)


@every_transformer
def test_a_schedule_is_resampled_to_another_step_count_when_that_is_asked_for(build: Build) -> None:
    pipe, other = pipeline_of(build), pipeline_of(build)
    schedule = reusing(build, **stated(pipe))
    levels = stated(pipe, steps=7)["noise_levels"]
    with apply(pipe, schedule, fit="resample") as cache, apply(other, schedule.resampled(levels, 7)):
        assert torch.equal(generate(pipe, steps=7), generate(other, steps=7))
        assert all(letters.startswith("C") for letters in cache.stats.steps.values())
        assert cache.stats.reused_sites > 0


@every_transformer
def test_a_resampled_generation_leaves_no_trace_in_those_after_it(build: Build) -> None:
    pipe, other = pipeline_of(build), pipeline_of(build)
    schedule = reusing(build, **stated(pipe))
    with apply(pipe, schedule, fit="resample") as cache, apply(other, schedule):
        generate(pipe, steps=2)
        assert torch.equal(generate(pipe), generate(other))
        assert list(cache.stats.steps.values()) == ["C.C."]


@every_transformer
def test_a_schedule_is_resampled_to_another_sampler(build: Build) -> None:
    pipe = pipeline_of(build)
    schedule = reusing(build, **stated(pipe))
    pipe.scheduler = EulerDiscreteScheduler() if build in (dit, pixart) else FlowMatchLCMScheduler()
    with pytest.raises(ScheduleError, match=f"found {type(pipe.scheduler).__name__}"):
        apply(pipe, schedule)
    with apply(pipe, schedule, fit="resample") as cache:
        generate(pipe, steps=6)
        assert [len(letters) for letters in cache.stats.steps.values()] == [6]


@every_transformer
def test_a_schedule_without_noise_levels_cannot_be_resampled(build: Build) -> None:
    pipe = pipeline_of(build)
    with (
        apply(pipe, reusing(build), fit="resample"),
        pytest.raises(ScheduleError, match="does not say its noise levels"),
    ):
        generate(pipe, steps=7)


@every_transformer
def test_a_file_is_applied_like_the_schedule_in_it(build: Build, tmp_path: Path) -> None:
    pipe = pipeline_of(build)
    schedule = reusing(build, **stated(pipe))
    schedule.save(tmp_path / "s.json")
    with apply(pipe, tmp_path / "s.json") as cache:
        assert cache.schedule == schedule
        generate(pipe)
        assert list(cache.stats.steps.values()) == ["C.C."]
    with pytest.raises(ScheduleError, match="does not exist"):
        apply(pipe, str(tmp_path / "none.json"))


@every_transformer
def test_a_schedule_that_states_less_binds_less(build: Build) -> None:
    pipe = pipeline_of(build)
    if build in (dit, pixart):
        pipe.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    else:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    randomised(pipe.transformer, seed=1)
    with apply(pipe, reusing(build, dtype="float32")) as cache:
        generate(pipe)
        assert list(cache.stats.steps.values()) == ["C.C."]


@every_transformer
def test_a_bare_model_is_compared_as_far_as_it_goes(build: Build) -> None:
    pipe = pipeline_of(build)
    with pytest.raises(ScheduleError, match="dtype bfloat16, found float32"):
        apply(pipe.transformer, reusing(build, **stated(pipe, dtype="bfloat16")))
    with apply(pipe.transformer, reusing(build, **stated(pipe))) as cache:
        sample(pipe.transformer, cache)
        with pytest.raises(ScheduleError, match="has 4 steps, the generation has 5"):
            cache.begin_generation(steps=5)
        cache.begin_generation(steps=4)
