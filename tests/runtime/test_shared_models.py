"""Two pipelines with one model: one has a schedule, the other is neither cached by it nor disturbs it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dicache import apply
from dicache.runtime.apply import denoiser
from tests.runtime.test_hazards import (
    aborted_picture,
    every_method,
    fresh_picture,
    picture,
    schedule_of,
    some_models,
)
from tests.tiny import Build, arguments, flux, generate, pipeline_of, predict, sd3, unet


def beside(pipe: Any, build: Build) -> Any:
    """Return another pipeline with the same model and a scheduler of its own."""
    other = pipeline_of(build)
    other.register_modules(**{"unet" if hasattr(pipe, "unet") else "transformer": denoiser(pipe)})
    return other


@some_models
@every_method
@pytest.mark.parametrize("before", [picture, aborted_picture])
def test_another_pipeline_with_the_same_model_is_not_cached(
    build: Build, method: str, before: Callable[..., None]
) -> None:
    pipe, plain = pipeline_of(build), generate(pipeline_of(build), seed=3)
    other = beside(pipe, build)
    with apply(pipe, schedule_of(build, method)):
        before(pipe)
        assert torch.equal(generate(other, seed=3), plain)
        assert torch.equal(generate(pipe), fresh_picture(build, method))


@pytest.mark.parametrize("build", [sd3, flux, unet])
@every_method
def test_another_pipeline_with_the_same_model_that_runs_in_the_middle_of_a_generation(
    build: Build, method: str
) -> None:
    pipe, plain = pipeline_of(build), generate(pipeline_of(build), seed=3)
    other, made = beside(pipe, build), []

    def run(_pipe: Any, step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            made.append(generate(other, seed=3))
        return kwargs

    with apply(pipe, schedule_of(build, method)):
        assert torch.equal(generate(pipe, callback_on_step_end=run), fresh_picture(build, method))
    assert torch.equal(made[0], plain)


@some_models
@every_method
def test_another_pipeline_with_the_same_model_and_scheduler_is_cached_as_well(build: Build, method: str) -> None:
    pipe = pipeline_of(build)
    other = beside(pipe, build)
    other.scheduler = pipe.scheduler
    with apply(pipe, schedule_of(build, method)):
        aborted_picture(pipe)
        assert torch.equal(generate(other), fresh_picture(build, method))


@some_models
def test_a_call_by_hand_after_a_generation_that_was_aborted_is_plain(build: Build) -> None:
    pipe = pipeline_of(build)
    given = arguments(denoiser(pipe))
    want = predict(denoiser(pipe), given)
    with apply(pipe, schedule_of(build, "FORA")):
        aborted_picture(pipe)
        assert torch.equal(predict(denoiser(pipe), given), want)
