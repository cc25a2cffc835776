"""Two pipelines with one model: one has a schedule, the other is neither cached by it nor disturbs it."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dicache import apply
from dicache.runtime.apply import denoiser
from dicache.schedules import Rule
from tests.runtime.test_hazards import (
    aborted_picture,
    every_method,
    fresh_picture,
    picture,
    schedule_of,
    some_models,
)
from tests.tiny import (
    Build,
    arguments,
    block_of,
    dit,
    flux,
    generate,
    pipeline_of,
    predict,
    replay,
    scheduled,
    sd3,
    unet,
)


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


def test_detaching_waits_for_the_call_that_another_thread_is_in() -> None:
    model, schedule = dit(), scheduled(dit, Rule("skip", "C..C", blocks="1-2"))
    calls = [{**arguments(model, seed=step), "timestep": torch.full((2,), 900 - 200 * step)} for step in range(2)]
    with apply(model, schedule) as cache:
        want = replay(model, cache, calls)
    inside, left = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if cache.stats.calls == 1:
            inside.set()
            left.wait(0.3)  # as long as the other thread is given to detach, which it must not

    hook = block_of(model, dit, 1).register_forward_hook(wait)
    cache = apply(model, schedule)
    made: list[Tensor] = []
    thread = threading.Thread(target=lambda: made.extend(replay(model, cache, calls)))
    thread.start()
    assert inside.wait(60)
    cache.detach()
    left.set()
    thread.join(60)
    hook.remove()
    assert [torch.equal(one, other) for one, other in zip(made, want, strict=True)] == [True, True]
    assert "forward" not in vars(model)
