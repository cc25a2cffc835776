"""Law 8: two models, two threads and two requests that take turns do not disturb one another."""

import asyncio
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor

from dicache import Cache, Schedule, apply
from dicache.schedules import Rule
from tests.runtime.interleaving import in_threads, out_of_phase, request
from tests.tiny import STEPS, Build, adaptive, block_of, denoise, every_model, first_block, sample, scheduled

every_method = pytest.mark.parametrize("method", ["reuse", "skip", "adaptive", "first-block"])


def schedule_of(build: Build, method: str) -> Schedule:
    if method == "adaptive":
        return adaptive(build, threshold=0.4)
    if method == "first-block":
        return first_block(build, threshold=0.9)
    return scheduled(build, Rule(method, "C.C."))  # type: ignore[arg-type]


def alone(build: Build, method: str, *seeds: int) -> list[Tensor]:
    """Return what each seed gives on a model of its own."""
    outputs = []
    for seed in seeds:
        model = build()
        with apply(model, schedule_of(build, method)) as cache:
            outputs.append(sample(model, cache, seed=seed, batch=1 + seed))
    return outputs


@every_model
@every_method
def test_requests_held_by_generators_in_a_zip(build: Build, method: str) -> None:
    model, want = build(), alone(build, method, 0, 1, 2)
    with apply(model, schedule_of(build, method)) as cache:
        turns = list(zip(*(request(model, cache, seed) for seed in range(3)), strict=True))
        for seed in range(3):
            assert torch.equal(torch.stack([turn[seed] for turn in turns]), want[seed])
        assert cache.stats.calls == 3 * STEPS
        assert torch.equal(sample(model, cache, seed=0, batch=1), want[0])  # and afterwards without a request


@every_model
@every_method
def test_requests_entered_again_around_each_step(build: Build, method: str) -> None:
    model, want = build(), alone(build, method, 0, 1)
    with apply(model, schedule_of(build, method)) as cache:
        requests = cache.request(), cache.request()

        def turns(seed: int) -> Generator[Tensor]:
            steps = denoise(model, cache, seed=seed, batch=1 + seed)
            for _ in range(STEPS):
                with requests[seed]:
                    out = next(steps)
                yield out

        got = out_of_phase(turns(0), turns(1))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@every_model
@every_method
def test_requests_in_two_threads_on_one_model(build: Build, method: str) -> None:
    model, want = build(), alone(build, method, 0, 1)
    turn = threading.Barrier(2, timeout=30)
    got: dict[int, Tensor] = {}

    with apply(model, schedule_of(build, method)) as cache:

        def work(seed: int) -> None:
            outputs = []
            for out in request(model, cache, seed):
                outputs.append(out)
                turn.wait()
            got[seed] = torch.stack(outputs)

        in_threads(lambda: work(0), lambda: work(1))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@every_model
@every_method
def test_a_call_that_arrives_during_another_waits_for_its_end(build: Build, method: str) -> None:
    model, want = build(), alone(build, method, 0, 1)
    got: dict[int, Tensor] = {}
    with apply(model, schedule_of(build, method)) as cache:
        steps = request(model, cache, 0)
        outputs = [next(steps), next(steps)]

        def serve() -> None:
            with cache.request():
                got[1] = sample(model, cache, seed=1, batch=2)

        intruder = threading.Thread(target=serve)

        def interrupt(*_: object) -> None:
            hook.remove()
            intruder.start()
            intruder.join(timeout=0.1)

        hook = block_of(model, build, 1).register_forward_pre_hook(interrupt)
        outputs += steps
        intruder.join(timeout=30)
    assert torch.equal(torch.stack(outputs), want[0])
    assert torch.equal(got[1], want[1])


@every_model
@every_method
def test_requests_in_tasks_that_await(build: Build, method: str) -> None:
    model, want = build(), alone(build, method, 0, 1)

    async def serve(cache: Cache, seed: int) -> Tensor:
        outputs = []
        with cache.request():
            for out in denoise(model, cache, seed=seed, batch=1 + seed):
                outputs.append(out)
                await asyncio.sleep(0)
        return torch.stack(outputs)

    async def both(cache: Cache) -> list[Tensor]:
        return list(await asyncio.gather(serve(cache, 0), serve(cache, 1)))

    with apply(model, schedule_of(build, method)) as cache:
        got = asyncio.run(both(cache))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@every_model
@every_method
def test_requests_entered_through_an_exit_stack(build: Build, method: str) -> None:
    model, want = build(), alone(build, method, 0, 1)

    def stacked(cache: Cache, seed: int) -> Generator[Tensor]:
        with ExitStack() as stack:
            stack.enter_context(cache.request())
            yield from denoise(model, cache, seed=seed, batch=1 + seed)

    with apply(model, schedule_of(build, method)) as cache:
        got = out_of_phase(stacked(cache, 0), stacked(cache, 1))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@every_model
@every_method
def test_requests_entered_by_a_function_that_was_made_a_context_manager(build: Build, method: str) -> None:
    model, want = build(), alone(build, method, 0, 1)

    @contextmanager
    def serving(cache: Cache) -> Iterator[None]:
        with cache.request():
            yield

    def wrapped(cache: Cache, seed: int) -> Generator[Tensor]:
        with serving(cache):
            yield from denoise(model, cache, seed=seed, batch=1 + seed)

    with apply(model, schedule_of(build, method)) as cache:
        got = out_of_phase(wrapped(cache, 0), wrapped(cache, 1))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@every_model
@every_method
def test_requests_inherited_by_the_threads_that_their_tasks_start(build: Build, method: str) -> None:
    model, want = build(), alone(build, method, 0, 1)

    async def serve(cache: Cache, seed: int) -> Tensor:
        with cache.request():
            steps = denoise(model, cache, seed=seed, batch=1 + seed)
            return torch.stack([await asyncio.to_thread(next, steps) for _ in range(STEPS)])

    async def both(cache: Cache) -> list[Tensor]:
        return list(await asyncio.gather(serve(cache, 0), serve(cache, 1)))

    with apply(model, schedule_of(build, method)) as cache:
        got = asyncio.run(both(cache))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@every_model
@every_method
def test_a_caller_that_names_no_request_beside_one_that_holds_its_own(build: Build, method: str) -> None:
    model, want = build(), alone(build, method, 0, 1)
    with apply(model, schedule_of(build, method)) as cache:
        got = out_of_phase(request(model, cache, 0), denoise(model, cache, seed=1, batch=2))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@every_model
@every_method
def test_two_models_that_take_turns_in_one_thread_one_of_them_without_a_schedule(build: Build, method: str) -> None:
    want, plain = alone(build, method, 1), sample(build(), seed=0)
    model, other = build(), build()
    with apply(model, schedule_of(build, method)) as cache:
        got = out_of_phase(denoise(other, seed=0), denoise(model, cache, seed=1, batch=2))
    assert torch.equal(got[0], plain)
    assert torch.equal(got[1], want[0])


@every_model
@every_method
def test_a_request_that_fails_disturbs_neither_the_other_nor_its_own_next_generation(build: Build, method: str) -> None:
    model, want = build(), alone(build, method, 0, 1)
    with apply(model, schedule_of(build, method)) as cache:
        failing, other = cache.request(), request(model, cache, 1)
        outputs = [next(other)]
        with pytest.raises(RuntimeError, match="cancelled"), failing:  # noqa: PT012
            next(denoise(model, cache, seed=0, batch=1))
            raise RuntimeError("cancelled")
        outputs += [next(other), next(other)]
        with failing:
            again = sample(model, cache, seed=0, batch=1)
        outputs.append(next(other))
        other.close()
    assert torch.equal(torch.stack(outputs), want[1])
    assert torch.equal(again, want[0])
