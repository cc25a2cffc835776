"""What is simulated of all runs at once, against the policies' own decisions step by step."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dicache.calibrate.simulating import residual_error, simulate, simulate_first_block, simulate_rates
from dicache.schedules import AdaCachePolicy, FirstBlockPolicy, TeaCachePolicy
from dicache.schedules.policies.adacache import Motion

RUNS, CONTEXTS, STEPS = 40, 2, 24


def signal(seed: int, *more: int) -> np.ndarray:
    """Return changes with a few that were not measured."""
    generator = np.random.default_rng(seed)
    x = generator.lognormal(-2, 1, (RUNS, CONTEXTS, STEPS, *more))
    x[generator.random(x.shape) < 0.02] = np.nan
    return np.asarray(x)


@pytest.mark.parametrize("negative", ["clamp", "abs", "reference"])
@pytest.mark.parametrize(("first", "last"), [(1, 0), (3, 2)])
def test_teacache_decides_as_its_policy(negative: Any, first: int, last: int) -> None:
    policy = TeaCachePolicy(0.3, (-3.0, 1.5, 0.01, -0.02), (0.02, 0.6), negative, first_steps=first, last_steps=last)
    x = signal(0)[..., 1:]
    found = simulate(policy, x)
    assert 0.05 < found.mean() < 0.9
    for run, context in np.ndindex(RUNS, CONTEXTS):
        memory, given = policy.remember(), [None, *x[run, context].tolist()]
        want = [policy.decide(step, STEPS, given[step], memory) for step in range(STEPS)]
        assert found[run, context].tolist() == want


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_continuous": 2, "max_cached": 9}, {"at_threshold": "reuse", "last_steps": 3}, {"threshold": 0.0}],
)
def test_first_block_decides_as_its_policy(settings: dict[str, Any]) -> None:
    policy = FirstBlockPolicy(**{"threshold": 0.2, **settings})
    lags = 5
    x = np.round(signal(1, lags), 1)  # some equal to the threshold
    found, unknown = simulate_first_block(policy, x)
    for run, context in np.ndindex(RUNS, CONTEXTS):
        memory, last = policy.remember(), 0
        for step in range(STEPS):
            lag = step - last
            change = float(x[run, context, step, lag - 1]) if 1 <= lag <= lags else None
            may_skip = not policy.forced(step, STEPS) and policy.allows(memory)
            assert found[run, context, step] == policy.decide(step, STEPS, change, memory)
            beyond = lag > lags and may_skip and np.isfinite(x[run, context, step, 0])
            assert unknown[run, context, step] == beyond
            last = step if found[run, context, step] else last


@pytest.mark.parametrize("motion", [None, Motion(power=2.0)])
def test_adacache_decides_as_its_policy(motion: Motion | None) -> None:
    policy = AdaCachePolicy(((0.03, 5), (0.06, 4), (0.1, 3), (0.3, 2), (1.0, 1)), (1, 3), motion=motion)
    changes, moved = signal(2, 2, 12), np.nan_to_num(signal(3), nan=0.2)
    found = simulate_rates(policy, changes, None if motion is None else moved)
    assert 0.2 < found.mean() < 0.9
    for run, context in np.ndindex(RUNS, CONTEXTS):
        memory = policy.remember()
        for step in range(STEPS):
            last = memory.last
            assert found[run, context, step] == policy.decide(step, STEPS, None, memory)
            if found[run, context, step] and last is not None and policy.watches(step, STEPS):
                seen = changes[run, context, step, :, step - last - 1].tolist()
                policy.observe(step, STEPS, seen, None if motion is None else moved[run, context, step], memory)


def test_the_error_of_a_skipped_step_is_that_of_the_residual_that_stands_in() -> None:
    residuals = np.array([[3.0, 0.0], [3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    profile: Any = SimpleNamespace(arrays={"body/gram": (residuals @ residuals.T)[None]})
    computed = np.array([[[True, False, False, False], [True, True, False, True]]])
    # Of the first pass 4 of 5 and sqrt(13) of 2, of the last step nothing is known; of the second sqrt(13) of 2.
    assert residual_error(profile, computed) == pytest.approx((0.8 + 13**0.5 / 2 + 13**0.5 / 2) / 3)
    assert residual_error(profile, np.ones_like(computed)) is None
