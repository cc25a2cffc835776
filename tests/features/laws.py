"""What must hold for a feature of other libraries, whichever of it and a schedule comes first."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dicache import Schedule, apply
from dicache.schedules import Rule
from tests.counting import alike
from tests.tiny import Build, adaptive, first_block, sample, scheduled, some_blocks

Feature = Callable[[nn.Module], Any]  # turns it on
METHODS = ("reuse", "skip", "teacache", "first-block")

every_method = pytest.mark.parametrize("method", METHODS)
either_order = pytest.mark.parametrize("first", ["the feature first", "the schedule first"])


def schedule_of(build: Build, method: str, **made_for: Any) -> Schedule:
    """Return a schedule that reuses or skips something in some steps."""
    if method == "teacache":
        return adaptive(build, threshold=0.5)
    if method == "first-block":
        return first_block(build, threshold=0.9)
    if method == "reuse":
        return scheduled(build, Rule("reuse", "CC.."), **made_for)
    return scheduled(build, Rule("skip", "C..C", blocks=some_blocks(build)), **made_for)


def holds(build: Build, feature: Feature, method: str, first: str, *, exact: bool = True) -> None:
    """Check the law for a feature of a bare model.

    Args:
        build: Makes the model.
        feature: Turns the feature on.
        method: Of the schedule.
        first: Which of both comes first.
        exact: Whether the feature leaves the model's arithmetic as it is; else it may round otherwise.
    """
    schedule = schedule_of(build, method)
    without = build()
    with apply(without, schedule) as cache:
        want, steps = sample(without, cache), cache.stats.steps
    uncached = build()
    feature(uncached)
    plain = sample(uncached)
    assert not torch.equal(want, plain)

    model = build()
    if first == "the feature first":
        feature(model)
    with apply(model, schedule) as cache:
        if first != "the feature first":
            feature(model)
        got = sample(model, cache)
        assert _equal(got, want, exact)
        assert cache.stats.steps == steps
    assert torch.equal(sample(model), plain)
    with apply(model, scheduled(build)) as cache:
        assert torch.equal(sample(model, cache), plain)


def _equal(got: Tensor, want: Tensor, exact: bool) -> bool:
    return torch.equal(got, want) if exact else alike(got, want)
