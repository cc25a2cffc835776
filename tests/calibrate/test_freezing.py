from dataclasses import replace

import numpy as np
import pytest

from dicache.calibrate import CalibrationError
from dicache.calibrate.freezing import freeze
from dicache.calibrate.simulating import simulate
from dicache.profiler import Profile
from dicache.schedules import Plan, Schedule, TeaCachePolicy
from tests.calibrate.test_teacache import STEPS, changes, profile_of

POLICY = TeaCachePolicy(0.25, (1.0, 0.0), (0.0, 1.0))


def adaptive(profile: Profile, policy: TeaCachePolicy = POLICY) -> Schedule:
    target = profile.provenance.target
    return Schedule("teacache", {"threshold": 0.25}, profile.anatomy, target, STEPS, policy=policy)


def measured(x: np.ndarray, residuals: np.ndarray | None = None) -> Profile:
    """Return a profile of these changes, and of residuals, shape (runs, steps, numbers)."""
    profile = profile_of(x, x)
    if residuals is None:
        residuals = np.random.default_rng(0).normal(size=(len(x), STEPS, 7))
    return replace(profile, arrays={**profile.arrays, "body/gram": residuals @ residuals.swapaxes(1, 2)})


def test_runs_that_decide_alike_are_frozen_exactly() -> None:
    profile = measured(np.repeat(changes(runs=1), 5, axis=0))
    frozen = freeze(adaptive(profile), profile)
    decided = "".join("C" if each else "." for each in simulate(POLICY, profile.relative_l1("input"))[0, 0])
    assert frozen.plan is not None
    assert [rule.steps for rule in frozen.plan.rules] == [decided]
    assert not frozen.adaptive
    assert frozen.measured["agreement"] == [1.0] * STEPS
    assert frozen.measured["residual_error"] == frozen.measured["adaptive_residual_error"]
    assert freeze(adaptive(profile), profile, "any").plan == frozen.plan


def test_the_majority_decides_and_any_computes_more() -> None:
    profile = measured(changes(runs=9))
    share = simulate(POLICY, profile.relative_l1("input")).mean(axis=(0, 1))
    votes = {vote: freeze(adaptive(profile), profile, vote) for vote in ("majority", "any")}
    for vote, most in (("majority", share >= 0.5), ("any", share > 0)):
        plan = votes[vote].plan
        assert plan is not None
        assert plan.computed_steps == tuple(np.flatnonzero(most).tolist())
    assert votes["majority"].measured["agreement"] == pytest.approx(np.maximum(share, 1 - share), abs=1e-4)
    assert votes["any"].macs_fraction() > votes["majority"].macs_fraction()


def test_the_typical_run_is_taken_whole() -> None:
    profile = measured(changes(runs=9))
    decided = simulate(POLICY, profile.relative_l1("input"))[:, 0]
    plan = freeze(adaptive(profile), profile, "typical").plan
    assert plan is not None
    [run] = {place for place, row in enumerate(decided) if tuple(np.flatnonzero(row).tolist()) == plan.computed_steps}
    agreement = [float((decided == row).mean()) for row in decided]
    assert agreement[run] == max(agreement)
    assert (decided.mean(axis=0) >= 0.5).tolist() != decided[run].tolist()  # which is not what the majority does


def test_guidance_passes_that_decide_differently_are_frozen_apart() -> None:
    x = np.repeat(changes(runs=1), 2, axis=1)
    x[:, 1] *= 0.3
    profile = measured(x)
    profile = replace(profile, provenance=replace(profile.provenance, contexts=("cond", "uncond"), parts=(1, 1)))
    plan = freeze(adaptive(profile), profile).plan
    assert plan is not None
    assert plan.contexts == ("cond", "uncond")
    rows = {rule.context: rule.steps for rule in plan.rules}
    assert rows["uncond"].count("C") < rows["cond"].count("C")


def test_the_error_is_the_relative_change_of_the_residual_that_stands_in() -> None:
    residuals = np.cumsum(np.random.default_rng(1).normal(size=(1, STEPS, 5)), axis=1)
    profile = measured(np.full((1, 1, STEPS - 1), 0.1), residuals)
    frozen = freeze(adaptive(profile), profile)
    assert frozen.plan is not None
    (rule,) = frozen.plan.rules
    assert rule.steps == "C..C..C..CC"  # 0.1 and 0.2 are below 0.25, and the last step is computed
    r = residuals[0]
    errors = [np.linalg.norm(r[i] - r[i - i % 3]) / np.linalg.norm(r[i]) for i in (1, 2, 4, 5, 7, 8)]
    assert frozen.measured["residual_error"] == pytest.approx(np.mean(errors), abs=1e-5)


def test_what_cannot_be_frozen_is_refused() -> None:
    profile = measured(changes())
    planned = replace(adaptive(profile), policy=None, plan=Plan(STEPS))
    with pytest.raises(CalibrationError, match="decides nothing at run time"):
        freeze(planned, profile)
    other = replace(
        profile, provenance=replace(profile.provenance, target=replace(profile.provenance.target, dtype="x"))
    )
    bound = replace(adaptive(profile), target=replace(profile.provenance.target, dtype="float32"))
    with pytest.raises(CalibrationError, match=r"float32.*found.*x.*profile the model"):
        freeze(bound, other)
    with pytest.raises(CalibrationError, match="one of majority, any, typical, found 'most'"):
        freeze(adaptive(profile), profile, "most")  # type: ignore[arg-type]
    empty = {name: array[:0] for name, array in profile.arrays.items()}
    with pytest.raises(CalibrationError, match="no run that did not fail"):
        freeze(adaptive(profile), replace(profile, arrays=empty))
