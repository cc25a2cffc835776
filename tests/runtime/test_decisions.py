"""What an adaptive policy costs and tells: waits of the host, distances, warnings."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dicache import apply
from dicache.runtime import CacheWarning
from tests.tiny import Build, adaptive, arguments, every_transformer, first_block, predict, sample

STEPS = 8
WAITS = {Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.cpu, Tensor.numpy}


class Waits(TorchFunctionMode):
    """Counts the calls for which the host has to wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in WAITS
        return function(*args, **(kwargs or {}))


@every_transformer
@pytest.mark.parametrize("policy", [adaptive, first_block])
def test_the_host_waits_once_for_a_decision_and_never_where_there_is_none(build: Build, policy: Any) -> None:
    model = build()
    given = arguments(model)
    with Waits() as plain:
        predict(model, given)
    counts = []
    with apply(model, policy(build, 0.2, steps=STEPS, first_steps=2, last_steps=1)) as cache:
        cache.begin_generation()
        for _ in range(STEPS):
            cache.begin_step()
            with Waits() as waits:
                predict(model, given)
            counts.append(waits.count - plain.count)
    assert counts == [0, 0, 1, 1, 1, 1, 1, 0]


def test_waits_are_seen() -> None:
    x = torch.ones(1)
    with Waits() as waits:
        assert float(x) == x.item() == x.tolist()[0]
        assert x > 0
    assert waits.count == 4


@every_transformer
def test_the_stats_tell_the_plan_what_was_done_and_the_distances(build: Build) -> None:
    model = build()
    with apply(model, adaptive(build, 0.2, steps=STEPS)) as cache:
        sample(model, cache, steps=STEPS)
        stats = cache.stats
        distances = stats.distances["0"]
        assert [distances[0], distances[-1]] == [None, None]
        for step, letter in list(enumerate(stats.steps["0"]))[1:-1]:
            distance = distances[step]
            assert distance is not None
            assert (distance < 0.2) == (letter == ".")
        assert stats.planned_steps == ""  # nothing was calibrated


@every_transformer
@pytest.mark.parametrize(
    ("threshold", "said"),
    [(1e-4, "never skipped a step .* raise it"), (99.0, "skipped every step that it may .* lower it")],
)
def test_a_threshold_that_skips_nothing_or_everything_is_warned_of_once(
    build: Build, threshold: float, said: str
) -> None:
    model = build()
    with apply(model, adaptive(build, threshold, steps=STEPS)) as cache:
        with pytest.warns(CacheWarning, match=f"teacache: threshold {threshold:.4g} {said}"):
            sample(model, cache, steps=STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("error", CacheWarning)
            sample(model, cache, steps=STEPS)


@every_transformer
def test_a_threshold_that_skips_some_steps_is_not_warned_of(build: Build) -> None:
    model = build()
    with apply(model, adaptive(build, 0.2, steps=STEPS)) as cache, warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        sample(model, cache, steps=STEPS)
