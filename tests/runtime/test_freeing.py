"""What a cache keeps is freed, at once and without the garbage collector, when nothing will read it any more."""

import weakref
from collections.abc import Generator
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from dicache import Cache, CacheError, Schedule, apply
from dicache.schedules import Rule
from tests.counting import broken
from tests.tiny import (
    STEPS,
    Build,
    adaptive,
    arguments,
    block_of,
    denoise,
    entrance,
    every_model,
    every_transformer,
    first_tensor,
    generate,
    pipeline_of,
    predict,
    replay,
    scheduled,
)


class Followed:
    """Follows, without keeping them, what enters or leaves a module."""

    def __init__(self) -> None:
        self._refs: list[weakref.ref[Tensor]] = []

    @classmethod
    def inputs(cls, module: nn.Module) -> "Followed":
        made = cls()
        module.register_forward_pre_hook(
            lambda _, args, kwargs: made._refs.append(weakref.ref(first_tensor(args, kwargs))), with_kwargs=True
        )
        return made

    @classmethod
    def outputs(cls, module: nn.Module) -> "Followed":
        made = cls()
        module.register_forward_hook(
            lambda *call: made._refs.append(weakref.ref(call[2][0] if isinstance(call[2], tuple) else call[2]))
        )
        return made

    @property
    def alive(self) -> int:
        return sum(ref() is not None for ref in self._refs)


def signals(model: nn.Module, build: Build) -> Followed:
    """Follow the modulated input of the first block, which an adaptive policy keeps."""
    return Followed.inputs(entrance(model, build))


@every_transformer
def test_a_kept_output_lives_until_detach_and_no_longer(build: Build) -> None:
    model = build()
    kept = Followed.outputs(model.get_submodule("transformer_blocks.1.ff"))
    cache = apply(model, scheduled(build, Rule("reuse", "CC..", branch="mlp")))
    turns = denoise(model, cache)
    next(turns)
    assert kept.alive == 0  # made anew before it is read
    next(turns)
    assert kept.alive == 1
    assert cache.stats.bytes_held > 0
    cache.detach()
    assert kept.alive == 0
    assert cache.stats.bytes_held == 0


@every_transformer
def test_an_output_that_nothing_reads_any_more_is_freed_during_the_generation(build: Build) -> None:
    model = build()
    kept = Followed.outputs(model.get_submodule("transformer_blocks.1.ff"))
    with apply(model, scheduled(build, Rule("reuse", "C.CC", branch="mlp"))) as cache:
        alive = [kept.alive for _ in denoise(model, cache)]
    assert alive == [1, 0, 0, 0]


@every_transformer
def test_an_adaptive_policy_keeps_one_input_and_detach_frees_it(build: Build) -> None:
    model = build()
    followed = signals(model, build)
    cache = apply(model, adaptive(build, threshold=0.5))
    turns = denoise(model, cache)
    assert [followed.alive for _, _ in zip(range(STEPS - 1), turns, strict=False)] == [1] * (STEPS - 1)
    cache.detach()
    assert followed.alive == 0


@every_transformer
def test_detach_frees_what_a_request_keeps_that_somebody_still_holds(build: Build) -> None:
    model = build()
    followed = signals(model, build)
    cache = apply(model, adaptive(build, threshold=0.5))
    request = cache.request()
    turns = denoise(model, cache)
    with request:
        next(turns)
    assert followed.alive == 1
    cache.detach()
    assert followed.alive == 0
    with request:  # held until here
        pass


@every_transformer
def test_requests_that_took_turns_leave_nothing_behind_after_detach(build: Build) -> None:
    model = build()
    followed = signals(model, build)
    cache = apply(model, adaptive(build, threshold=0.5))

    def hold(seed: int) -> Generator[Tensor]:
        with cache.request():
            yield from denoise(model, cache, seed=seed)

    for _ in zip(hold(0), hold(1), strict=True):
        pass
    cache.detach()
    assert followed.alive == 0


@every_transformer
def test_a_pipeline_frees_what_an_adaptive_policy_kept_when_its_generation_ends(build: Build) -> None:
    pipe = pipeline_of(build)
    followed = signals(pipe.transformer, build)
    with apply(pipe, adaptive(build, threshold=0.5)):
        generate(pipe)
        assert followed.alive == 0


@every_transformer
def test_what_a_pass_kept_that_stopped_coming_is_freed_when_the_generation_ends(build: Build) -> None:
    model, scheduler = build(), DDIMScheduler()
    followed = Followed.outputs(model.get_submodule("transformer_blocks.1.ff"))
    x = torch.ones(1, 2, 2, 2)
    with apply(SimpleNamespace(transformer=model, scheduler=scheduler), scheduled(build, Rule("reuse", "C..."))):
        scheduler.set_timesteps(STEPS)
        for step, t in enumerate(scheduler.timesteps):
            for seed in range(2 if step == 0 else 1):
                predict(model, arguments(model, seed=seed))
            assert followed.alive >= 1
            x = scheduler.step(x, t, x).prev_sample
        assert followed.alive == 0


@every_transformer
@pytest.mark.parametrize("method", ["reuse", "skip", "adaptive"])
def test_a_call_that_failed_keeps_nothing_and_the_next_step_computes(build: Build, method: str) -> None:
    model = build()
    given = [arguments(model, seed=step, timestep=900 - 200 * step) for step in range(3)]
    want = predict(model, given[2])
    schedule: Schedule = (
        adaptive(build, threshold=99, first_steps=2) if method == "adaptive" else scheduled(build, Rule(method, "C..."))  # type: ignore[arg-type]
    )
    inputs = Followed.inputs(model.get_submodule("transformer_blocks.0"))
    outputs = Followed.outputs(entrance(model, build))
    with apply(model, schedule) as cache:
        cache.begin_generation()
        cache.begin_step()
        predict(model, given[0])
        cache.begin_step()
        with broken(model.get_submodule("transformer_blocks.1"), call=0):
            predict(model, given[1])
        assert (inputs.alive, outputs.alive) == (0, 0)
        cache.begin_step()
        assert torch.equal(predict(model, given[2]), want)


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


def started(model: nn.Module, cache: Cache) -> None:
    """Take the first step of a generation."""
    next(denoise(model, cache))


@every_transformer
def test_a_request_that_ended_in_an_exception_keeps_nothing_and_must_begin_anew(build: Build) -> None:
    model = build()
    followed = signals(model, build)
    with apply(model, adaptive(build, threshold=0.5)) as cache:
        request = cache.request()
        with pytest.raises(KeyboardInterrupt), request:  # noqa: PT012
            started(model, cache)
            assert followed.alive == 1
            raise KeyboardInterrupt
        assert followed.alive == 0
        with request, pytest.raises(CacheError, match="without a generation"):
            cache.begin_step()
