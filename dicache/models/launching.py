"""Processes that a launcher such as torchrun has started to share work: of n processes each does every n-th piece."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from dicache.anatomy.spread import RanksError

T = TypeVar("T")
MEETING = timedelta(minutes=10)  # within which all ranks must have started
LATE = timedelta(hours=24)  # by which a rank may be done later than another; one that has died is noticed at once


class Workers:
    """The processes of the default process group, or this one alone.

    Args:
        rank: Of this process.
        count: Of all.
        advice: What to do where another has died.
    """

    def __init__(self, rank: int = 0, count: int = 1, advice: str = "") -> None:
        self.rank, self.count, self._advice = rank, count, advice

    def share(self, pieces: int) -> range:
        """Return which of so many pieces of work are this process's: every `count`th, so that none ends much later."""
        return part_of(pieces, self.rank + 1, self.count)

    def gather(self, own: list[T], pieces: int) -> list[T]:
        """Return what all have made of the pieces, in their order; each gives that of its share.

        Raises:
            RanksError: If another process has died.
        """
        if self.count == 1:
            return own
        self.wait()
        told: list[list[T]] = [[] for _ in range(self.count)]
        distributed.all_gather_object(told, own)
        parts = [iter(part) for part in told]
        return [next(parts[place % self.count]) for place in range(pieces)]

    def first(self, found: T) -> T:
        """Return what the first process has found.

        Raises:
            RanksError: If another process has died.
        """
        if self.count == 1:
            return found
        self.wait()
        told = [found]
        distributed.broadcast_object_list(told)
        return told[0]

    def wait(self) -> None:
        """Wait until all are here.

        Raises:
            RanksError: If another process has died.
        """
        if self.count == 1:
            return
        try:
            distributed.monitored_barrier(timeout=LATE)
        except RuntimeError as error:
            raise RanksError(
                f"rank {self.rank} of {self.count} waited in vain for the others: one of them has failed, see its own "
                f"error{self._advice and '. '}{self._advice}"
            ) from error


ALONE = Workers()


def part_of(pieces: int, part: int, count: int) -> range:
    """Return the places of part 1 to `count` of some pieces of work: every `count`th."""
    return range(part - 1, pieces, count)


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def device_of_rank(device: str | None) -> str | None:
    """Return the GPU that is this rank's of those of its machine, where it is to be one."""
    wants_gpu = device == "cuda" or (device is None and torch.cuda.is_available())
    return f"cuda:{os.environ['LOCAL_RANK']}" if wants_gpu and "LOCAL_RANK" in os.environ else device


@contextmanager
def workers() -> Iterator[Workers]:
    """Meet the other ranks, if a launcher has started several, and part from them in the end.

    Raises:
        RanksError: If the others do not come.
    """
    if not is_launched():
        yield ALONE
        return
    try:
        distributed.init_process_group("gloo", timeout=MEETING)
    except (RuntimeError, ValueError) as error:
        raise RanksError(
            f"rank {os.environ.get('RANK', '?')} of {os.environ['WORLD_SIZE']} did not find the others ({error}); "
            "needed all of them, and RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them"
        ) from error
    try:
        yield Workers(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
