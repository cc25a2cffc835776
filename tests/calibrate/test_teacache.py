from dataclasses import replace

import numpy as np
import pytest

from dicache.calibrate import CalibrationError
from dicache.calibrate.rescale import fit_rescale
from dicache.calibrate.simulating import simulate
from dicache.calibrate.teacache import TeaCache
from dicache.profiler import Profile, Provenance, Run
from dicache.schedules import Target, TeaCachePolicy
from tests.calibrate.test_fora import TWO_BLOCKS

STEPS = 11


def profile_of(x: np.ndarray, y: np.ndarray) -> Profile:
    """Return a profile whose relative changes are x and y, shape (runs, 1, steps - 1)."""
    runs, contexts, changes = x.shape

    def pairs(ratio: np.ndarray) -> np.ndarray:
        out = np.full((runs, contexts, changes + 1, 2), np.nan)
        out[:, :, 1:, 0], out[:, :, 1:, 1] = ratio * 2.0, 2.0
        return out

    provenance = Provenance(
        "toy", TWO_BLOCKS, Target(num_inference_steps=changes + 1), {"guidance": 4.0}, {}, 1, ("0",), (2,)
    )
    arrays = {"delta/cosine": np.full((runs, contexts, changes + 1, 2), 1.0), "teacache/input": pairs(x)}
    arrays |= {f"teacache/{name}": pairs(y) for name in ("residual", "body", "output")}
    return Profile(provenance, tuple(Run(str(i), i) for i in range(runs)), arrays)


def changes(runs: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.02, 0.3, size=(runs, 1, STEPS - 1))


def test_a_polynomial_is_found_again() -> None:
    x = changes()
    want = np.array([3.0, -2.0, 0.5, 1.0, 0.01])
    fit = fit_rescale(x, np.polyval(want, x))
    assert fit.coefficients == pytest.approx(want, rel=1e-6, abs=1e-9)
    assert fit.input_range == (x.min(), x.max())
    assert fit.pairs == x.size
    assert fit.held_out_r2 == pytest.approx(1.0, abs=1e-3)


def test_an_output_that_has_nothing_to_do_with_the_input_has_no_held_out_quality() -> None:
    y = np.random.default_rng(1).uniform(0.1, 0.2, size=changes().shape)
    assert fit_rescale(changes(), y).held_out_r2 < 0.1


def test_steps_without_a_value_are_left_out_of_the_fit() -> None:
    x = changes()
    y = 2 * x
    x[0, 0, 3] = np.nan
    assert fit_rescale(x, y, degree=1).pairs == x.size - 1


def test_too_little_to_fit_on_is_refused() -> None:
    x = changes(runs=1)
    with pytest.raises(CalibrationError, match="found 1 run"):
        fit_rescale(x, x)
    with pytest.raises(CalibrationError, match="found 4 pairs, needed more than the 5"):
        fit_rescale(changes()[:2, :, :2], changes()[:2, :, :2])
    with pytest.raises(
        CalibrationError, match="found 3 pairs in the runs that a fit is not judged on, needed at least"
    ):
        fit_rescale(changes()[:2, :, :3], changes()[:2, :, :3])
    with pytest.raises(CalibrationError, match="same amount"):
        fit_rescale(np.full((4, 1, 10), 0.1), changes(4))


def test_the_simulated_rule_is_the_papers() -> None:
    policy = TeaCachePolicy(0.25, (1.0, 0.0), (0.0, 1.0))
    x = np.full((1, 1, 7), 0.1)
    # Sums of 0.1: at 0.1 and 0.2 it is reused, at 0.3 computed and begun again; first and last are always computed.
    assert "".join("C" if c else "." for c in simulate(policy, x)[0, 0]) == "C..C..CC"


def test_the_threshold_reaches_the_target_and_a_smaller_one_does_not() -> None:
    x = changes()
    profile = profile_of(x, 2 * x)
    rescale = fit_rescale(x, 2 * x)
    threshold = TeaCache(target_speedup=1.4).calibrate(profile).measured["threshold"]

    def speedup(value: float) -> float:
        computed = simulate(TeaCachePolicy(value, rescale.coefficients, rescale.input_range), x).mean()
        return float(1 / (1 - (1 - computed) * 11 / 15))  # all but 4 of 15: the first block's modulation runs

    assert speedup(threshold) >= 1.4
    assert speedup(threshold * 0.98) < 1.4


def test_a_speed_up_that_no_threshold_reaches_is_refused_with_the_highest() -> None:
    x = changes()
    with pytest.raises(CalibrationError, match=r"speed-up of 9 cannot be reached in 11 steps; .* it is 2.50"):
        TeaCache(target_speedup=9).calibrate(profile_of(x, x))


def test_the_schedule_says_what_it_expects_and_how_good_the_fit_is() -> None:
    x = changes()
    schedule = TeaCache(threshold=0.0).calibrate(profile_of(x, x))
    assert schedule.adaptive
    assert schedule.table()["0.attn"] == "C" * STEPS
    assert schedule.macs_fraction() == 1.0
    schedule = TeaCache(threshold=100.0).calibrate(profile_of(x, x))
    assert schedule.table()["1.mlp"] == "C" + "S" * (STEPS - 2) + "C"
    assert schedule.measured["computed_steps"] == 2
    assert schedule.measured["fit"]["held_out_r2"] > 0.99


def test_wrong_settings_are_refused() -> None:
    for wrong in (
        {},
        {"threshold": 0.1, "target_speedup": 2.0},
        {"threshold": float("nan")},
        {"threshold": -1.0},
        {"target_speedup": 0.5},
        {"threshold": 0.1, "degree": 0},
        {"threshold": 0.1, "fit_to": "nothing"},
        {"threshold": 0.1, "foretell": "stars"},
        {"threshold": 0.1, "negative": "zero"},
    ):
        with pytest.raises(CalibrationError, match="teacache"):
            TeaCache(**wrong)


def test_failed_runs_are_not_counted() -> None:
    profile = profile_of(changes(), changes())
    runs = (*profile.runs, Run("9", 9, "failed at step 1 in 0.mlp"))
    schedule = TeaCache(threshold=0.1).calibrate(replace(profile, runs=runs))
    assert schedule.measured["runs"] == 8


def test_the_median_of_each_step_foretells_what_depends_on_the_step_alone() -> None:
    x = changes()
    y = np.broadcast_to(np.linspace(0.1, 0.4, STEPS - 1), x.shape)
    fit = fit_rescale(x, y)
    assert fit.per_step_r2 == pytest.approx(1.0)
    assert fit.held_out_r2 < 0.2


def test_foretold_from_the_steps_it_is_a_plan() -> None:
    x = changes()
    y = np.full(x.shape, 0.1)
    y[:, :, 5:] = 0.3
    schedule = TeaCache(threshold=0.25, foretell="steps").calibrate(profile_of(x, y))
    assert not schedule.adaptive
    # Sums: steps 1 and 2 reach 0.2, step 3 passes 0.25; the same again; from step 6 on every step passes it alone.
    assert schedule.table()["0.attn"] == "CSSCSSCCCCC"
    target = TeaCache(target_speedup=1.3, foretell="steps").calibrate(profile_of(x, y))
    assert 1 / target.macs_fraction() >= 1.3


def test_where_the_polynomial_falls_or_is_negative_is_told() -> None:
    x = changes(runs=16)
    fit = fit_rescale(x, (x - 0.16) ** 2 - 0.005, degree=2)
    assert fit.falling_share == pytest.approx(0.5, abs=0.05)
    assert fit.negative_share == pytest.approx(2 * 0.005**0.5 / 0.28, abs=0.05)
    assert fit_rescale(x, x, degree=1).falling_share == 0


def test_a_fit_is_judged_on_what_it_did_not_see_by_what_the_policy_makes_of_it() -> None:
    x = changes(runs=16)
    y = x - 0.16  # no relative change is negative, but what a fit foretells may be
    by = {negative: fit_rescale(x, y, degree=1, negative=negative) for negative in ("clamp", "abs", "reference")}
    share = float((x < 0.16).mean())
    for fit in by.values():
        assert fit.held_out_negative_share == pytest.approx(share, abs=0.01)
        assert fit.held_out_falling_share == 0
    assert by["reference"].held_out_rmse == pytest.approx(0, abs=1e-9)
    assert by["clamp"].held_out_rmse == pytest.approx(np.sqrt((np.minimum(y, 0) ** 2).mean()), rel=1e-3)
    assert by["abs"].held_out_rmse == pytest.approx(2 * by["clamp"].held_out_rmse, rel=1e-3)
    assert fit_rescale(x, -x, degree=1).held_out_falling_share == 1


def test_what_lies_outside_the_range_of_the_other_runs_is_counted() -> None:
    x = np.tile(np.linspace(0.1, 0.2, STEPS - 1), (4, 1, 1))
    x[0, 0, 0], x[0, 0, 1] = 0.05, 0.3
    assert fit_rescale(x, x, degree=1).held_out_outside_share == pytest.approx(2 / x.size)


def test_what_becomes_of_a_negative_value_is_in_the_schedule_and_in_its_threshold() -> None:
    x = changes()
    y = 4 * (x - 0.1)
    kept, lowered = (
        TeaCache(target_speedup=1.4, degree=1, negative=negative).calibrate(profile_of(x, y))
        for negative in ("abs", "reference")
    )
    assert kept.settings["negative"] == "abs"
    assert isinstance(kept.policy, TeaCachePolicy)
    assert isinstance(lowered.policy, TeaCachePolicy)
    assert (kept.policy.negative, lowered.policy.negative) == ("abs", "reference")
    assert lowered.policy.threshold < kept.policy.threshold
    for schedule in (kept, lowered):
        assert 1 / schedule.macs_fraction() >= 1.4
    fit = kept.measured["fit"]
    assert {"held_out_r2", "held_out_rmse", "per_step_r2", "per_step_rmse", "input_range"} <= set(fit)
    assert {f"held_out_{what}_share" for what in ("outside", "negative", "falling")} <= set(fit)
