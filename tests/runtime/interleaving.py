"""Generations that take turns."""

import threading
from collections.abc import Callable, Generator

import torch
from torch import Tensor, nn

from dicache import Cache
from tests.tiny import STEPS, denoise


def request(model: nn.Module, cache: Cache, seed: int) -> Generator[Tensor]:
    """Hold a request while sampling."""
    with cache.request():
        yield from denoise(model, cache, seed=seed, batch=1 + seed)


def out_of_phase(first: Generator[Tensor], second: Generator[Tensor], steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Let two generations take turns, the second one a step behind."""
    outputs: tuple[list[Tensor], list[Tensor]] = ([next(first)], [])
    for _ in range(steps - 1):
        outputs[1].append(next(second))
        outputs[0].append(next(first))
    outputs[1].append(next(second))
    first.close()
    second.close()
    return torch.stack(outputs[0]), torch.stack(outputs[1])


def in_threads(*works: Callable[[], None]) -> None:
    """Run in one thread each; an error of any of them is raised here."""
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    if errors:
        raise errors[0]
