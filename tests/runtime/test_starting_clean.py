"""Law 5: a generation is what it would be on a fresh model, whatever came before it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dicache import Cache, Schedule, apply
from dicache.runtime.apply import denoiser
from dicache.schedules import Rule
from tests.counting import broken
from tests.tiny import (
    Build,
    adaptive,
    arguments,
    block_of,
    denoise,
    every_model,
    first_block,
    generate,
    pipeline_of,
    predict,
    replay,
    sample,
    scheduled,
    some_blocks,
)

Before = Callable[..., None]


def finished(model: torch.nn.Module, cache: Cache) -> None:
    sample(model, cache, seed=7)


def aborted(model: torch.nn.Module, cache: Cache) -> None:
    turns = denoise(model, cache, seed=7)
    next(turns)
    next(turns)
    turns.close()


def failed_between_steps(model: torch.nn.Module, cache: Cache) -> None:
    with broken(model, call=2):
        sample(model, cache, seed=7)


def failed_inside_a_block(model: torch.nn.Module, cache: Cache) -> None:
    with broken(model.get_submodule(cache.schedule.anatomy.blocks[2].module), call=0):
        sample(model, cache, seed=7)


def failed_inside_the_first_branch(model: torch.nn.Module, cache: Cache) -> None:
    first = cache.schedule.anatomy.blocks[0]
    with broken(model.get_submodule(f"{first.module}.{first.sites[0].entrance}"), call=1):
        sample(model, cache, seed=7)


def of_another_batch_size(model: torch.nn.Module, cache: Cache) -> None:
    sample(model, cache, seed=7, batch=3)


def of_another_precision(model: torch.nn.Module, cache: Cache) -> None:
    model.double()
    aborted(model, cache)
    model.float()


EVENTS = [
    finished,
    aborted,
    failed_between_steps,
    failed_inside_a_block,
    failed_inside_the_first_branch,
    of_another_batch_size,
    of_another_precision,
]
every_event = pytest.mark.parametrize("event", EVENTS)
every_method = pytest.mark.parametrize("method", ["reuse", "skip", "adaptive", "first-block"])


def schedule_of(build: Build, method: str) -> Schedule:
    if method == "adaptive":
        return adaptive(build, threshold=0.5)
    if method == "first-block":
        return first_block(build, threshold=0.9)
    return scheduled(build, Rule(method, "C..C", blocks=some_blocks(build)), Rule("reuse", "CC.C", branch="mlp"))  # type: ignore[arg-type]


def fresh(build: Build, method: str) -> Tensor:
    model = build()
    with apply(model, schedule_of(build, method)) as cache:
        return sample(model, cache)


@every_model
@every_method
@every_event
def test_a_generation_after_one_that_is(build: Build, method: str, event: Before) -> None:
    model = build()
    with apply(model, schedule_of(build, method)) as cache:
        event(model, cache)
        assert torch.equal(sample(model, cache), fresh(build, method))
        assert cache.stats.generations == 2


@every_model
@every_method
def test_a_second_cache_on_the_model_starts_clean_as_well(build: Build, method: str) -> None:
    model = build()
    with apply(model, schedule_of(build, method)) as cache:
        aborted(model, cache)
    with apply(model, schedule_of(build, method)) as cache:
        assert torch.equal(sample(model, cache), fresh(build, method))


def picture(pipe: object) -> None:
    generate(pipe, seed=7)


def larger_picture(pipe: object) -> None:
    generate(pipe, seed=7, batch=2)


def unguided_picture(pipe: object) -> None:
    generate(pipe, seed=7, guidance_scale=1.0)


def aborted_picture(pipe: object) -> None:
    with broken(denoiser(pipe), call=2):
        generate(pipe, seed=7)


def failed_picture(pipe: object) -> None:
    mlp = next(module for path, module in denoiser(pipe).named_modules() if path.endswith(".ff"))
    with broken(mlp, call=0):
        generate(pipe, seed=7)


@every_model
@every_method
@pytest.mark.parametrize("event", [picture, larger_picture, unguided_picture, aborted_picture, failed_picture])
def test_a_picture_after_another_one(build: Build, method: str, event: Before) -> None:
    untouched, pipe = pipeline_of(build), pipeline_of(build)
    with apply(untouched, schedule_of(build, method)), apply(pipe, schedule_of(build, method)):
        event(pipe)
        assert torch.equal(generate(pipe), generate(untouched))


@every_model
def test_a_step_that_failed_may_be_called_again_and_computes(build: Build) -> None:
    model = build()
    first, second = arguments(model, seed=1), arguments(model, seed=2)
    want = predict(model, second)
    with apply(model, scheduled(build, Rule("reuse", "C..."))) as cache:
        replay(model, cache, [first])
        cache.begin_step()
        with broken(block_of(model, build, 1), call=0):
            predict(model, second)
        assert torch.equal(predict(model, second), want)  # nothing of the first step is in it
