"""Attaching, replaying and detaching again and again holds no more than doing it once."""

import gc
from collections.abc import Callable

import pytest
import torch

from dicache import Schedule, apply
from dicache.schedules import Rule
from tests.tiny import adaptive, dit, generate, pipeline_of, scheduled

KINDS = ("reuse", "skip", "adaptive")


def schedule_of(kind: str) -> Schedule:
    """Return a schedule of one of the kinds for the tiny DiT."""
    if kind == "adaptive":
        return adaptive(dit, 0.5)
    return scheduled(dit, Rule("skip", "C.C.", "1-2") if kind == "skip" else Rule("reuse", "C.C.", branch="mlp"))


def held() -> tuple[int, int]:
    """Return how many objects there are that could hold others, and the bytes of all tensors."""
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(x.untyped_storage().nbytes() for x in objects if type(x) is torch.Tensor)


def growth(act: Callable[[], object], times: int) -> tuple[int, int]:
    """Return how many objects and bytes of tensors are held after so many times that were not before.

    The least of several counts: what others in the process come to hold, or let go of, is not there each time.
    """
    found = []
    gc.freeze()  # what there is already need not be gone through each time
    try:
        for _ in range(4):
            objects, size = held()
            for _ in range(times):
                act()
            more, larger = held()
            found.append((more - objects, larger - size))
    finally:
        gc.unfreeze()
    return min(found, key=lambda pair: abs(pair[0]) + abs(pair[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_attaching_and_detaching_holds_nothing(kind: str) -> None:
    model, schedule = dit(), schedule_of(kind)
    objects, size = growth(lambda: apply(model, schedule).detach(), 250)
    assert objects < 10  # not one a time: Python and the test itself come to hold a few
    assert size == 0


@pytest.mark.parametrize("kind", ["reuse", "adaptive"])
def test_generation_after_generation_holds_no_more(kind: str) -> None:
    pipe = pipeline_of(dit)
    with apply(pipe, schedule_of(kind)):
        objects, size = growth(lambda: generate(pipe), 50)
    assert objects < 10
    assert size == 0
