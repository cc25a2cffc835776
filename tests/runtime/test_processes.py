"""Worker processes of a program that has applied a schedule: forked ones have it, spawned ones apply their own."""

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dicache import CacheError, apply
from tests.runtime.test_requests import alone, every_method, schedule_of
from tests.tiny import block_of, dit, sample

SOON = 60.0  # seconds, by which a worker must be done; one that waits for a lock for ever would reach it


def worked(method: str, target: Callable[..., None], *args: object) -> Tensor | None:
    """Run a function in a process that tells of a tensor, or of an error that it meets."""
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(theirs, *args))
    process.start()
    try:
        assert ours.poll(SOON), "the worker waits for ever"
        told = ours.recv()
    finally:
        process.kill()
        process.join()
    assert not isinstance(told, str), told
    return torch.tensor(told)


def tell(connection: Any, out: Tensor) -> None:
    connection.send(out.tolist())


@every_method
def test_a_worker_that_is_forked_in_the_middle_of_a_call_generates_for_itself(method: str) -> None:
    model, want = dit(), alone(dit, method, 0, 1)
    inside, go_on, forked = threading.Event(), threading.Event(), threading.Event()
    got: dict[int, Tensor] = {}

    def wait(*_: object) -> None:
        if not forked.is_set():
            inside.set()
            go_on.wait(SOON)

    with apply(model, schedule_of(dit, method)) as cache:

        def generate(seed: int) -> Tensor:
            with cache.request():
                return sample(model, cache, seed=seed, batch=1 + seed)

        def work(connection: object) -> None:
            torch.set_num_threads(1)  # those of the parent are not there
            forked.set()
            tell(connection, generate(1))

        block_of(model, dit, 1).register_forward_pre_hook(wait)
        thread = threading.Thread(target=lambda: got.update({0: generate(0)}))
        thread.start()
        assert inside.wait(SOON)
        try:
            other = worked("fork", work)  # while the thread holds the cache
        finally:
            forked.set()
            go_on.set()
            thread.join(SOON)
        assert other is not None
        torch.testing.assert_close(other, want[1])
        assert torch.equal(got[0], want[0])
        assert torch.equal(generate(1), want[1])


def generate_from_file(connection: object, file: Path) -> None:
    torch.set_num_threads(1)
    model = dit()
    with apply(model, file) as cache:
        tell(connection, sample(model, cache, batch=1))


def hand_over(connection: object, model: object) -> None:
    tell(connection, torch.zeros(1))


def test_a_worker_that_is_spawned_applies_the_file(tmp_path: Path) -> None:
    schedule = schedule_of(dit, "reuse")
    schedule.save(tmp_path / "s.json")
    out = worked("spawn", generate_from_file, tmp_path / "s.json")
    assert out is not None
    torch.testing.assert_close(out, alone(dit, "reuse", 0)[0])


def test_a_model_with_a_schedule_is_not_handed_to_a_worker() -> None:
    model = dit()
    with apply(model, schedule_of(dit, "reuse")), pytest.raises(CacheError, match=r"detach\(\) first"):
        worked("spawn", hand_over, model)
    worked("spawn", hand_over, model)
