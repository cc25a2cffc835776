"""FirstBlockCache calibrated from profiles made of numbers, and from a tiny model that then does what was foreseen."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler

from dicache import apply
from dicache.calibrate import CalibrationError
from dicache.calibrate.first_block import FirstBlock
from dicache.calibrate.freezing import freeze
from dicache.calibrate.simulating import macs_fraction, simulate_first_block
from dicache.models.sampling import Sampling, sample
from dicache.profiler import Profile, ProfileError, storage
from dicache.profiler.profiling import profile_pipeline
from dicache.schedules import FirstBlockPolicy, Schedule, Target
from tests.calibrate.profiled import profile as profile_of
from tests.calibrate.test_fora import TWO_BLOCKS
from tests.tiny import anatomy_of, dit, flux, pipeline_of

STEPS = 9


def line(values: np.ndarray, lags: int = STEPS - 1) -> dict[str, np.ndarray]:
    """Return what a profile holds of residuals that are one number a step, shape (runs, contexts, steps)."""
    change = np.full((*values.shape, 1, lags), np.nan)
    for lag in range(1, min(lags, values.shape[-1] - 1) + 1):
        change[:, :, lag:, 0, lag - 1] = np.abs(values[..., lag:] - values[..., :-lag])
    return {"first_block/size": np.abs(values)[..., None], "first_block/change": change}


def measured(values: Any, lags: int = STEPS - 1, **options: Any) -> Profile:
    """Return a profile whose first block adds these numbers, shape (runs, contexts, steps)."""
    values = np.asarray(values, dtype=float)
    return profile_of(
        TWO_BLOCKS, line(values, lags), steps=values.shape[-1], first_blocks=(1,), first_block_lags=lags, **options
    )


def letters(computed: np.ndarray) -> str:
    return "".join("C" if each else "." for each in computed)


def random_walks(runs: int = 6, contexts: int = 1) -> np.ndarray:
    return 8 + np.cumsum(np.random.default_rng(0).normal(size=(runs, contexts, STEPS)), axis=-1)


def test_the_distance_is_to_the_last_computed_step_and_relative_to_it() -> None:
    # From 8: 9 is 1/8 away, 10 is 2/8; from 10: 11 is 1/10, 12 is 2/10, 13 is 3/10; from 13: 15 is 2/13, 17 is 4/13.
    x = measured([[[8, 9, 10, 11, 12, 13, 15, 17, 17]]]).first_block_change(1)
    computed, unknown = simulate_first_block(FirstBlockPolicy(0.25), x)
    assert letters(computed[0, 0]) == "C.C..C.C."
    assert not unknown.any()
    computed, _ = simulate_first_block(FirstBlockPolicy(0.25, at_threshold="reuse"), x)
    assert letters(computed[0, 0]) == "C..C..C.."  # from 8, 10 is exactly 2/8 away; from 11, 15 is 4/11


def test_warm_up_and_most_steps_in_a_row_are_simulated() -> None:
    x = measured(np.full((1, 1, STEPS), 5.0)).first_block_change(1)

    def simulated(**settings: Any) -> str:
        return letters(simulate_first_block(FirstBlockPolicy(0.1, **settings), x)[0][0, 0])

    assert simulated(first_steps=3, last_steps=1) == "CCC.....C"
    assert simulated(max_continuous=2) == "C..C..C.."
    assert simulated(max_cached=3) == "C...CCCCC"


def test_what_lies_farther_back_than_the_lags_computes_and_is_told() -> None:
    still = np.full((2, 1, STEPS), 5.0)
    x = measured(still, lags=3).first_block_change(1)
    computed, unknown = simulate_first_block(FirstBlockPolicy(0.1), x)
    assert letters(computed[0, 0]) == "C...C...C"
    assert np.flatnonzero(unknown[0, 0]).tolist() == [4, 8]
    limited, unknown = simulate_first_block(FirstBlockPolicy(0.1, max_continuous=3), x)
    assert np.array_equal(limited, computed)
    assert not unknown.any()  # it would be computed in any case
    assert FirstBlock(0.1).calibrate(measured(still, lags=3)).measured["beyond_lags"] == 2
    assert FirstBlock(0.1).calibrate(measured(still)).measured["beyond_lags"] == 0


def test_steps_that_another_model_had_are_no_part_of_what_is_expected() -> None:
    values = np.full((2, 1, STEPS), 5.0)
    profile = measured(values, lags=2)
    for name in ("first_block/size", "first_block/change"):
        profile.arrays[name][:, :, :4] = np.nan
    profile.arrays["first_block/change"][:, :, 4, :, 0] = np.nan
    profile.arrays["first_block/change"][:, :, 4:6, :, 1] = np.nan
    schedule = FirstBlock(0.1, max_continuous=2).calibrate(profile)
    assert schedule.measured["expected_steps"] == "CCCCC..C."
    assert schedule.measured["computed_steps"] == 2
    assert schedule.measured["beyond_lags"] == 0
    second = TWO_BLOCKS.blocks[1].macs
    assert schedule.macs_fraction() == pytest.approx(1 - 3 / 5 * second / TWO_BLOCKS.macs, abs=1e-4)


def test_the_threshold_reaches_the_target_and_a_clearly_smaller_one_does_not() -> None:
    profile = measured(random_walks())
    schedule = FirstBlock(target_speedup=1.2).calibrate(profile)
    policy = schedule.policy
    assert isinstance(policy, FirstBlockPolicy)
    assert 1 / schedule.macs_fraction() >= 1.2 - 1e-3

    def speedup(threshold: float) -> float:
        computed, _ = simulate_first_block(FirstBlockPolicy(threshold), profile.first_block_change(1))
        return 1 / macs_fraction(policy, TWO_BLOCKS, float(computed.mean()))

    assert speedup(policy.threshold) >= 1.2
    assert speedup(policy.threshold * 0.999) < 1.2


def test_the_schedule_says_what_to_expect_of_the_blocks_behind_the_first() -> None:
    schedule = FirstBlock(0.25).calibrate(measured([[[8, 9, 10, 11, 12, 13, 15, 17, 17]]] * 3))
    assert schedule.table() == {
        "0.attn": "C" * 9,
        "0.mlp": "C" * 9,
        "1.attn": "CSCSSCSCS",
        "1.mlp": "CSCSSCSCS",
    }
    assert schedule.measured["computed_steps"] == 4
    second = TWO_BLOCKS.blocks[1].macs
    assert schedule.macs_fraction() == pytest.approx(1 - 5 / 9 * second / TWO_BLOCKS.macs, abs=1e-4)
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_frozen_it_is_a_plan_of_the_blocks_behind_the_first() -> None:
    walks = random_walks(runs=5)
    residuals = np.random.default_rng(1).normal(size=(5, STEPS, 7))
    profile = measured(walks)
    output = np.ones((5, 1, STEPS, 2))
    arrays = {**profile.arrays, "body/gram": residuals @ residuals.swapaxes(1, 2), "teacache/output": output}
    profile = Profile(profile.provenance, profile.runs, arrays)
    adaptive = FirstBlock(0.2).calibrate(profile)
    frozen = freeze(adaptive, profile)
    assert frozen.plan is not None
    assert {rule.blocks for rule in frozen.plan.rules} == {"1"}
    assert frozen.table() == adaptive.table()  # both by the majority
    assert frozen.table()["0.mlp"] == "C" * STEPS


def test_what_a_speed_up_cannot_reach_is_refused_with_the_highest() -> None:
    with pytest.raises(CalibrationError, match=r"first-block: a speed-up of 9 cannot be reached in 9 .* it is 1\.\d\d"):
        FirstBlock(target_speedup=9).calibrate(measured(random_walks()))


def test_what_the_profile_does_not_hold_is_refused() -> None:
    without = profile_of(TWO_BLOCKS, {"delta/cosine": np.ones((1, 1, 4, 2))}, steps=4)
    with pytest.raises(ProfileError, match=r"it has those of none; profile again with --first-blocks 1"):
        FirstBlock(0.1).calibrate(without)
    with pytest.raises(CalibrationError, match=r"the first 2 blocks .* take a first of 1 to 1"):
        FirstBlock(0.1, first=2).calibrate(measured(random_walks()))
    with pytest.raises(CalibrationError, match="no run that did not fail"):
        FirstBlock(0.1).calibrate(measured(np.empty((0, 1, STEPS))))


def test_without_a_profile_it_takes_a_threshold_and_foresees_nothing() -> None:
    schedule = FirstBlock(0.1, first=2, last=1).schedule(anatomy_of(flux), Target(), 4)
    assert not schedule.foreseen
    assert set(schedule.table().values()) == {"CCCC"}
    with pytest.raises(CalibrationError, match="takes a profile"):
        FirstBlock(target_speedup=1.5).schedule(anatomy_of(flux), Target(), 4)
    with pytest.raises(CalibrationError, match="one segment"):
        FirstBlock(0.1, first=4).schedule(anatomy_of(flux), Target(), 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"threshold": 0.1, "target_speedup": 2.0},
        {"threshold": float("nan")},
        {"threshold": -1.0},
        {"target_speedup": 0.5},
        {"target_speedup": float("inf")},
        {"target_speedup": float("nan")},
        {"threshold": 0.1, "first": 0},
        {"threshold": 0.1, "last": -1},
        {"threshold": 0.1, "max_continuous": 0},
        {"threshold": 0.1, "warm_up": 0},
        {"threshold": 0.1, "at_threshold": "skip"},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="first-block"):
        FirstBlock(**wrong)


class Drifting(DDIMScheduler):  # type: ignore[misc]
    """A sampler that goes its way whatever the model says, so that a skip changes no later step's signal."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **_: Any) -> Any:
        super().step(model_output, timestep, sample)
        return SimpleNamespace(prev_sample=0.9 * sample + 0.3 * sample.roll(1, -1))


@pytest.mark.parametrize("first", [1, 2])
def test_a_tiny_model_computes_the_steps_that_were_simulated(first: int, tmp_path: Path) -> None:
    pipe, sampling = pipeline_of(dit), Sampling(steps=STEPS)
    pipe.scheduler = Drifting()
    path = tmp_path / "p.h5"
    profile_pipeline(pipe, "tiny", path, ["1"], sampling=sampling, first_blocks=(1, 2), progress=False)
    profile = storage.load(path)
    known = profile.first_block_change(first)  # (runs, contexts, steps, lags)
    seen = set()
    for threshold in np.nanquantile(known, (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)) * 1.0001:
        for most in (None, 2):
            schedule = FirstBlock(float(threshold), first=first, last=1, max_continuous=most).calibrate(profile)
            with apply(pipe, schedule) as cache:
                sample(pipe, ["1"], [0], sampling)
            assert list(cache.stats.steps.values()) == [schedule.measured["expected_steps"]]
            assert cache.stats.macs_fraction == pytest.approx(schedule.macs_fraction(), abs=1e-3)
            seen |= set(cache.stats.steps.values())
    assert len(seen) >= 6
