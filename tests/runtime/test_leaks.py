"""Attaching, replaying and detaching again and again holds no more than doing it once."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dicache import Schedule, apply
from dicache.schedules import Rule
from tests.tiny import adaptive, arguments, dit, generate, pipeline_of, pixart, predict, replay, scheduled

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


def test_texts_of_ever_new_lengths_hold_no_more() -> None:
    model, schedule = pixart(), scheduled(pixart, Rule("reuse", "C.C."))
    given = arguments(model)

    def calls(tokens: int) -> list[dict[str, Any]]:
        text = given["encoder_hidden_states"][:, :1].expand(-1, tokens, -1)
        changed = {"encoder_hidden_states": text, "encoder_attention_mask": torch.ones(len(text), tokens)}
        return [{**given, **changed, "hidden_states": given["hidden_states"] * (1 + 0.1 * step)} for step in range(4)]

    found = []
    gc.freeze()
    try:
        with apply(model, schedule) as cache:
            for tokens in range(1, 181):
                replay(model, cache, calls(tokens))
                if tokens in (60, 180):
                    found.append(held())
            again = {tokens: replay(model, cache, calls(tokens)) for tokens in (1, 180, 90)}
    finally:
        gc.unfreeze()
    (few, small), (many, large) = found
    assert many < 1.5 * few  # and not three times as many
    assert large < 1.5 * small
    for tokens, made in again.items():
        with apply(model, schedule) as cache:
            want = replay(model, cache, calls(tokens))
        assert all(map(torch.equal, made, want))
        assert torch.equal(made[0], predict(model, calls(tokens)[0]))
