"""Law 7: every stated field is compared, all differences are told at once, and the default is to refuse."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from torch import nn

from dicache import CacheError, CacheWarning, Schedule, ScheduleError, apply
from dicache.anatomy.clock import noise_levels, timesteps
from dicache.anatomy.fingerprint import fingerprint
from dicache.schedules import Rule
from tests.counting import broken
from tests.tiny import (
    STEPS,
    Build,
    anatomy_of,
    arguments,
    both_models,
    dit,
    every_transformer,
    flux,
    generate,
    pipeline_of,
    pixart,
    predict,
    randomised,
    replay,
    sample,
    scheduled,
)

# By default. Two of these keep it to their own call, and Flux has a second one, for models without an input for it.
GUIDANCE = {"DiTPipeline": 4.0, "PixArtAlphaPipeline": 4.5, "StableDiffusion3Pipeline": 7.0, "FluxPipeline": 3.5}


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
        "guidance": GUIDANCE[type(pipe).__name__],
        **wrong,
    }


def reusing(build: Build, **made_for: Any) -> Schedule:
    return scheduled(build, Rule("reuse", "C.C."), **made_for)


WRONG_MODEL: list[tuple[str, Any, str]] = [
    ("weights", "0123456789abcdef", "weights 0123456789abcdef, found "),
    ("scheduler", "PNDMScheduler", "scheduler PNDMScheduler, found "),
]
WRONG_STEPS: list[tuple[str, Any, str]] = [
    ("num_inference_steps", 5, "num inference steps 5, found 4"),
    ("timesteps", (800.0, 500.0, 250.0, 0.0), "timestep 800 at step 0, found "),
    ("noise_levels", (9.0, 1.0, 0.0, -2.0), "noise level 9 at step 0, found "),
]


WARNED_OF: list[tuple[str, Any, str]] = [
    ("dtype", "bfloat16", "dtype bfloat16, found float32: a half precision keeps three or four digits"),
    ("latents", (4, 16, 16), "latents (4, 16, 16), found {latents}: its limits, its errors and its speed-up were"),
    ("guidance", 1.5, "guidance 1.5, found {guidance}: guidance multiplies the difference of its passes"),
]


@every_transformer
def test_a_schedule_that_states_everything_truly_is_replayed_without_a_word(build: Build) -> None:
    pipe = pipeline_of(build)
    with apply(pipe, reusing(build, **stated(pipe))) as cache, warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
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
    assert "Calibrate for this model, or name what may differ in apply(..., allow=...), of model, weights" in str(
        refused.value
    )
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
@pytest.mark.parametrize(("name", "value", "message"), WARNED_OF)
def test_another_precision_size_or_guidance_is_warned_of_once_and_replayed(
    build: Build, name: str, value: Any, message: str
) -> None:
    pipe = pipeline_of(build)
    schedule = reusing(build, **stated(pipe, **{name: value}))
    found = message.format(latents=anatomy_of(build).latents, guidance=f"{GUIDANCE[type(pipe).__name__]:g}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CacheWarning)
        with apply(pipe, schedule) as cache:
            generate(pipe)
            generate(pipe)
            assert cache.stats.reused_sites > 0
    assert [type(each.message) for each in caught] == [CacheWarning]
    assert f"this test schedule was made for {found}" in str(caught[0].message)
    assert f"allow=({name!r},) in apply() says that it is meant" in str(caught[0].message)
    with apply(pipe, schedule, allow={name}) as cache, warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        generate(pipe)
        assert cache.stats.reused_sites > 0


@every_transformer
def test_guidance_is_what_the_running_call_was_given(build: Build) -> None:
    pipe = pipeline_of(build)
    with apply(pipe, reusing(build, guidance=3.0)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", CacheWarning)
            generate(pipe, guidance_scale=3.0)
        for scale in (1.0, 2.0):
            with pytest.warns(CacheWarning, match=f"guidance 3, found {scale:g}:"):
                generate(pipe, guidance_scale=scale)


def test_the_guidance_of_a_flux_without_an_input_for_it_is_that_of_its_second_pass() -> None:
    def undistilled() -> nn.Module:
        return flux(guidance_embeds=False)

    pipe = pipeline_of(undistilled)
    with (
        apply(pipe, scheduled(flux, Rule("reuse", "C.C."), guidance=2.0)),
        pytest.warns(CacheWarning, match="guidance 2, found 1.5:"),
    ):
        generate(pipe, true_cfg_scale=1.5)


def test_a_bare_models_guidance_cannot_be_seen_and_is_not_compared() -> None:
    model = dit()
    with apply(model, reusing(dit, guidance=3.0)) as cache, warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        sample(model, cache)
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
    schedule = reusing(dit, weights="0123456789abcdef", scheduler="DDIMScheduler")
    with pytest.raises(ScheduleError) as refused:
        apply(pipeline_of(pixart), schedule)
    for message in (
        "a DiTTransformer2DModel, found PixArtTransformer2DModel",
        "4 blocks in transformer_blocks, found 3",
        "weights 0123456789abcdef, found ",
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
    del bare.transformer_blocks[1].attn1  # type: ignore[union-attr,index]
    with pytest.raises(ScheduleError, match=r"transformer_blocks\.1\.attn1 and 1 more modules, found none"):
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
    with pytest.raises(ScheduleError, match="weights 0123456789abcdef, found "):
        apply(pipe.transformer, reusing(build, **stated(pipe, weights="0123456789abcdef")))
    with pytest.warns(CacheWarning, match="dtype bfloat16, found float32"):
        apply(pipe.transformer, reusing(build, **stated(pipe, dtype="bfloat16"))).detach()
    with apply(pipe.transformer, reusing(build, **stated(pipe))) as cache:
        sample(pipe.transformer, cache)
        with pytest.raises(ScheduleError, match="made for 4 steps, found 5"):
            cache.begin_generation(steps=5)
        cache.begin_generation(steps=4)


@every_transformer
def test_a_model_that_was_changed_since_is_compared_again_along_with_the_steps(build: Build) -> None:
    pipe = pipeline_of(build)
    with apply(pipe, reusing(build, **stated(pipe))) as cache:
        generate(pipe)
        randomised(pipe.transformer, seed=1)
        with pytest.raises(ScheduleError, match=r"made for weights \w+, found \w+; 4 steps, found 7\.") as refused:
            generate(pipe, steps=7)
        assert "The model was changed since the schedule was applied" in str(refused.value)
        assert "or pass fit='resample'" in str(refused.value)
        calls = cache.stats.calls
        del pipe.transformer.transformer_blocks[2].ff
        with pytest.raises(ScheduleError, match=r"a model with transformer_blocks\.2\.ff, found none; weights"):
            generate(pipe)
        assert cache.stats.calls == calls


@both_models
def test_a_model_that_was_put_in_training_since_is_refused(build: Build) -> None:
    pipe = pipeline_of(build)
    with apply(pipe, reusing(build)):
        pipe.transformer.train()
        with pytest.raises(CacheError, match=r"training mode; call its eval\(\) first"):
            generate(pipe)
