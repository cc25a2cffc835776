"""AdaCache's codebook, fitted to profiles."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from dicache import apply
from dicache.calibrate import CalibrationError
from dicache.calibrate.adacache import PRESETS, AdaCache
from dicache.calibrate.freezing import freeze
from dicache.calibrate.simulating import decisions
from dicache.models.sampling import Sampling, sample
from dicache.profiler import Profile, ProfileError, storage
from dicache.profiler.profiles import RATES
from dicache.profiler.profiling import profile_pipeline
from dicache.schedules import AdaCachePolicy, PlanError, Schedule
from tests.calibrate.profiled import profile
from tests.tiny import anatomy_of, dit, pipeline_of

STEPS, RUNS = 30, 6


def measured(speeds: np.ndarray, motions: np.ndarray | None = None) -> Profile:
    """Return a profile of runs whose residuals change by a share of a given size from step to step.

    Args:
        speeds: One a run.
        motions: Differences between frames, (runs, steps); None for images.
    """
    runs = len(speeds)
    wobble = np.random.default_rng(0).uniform(0.8, 1.2, size=(STEPS, 1, 3, RATES))  # of each step, whatever the run
    lags = np.arange(1, RATES + 1)
    diff = speeds[:, None, None, None, None, None] * lags * wobble
    for lag in lags:
        diff[:, :, :lag, ..., lag - 1] = np.nan
    residuals = np.cumsum(np.random.default_rng(1).normal(size=(runs, STEPS, 40)), axis=1) + 30
    between = np.full((runs, 1, STEPS, 1, 3), np.nan)
    if motions is not None:
        between[:] = motions[:, None, :, None, None]
    arrays = {
        "motion/diff_l1": diff,
        "motion/abs_l1": np.ones((runs, 1, STEPS, 1, 3)),
        "motion/between_frames": between,
        "body/gram": residuals @ residuals.swapaxes(1, 2),
        "teacache/output": np.ones((runs, 1, STEPS, 2)),
    }
    plain = profile(anatomy_of(dit), arrays, steps=STEPS)
    return replace(plain, provenance=replace(plain.provenance, decision_blocks=(1,)))


def policy_of(schedule: Schedule) -> AdaCachePolicy:
    assert isinstance(schedule.policy, AdaCachePolicy)
    return schedule.policy


IMAGES = measured(np.linspace(0.05, 0.3, RUNS))
VIDEOS = measured(np.full(RUNS, 0.1), np.linspace(0.02, 0.12, RUNS)[:, None] * np.ones(STEPS))


def test_a_codebook_is_taken_as_it_is_and_simulated() -> None:
    schedule = AdaCache(codebook=((1.0, 4),)).calibrate(IMAGES)
    assert policy_of(schedule) == AdaCachePolicy(((1.0, 4),), (1,))
    assert schedule.measured["expected_steps"] == "CC...C...C...C...C...C...C..CC"
    assert (schedule.measured["computed_steps"], schedule.measured["most_steps"]) == (10, 10)
    saved = sum(block.macs for block in IMAGES.anatomy.blocks) / IMAGES.anatomy.macs
    assert schedule.macs_fraction() == pytest.approx(1 - 20 / 30 * saved, abs=1e-4)
    assert policy_of(AdaCache(preset="long").calibrate(IMAGES)).codebook == PRESETS["long"]


@pytest.mark.parametrize("target", [1.2, 1.5, 2.0])
@pytest.mark.parametrize("preset", ["fast", None])
def test_a_target_is_reached_by_scaling_all_limits_alike(target: float, preset: Any) -> None:
    schedule = AdaCache(preset=preset, target_speedup=target).calibrate(IMAGES)
    assert target <= 1 / schedule.macs_fraction() < 1.15 * target
    published = PRESETS[str(schedule.settings["preset"])]
    pairs = list(zip(policy_of(schedule).codebook, published, strict=True))
    assert len({round(limit / old, 6) for (limit, _), (old, _) in pairs}) == 1
    assert all(rate == old for (_, rate), (_, old) in pairs)
    assert schedule.measured["fewest_steps"] < schedule.measured["most_steps"]  # the runs differ in speed


def test_of_the_published_codebooks_that_which_errs_least_is_taken() -> None:
    target = 1.6
    each = {name: AdaCache(preset=name, target_speedup=target) for name in ("slow", "fast", "long")}
    errors = {name: settings.calibrate(IMAGES).measured["residual_error"] for name, settings in each.items()}
    best = AdaCache(target_speedup=target).calibrate(IMAGES)
    assert best.measured["residual_error"] == min(errors.values())
    assert errors[str(best.settings["preset"])] == min(errors.values())


def test_a_target_that_no_rate_reaches_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"a speed-up of 2.9 cannot be reached in 30 steps"):
        AdaCache(preset="slow", target_speedup=2.9).calibrate(IMAGES)
    assert AdaCache(target_speedup=2.9).calibrate(IMAGES).settings["preset"] in ("fast", "long")
    with pytest.raises(CalibrationError, match=r"a speed-up of 40 cannot be reached"):
        AdaCache(target_speedup=40).calibrate(IMAGES)


def test_runs_with_more_motion_get_more_steps() -> None:
    schedule = AdaCache(preset="fast", target_speedup=1.6).calibrate(VIDEOS)
    computed = decisions(policy_of(schedule), VIDEOS).sum(axis=-1)[:, 0]
    assert (np.diff(computed) >= 0).all()
    assert computed[-1] > computed[0] + 5
    plain = AdaCache(preset="fast", target_speedup=1.6, motion="none").calibrate(VIDEOS)
    assert policy_of(plain).motion is None
    assert np.ptp(decisions(policy_of(plain), VIDEOS).sum(axis=-1)) == 0  # they differ in motion alone


def test_motion_is_fitted_to_the_profile_and_can_be_the_published_one() -> None:
    motion = policy_of(AdaCache(preset="fast").calibrate(VIDEOS)).motion
    assert motion is not None
    assert motion.scale == pytest.approx(0.07)
    low, high = np.percentile(np.repeat(np.linspace(0.02, 0.12, RUNS), 24), [10, 90])
    assert (high / low) ** motion.power == pytest.approx(4, rel=1e-2)
    published = policy_of(AdaCache(preset="fast", motion="published").calibrate(VIDEOS)).motion
    assert published is not None
    assert (published.scale, published.power, published.gradient) == (0.385, 8, 10)
    narrow = measured(np.full(RUNS, 0.1), np.linspace(0.100, 0.101, RUNS)[:, None] * np.ones(STEPS))
    capped = policy_of(AdaCache(preset="fast").calibrate(narrow)).motion
    assert capped is not None
    assert capped.power == 8


def test_images_have_no_motion_and_the_schedule_says_so() -> None:
    schedule = AdaCache(preset="fast").calibrate(IMAGES)
    assert policy_of(schedule).motion is None
    assert schedule.measured["frames"] is False
    with pytest.raises(CalibrationError, match="motion cannot be fitted"):
        AdaCache(preset="fast").calibrate(measured(np.full(RUNS, 0.1), np.full((RUNS, STEPS), 0.1)))


def test_a_schedule_can_be_frozen() -> None:
    schedule = AdaCache(codebook=((1.0, 3),)).calibrate(IMAGES)
    frozen = freeze(schedule, IMAGES)
    assert frozen.plan is not None
    assert [rule.steps for rule in frozen.plan.rules] == [schedule.measured["expected_steps"]]
    assert frozen.measured["agreement"] == [1.0] * STEPS


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({}, CalibrationError, "a codebook, a preset or a target"),
        ({"codebook": ((1.0, 2),), "preset": "fast"}, CalibrationError, "either a codebook or a preset"),
        ({"preset": "quick"}, CalibrationError, "slow, fast, long, found 'quick'"),
        ({"target_speedup": 0.5}, CalibrationError, "1 or more"),
        ({"target_speedup": float("nan")}, CalibrationError, "1 or more"),
        ({"preset": "fast", "motion": "some"}, CalibrationError, "profile, published, none"),
        ({"preset": "fast", "decision_blocks": (3,)}, ProfileError, "--decision-blocks 3"),
        ({"codebook": ((0.2, 13), (0.3, 1))}, CalibrationError, "steps up to 12 apart were measured"),
        ({"codebook": ((0.2, 3), (0.1, 1))}, PlanError, "rise"),
        ({"preset": "fast", "branch": "mlp"}, ValueError, "mlp"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        AdaCache(**settings).calibrate(IMAGES)


def test_a_profile_without_decision_blocks_is_refused() -> None:
    old = replace(IMAGES, provenance=replace(IMAGES.provenance, decision_blocks=()))
    with pytest.raises(CalibrationError, match="profile again"):
        AdaCache(preset="fast").calibrate(old)


class Deaf(DDIMScheduler):  # type: ignore[misc] # diffusers does not type it
    """Goes from step to step whatever the model says, so that a cache changes nothing that it sees."""

    def step(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, **options: Any) -> Any:
        out = super().step(torch.zeros_like(sample), timestep, sample, **options)
        out.prev_sample = 0.995 * sample
        return out


@pytest.mark.parametrize("branch", ["attn", "rest", "block"])
def test_what_is_simulated_is_what_is_done(tmp_path: Path, branch: Any) -> None:
    pipe = pipeline_of(dit)
    pipe.scheduler = Deaf()
    sampling = Sampling(steps=24, guidance=4.0)
    conditions = ["1", "2", "3"]
    path = profile_pipeline(
        pipe, "tiny", tmp_path / "p.h5", conditions, sampling=sampling, decision_blocks=(1, 2), progress=False
    )
    measured = storage.load(path)
    schedule = AdaCache(preset="fast", target_speedup=1.7, branch=branch).calibrate(measured)
    foreseen = decisions(policy_of(schedule), measured)
    with apply(pipe, schedule) as cache:
        for run, condition in enumerate(conditions):
            sample(pipe, [condition], [run], sampling)
            want = "".join("C" if each else "." for each in foreseen[run, 0])
            assert list(cache.stats.steps.values()) == [want]
    assert 3 < foreseen.sum(axis=-1).mean() < 24
