"""Law 4: leaving the `with` block or detaching restores the model exactly and frees what was kept."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dicache import CacheError, Schedule, apply
from dicache.runtime.apply import denoiser
from dicache.schedules import Rule
from tests.counting import BrokenError, attributes, broken
from tests.tiny import (
    STEPS,
    Build,
    adaptive,
    anatomy_of,
    arguments,
    block_of,
    denoise,
    entrance,
    every_model,
    first_block,
    generate,
    pipeline_of,
    predict,
    sample,
    scheduled,
    some_blocks,
)

METHODS = ("reuse", "skip", "adaptive", "first-block")
every_method = pytest.mark.parametrize("method", METHODS)


def schedule_of(build: Build, method: str) -> Schedule:
    if method == "adaptive":
        return adaptive(build, threshold=0.5)
    if method == "first-block":
        return first_block(build, threshold=0.9)
    return scheduled(build, Rule("reuse", "CC.."), Rule(method, "C..C", blocks=some_blocks(build)))  # type: ignore[arg-type]


@every_model
@every_method
def test_leaving_the_block_restores_every_module(build: Build, method: str) -> None:
    model = build()
    before, want = attributes(model), sample(model)
    with apply(model, schedule_of(build, method)) as cache:
        sample(model, cache)
        assert attributes(model) != before
    assert attributes(model) == before
    assert torch.equal(sample(model), want)


@every_model
@every_method
@pytest.mark.parametrize("place", ["a block", "the first branch", "another branch"])
def test_an_exception_inside_a_block_passes_and_every_module_is_restored(build: Build, method: str, place: str) -> None:
    model = build()
    want = sample(model)

    def fail(*_: object) -> None:
        raise BrokenError

    last = anatomy_of(build).blocks[2]
    failing = {
        "a block": block_of(model, build, 1),
        "the first branch": entrance(model, build),
        "another branch": model.get_submodule(f"{last.module}.{last.sites[-1].module}"),
    }[place]
    hook = failing.register_forward_pre_hook(fail)
    before = attributes(model)
    cache = apply(model, schedule_of(build, method))
    with pytest.raises(BrokenError), cache:
        sample(model, cache)
    assert attributes(model) == before
    assert cache.stats.bytes_held == 0
    hook.remove()
    assert torch.equal(sample(model), want)


@every_model
@every_method
def test_an_exception_in_a_late_step_of_a_pipeline_restores_model_and_scheduler(build: Build, method: str) -> None:
    pipe = pipeline_of(build)
    want = generate(pipe)
    before, keys = attributes(denoiser(pipe)), set(pipe.scheduler.__dict__)
    with broken(block_of(denoiser(pipe), build, 0), call=STEPS - 1), apply(pipe, schedule_of(build, method)):
        generate(pipe)
    after = attributes(denoiser(pipe))
    assert after.keys() == before.keys()
    assert after == before
    assert set(pipe.scheduler.__dict__) == keys
    assert torch.equal(generate(pipe), want)


@every_model
def test_detach_restores_once_and_again_does_nothing(build: Build) -> None:
    pipe = pipeline_of(build)
    generate(pipe)  # some pipelines hang something on their model
    before, keys = attributes(denoiser(pipe)), set(pipe.scheduler.__dict__)
    cache = apply(pipe, schedule_of(build, "reuse"))
    cache.detach()
    assert attributes(denoiser(pipe)) == before
    assert not {"step", "set_timesteps"} & set(pipe.scheduler.__dict__) - keys
    other = apply(pipe, schedule_of(build, "reuse"))
    cache.detach()  # of the first: must not take the second one off
    generate(pipe)
    assert other.stats.reused_sites > 0
    other.detach()
    assert attributes(denoiser(pipe)) == before


@every_model
def test_a_detached_cache_says_so(build: Build) -> None:
    model = build()
    cache = apply(model, schedule_of(build, "reuse"))
    cache.detach()
    for use in (cache.begin_generation, cache.begin_step, cache.request):
        with pytest.raises(CacheError, match=r"this cache is detached; call dicache\.apply again"):
            use()


@every_model
def test_a_schedule_that_cannot_be_attached_leaves_the_model_as_it_was(build: Build) -> None:
    model = build()
    before = attributes(model)
    without_steps = SimpleNamespace(transformer=model, scheduler=SimpleNamespace())
    with pytest.raises(AttributeError, match="set_timesteps"):
        apply(without_steps, schedule_of(build, "reuse"))
    assert attributes(model) == before
    apply(model, schedule_of(build, "reuse")).detach()


@every_model
@every_method
def test_a_forward_that_was_on_a_module_is_called_and_comes_back(build: Build, method: str) -> None:
    model = build()
    attention = entrance(model, build)
    own, calls = attention.forward, []

    def offloaded(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    attention.forward = offloaded
    with apply(model, schedule_of(build, method)) as cache:
        sample(model, cache)
        if method == "first-block":
            assert len(calls) == STEPS  # the first block always runs
        else:
            assert 1 <= len(calls) < STEPS
    assert attention.__dict__["forward"] is offloaded


@every_model
def test_the_model_can_be_called_plainly_after_detaching_in_the_middle_of_a_generation(build: Build) -> None:
    model = build()
    given = arguments(model)
    want = predict(model, given)
    cache = apply(model, schedule_of(build, "skip"))
    turns = denoise(model, cache)
    next(turns)
    next(turns)
    cache.detach()
    assert torch.equal(predict(model, given), want)
