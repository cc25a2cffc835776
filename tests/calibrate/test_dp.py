from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from dicache.anatomy import Site
from dicache.calibrate import CalibrationError
from dicache.calibrate.chains import step_costs
from dicache.calibrate.dp import Dp
from dicache.calibrate.gaps import gap_costs
from dicache.calibrate.methods import METHODS
from dicache.profiler import Profile
from dicache.schedules import Plan, Rule, Schedule
from dicache.schedules.predicting import taylor_coefficients
from tests.calibrate.profiled import profile
from tests.toys import written

TWO = written(2)  # sites 0.attn, 0.mlp, 1.attn, 1.mlp
STEPS = 9


def walk(seed: int, steps: int = STEPS, size: int = 5) -> np.ndarray:
    """Return outputs that change from step to step, (steps, size)."""
    return np.random.default_rng(seed).standard_normal((steps, size)).cumsum(axis=0)


def measured(*runs: np.ndarray) -> Profile:
    """Return a profile of runs, in which both kinds of branch have what the body has, the second at double size."""
    gram = np.stack([x @ x.T for x in runs])
    arrays = {"body/gram": gram, "body/branches": np.stack([gram, 4 * gram], axis=1)}
    return profile(TWO, arrays, steps=gram.shape[1])


def errors_of(x: np.ndarray, computed: Sequence[int], order: int) -> np.ndarray:
    """Return the relative error of each step, by making the predictions."""
    errors = np.zeros(len(x))
    for step in set(range(len(x))) - set(computed):
        known = [c for c in reversed(computed) if c < step][: order + 1]
        made = x[known[0]].copy()
        for c, newer, older in zip(taylor_coefficients(known, step), known, known[1:], strict=False):
            made += c * (x[newer] - x[older])
        errors[step] = np.linalg.norm(made - x[step]) / np.linalg.norm(x[step])
    return errors


def letters(schedule: Schedule) -> list[str]:
    assert schedule.plan is not None
    return [rule.steps for rule in schedule.plan.rules]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_products_give_the_error_that_predictions_make(order: int) -> None:
    x = walk(0)
    squares, norms = (gap_costs(x @ x.T, order, aggregate) for aggregate in ("squares", "norms"))
    for count in range(STEPS):
        for rest in combinations(range(1, STEPS), count):
            want = errors_of(x, (0, *rest), order)
            np.testing.assert_allclose(step_costs(norms, STEPS, order + 1, (0, *rest)), want, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                step_costs(squares, STEPS, order + 1, (0, *rest)), want**2, rtol=1e-9, atol=1e-12
            )


def test_the_error_of_a_step_can_be_weighed() -> None:
    x, weights = walk(1), np.arange(1.0, STEPS + 1)
    found = step_costs(gap_costs(x @ x.T, 1, "squares", weights), STEPS, 2, (0, 2, 5))
    np.testing.assert_allclose(found, weights * errors_of(x, (0, 2, 5), 1) ** 2, rtol=1e-9)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_schedule_is_the_best_of_all_with_so_many_steps(order: int) -> None:
    x = walk(2)
    schedule = Dp(steps_computed=4, order=order, warm_up=2, force_last=True).calibrate(measured(x))
    tried = [(0, 1, *rest, 8) for rest in combinations(range(2, 8), 1)]
    best = min(tried, key=lambda computed: errors_of(x, computed, order).sum())
    assert schedule.plan == Plan(
        STEPS, (Rule("skip", "".join("C" if i in best else "." for i in range(9)), predictor="taylor", order=order),)
    )
    np.testing.assert_allclose(schedule.measured["expected_errors"]["body"], errors_of(x, best, order), rtol=1e-6)
    assert schedule.measured["expected_error"] == pytest.approx(errors_of(x, best, order).sum())
    assert schedule.measured["computed_steps"] == {"body": 4}
    assert [count for count, _ in schedule.measured["front"]["body"]] == [3, 4, 5, 6, 7, 8, 9]
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_steps_that_do_not_change_need_no_computation() -> None:
    """Holding is exact where nothing changes, and a line is exact for an expansion of order 1."""
    jumps = np.repeat([1.0, 5.0, 2.0], [2, 3, 4])[:, None]
    assert letters(Dp(steps_computed=3, predictor="hold").calibrate(measured(jumps))) == ["C.C..C..."]
    line = np.stack([np.ones(STEPS), np.arange(STEPS)], axis=1)
    found = Dp(steps_computed=2, order=1).calibrate(measured(line))
    assert letters(found) == ["CC......."]
    assert found.measured["expected_error"] == pytest.approx(0, abs=1e-6)


def test_runs_count_as_one_batch() -> None:
    """What one run says of a large output outweighs what another says of a small one."""
    early = np.array([1.0, 100.0, 100.0, 100.0])[:, None]
    late = np.array([1.0, 1.0, 1.0, 2.0])[:, None]
    assert letters(Dp(steps_computed=2, predictor="hold").calibrate(measured(early, late))) == ["CC.."]


def test_a_share_of_the_macs_takes_as_many_steps_as_fit() -> None:
    """One more step computed is never worse: it can be the last one that is not."""
    found = measured(walk(3))
    assert Dp(max_macs=1.0).calibrate(found).plan == Plan(STEPS)
    for share in (0.9, 0.75, 0.6):
        schedule = Dp(max_macs=share).calibrate(found)
        (count,) = schedule.measured["computed_steps"].values()
        assert schedule.macs_fraction() <= share < Dp(steps_computed=count + 1).calibrate(found).macs_fraction()
        assert schedule.plan == Dp(steps_computed=count).calibrate(found).plan
    with pytest.raises(CalibrationError, match=r"0\.1 of the MACs cannot be reached.*least is 0\.\d+"):
        Dp(max_macs=0.1, warm_up=3).calibrate(found)


def test_each_kind_of_branch_has_its_own_chain_under_one_budget() -> None:
    x, y = walk(5), np.repeat([[1.0, 0], [0, 1]], [4, 5], axis=0)  # the second kind changes once
    grams = np.stack([x @ x.T, y @ y.T])[None]
    found = profile(TWO, {"body/gram": grams[:, 0], "body/branches": grams}, steps=STEPS)
    schedule = Dp(max_macs=0.7, predictor="hold", granularity="branch", together=False).calibrate(found)
    assert schedule.plan is not None
    attn, mlp = schedule.plan.rules
    assert (attn.action, attn.branch, mlp.branch, mlp.steps) == ("reuse", "attn", "mlp", "C...C....")
    assert schedule.macs_fraction() <= 0.7
    assert attn.steps.count("C") == schedule.measured["computed_steps"]["attn"] > 2
    same = Dp(steps_computed=4, granularity="branch", together=False).calibrate(found)
    assert [row.count("C") for row in letters(same)] == [4, 4]


@pytest.mark.parametrize("order", [0, 1])
def test_branches_share_the_chain_with_the_smallest_sum_of_errors(order: int) -> None:
    x, y = walk(7), walk(8)
    grams = np.stack([x @ x.T, y @ y.T])[None]
    found = profile(TWO, {"body/gram": grams[:, 0], "body/branches": grams}, steps=STEPS)
    schedule = Dp(steps_computed=4, order=order, granularity="branch").calibrate(found)
    tried = [(0, *rest) for rest in combinations(range(1, STEPS), 3)]
    best = min(tried, key=lambda computed: sum(errors_of(z, computed, order).sum() for z in (x, y)))
    row = "".join("C" if i in best else "." for i in range(STEPS))
    assert schedule.plan == Plan(STEPS, (Rule("reuse", row, predictor="taylor", order=order),))
    assert (
        schedule.plan == Dp(max_macs=schedule.macs_fraction(), order=order, granularity="branch").calibrate(found).plan
    )


def test_weights_say_which_steps_matter() -> None:
    weights = np.zeros(STEPS)
    weights[[4, 6]] = 1.0
    assert letters(Dp(steps_computed=3).calibrate(measured(walk(9)), weights)) == ["C...C.C.."]


def test_a_kind_of_branch_is_not_taken_for_those_with_a_name() -> None:
    sites = (Site("mlp", "ff", macs=200), Site("mlp.context", "ff_context", macs=100))
    block = replace(TWO.blocks[0], sites=sites)
    two = replace(TWO, blocks=(block,), segments=((0, 1),))
    grams = np.stack([walk(10) @ walk(10).T, walk(11) @ walk(11).T])[None]
    schedule = Dp(max_macs=0.6, granularity="branch", together=False).calibrate(
        profile(two, {"body/branches": grams}, steps=STEPS)
    )
    assert schedule.plan is not None
    assert [rule.branch for rule in schedule.plan.rules] == ["mlp.", "mlp.context"]
    table, counts = schedule.table(), schedule.measured["computed_steps"]
    assert {kind: table[f"0.{kind}"].count("C") for kind in counts} == counts


def test_what_cannot_be_planned_is_refused() -> None:
    gram = walk(6) @ walk(6).T
    for spoilt, said in ((3, "no products of the body at step 3"), (None, "no run that did not fail")):
        runs = np.stack([gram] * 2) if spoilt is not None else np.zeros((0, STEPS, STEPS))
        if spoilt is not None:
            runs[1, spoilt], runs[1, :, spoilt] = np.nan, np.nan
        with pytest.raises(CalibrationError, match=said):
            Dp(steps_computed=3).calibrate(profile(TWO, {"body/gram": runs}, steps=STEPS))
    with pytest.raises(CalibrationError, match="zero at a step"):
        Dp(steps_computed=3).calibrate(measured(np.arange(STEPS)[:, None].astype(float)))
    with pytest.raises(CalibrationError, match=r"2 of 9 steps cannot.*a largest gap of 3.*possible are 4 to 9"):
        Dp(steps_computed=2, warm_up=2, max_gap=3).calibrate(measured(walk(6)))
    with pytest.raises(CalibrationError, match="warm-up must be at most the 9 steps, found 10"):
        Dp(steps_computed=2, warm_up=10).calibrate(measured(walk(6)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "either the number of computed steps or the share"),
        ({"steps_computed": 3, "max_macs": 0.5}, "either the number of computed steps or the share"),
        ({"max_macs": 0.0}, "above 0 and at most 1, found 0.0"),
        ({"steps_computed": 3, "order": 3}, "order must be 0 to 2, found 3"),
        ({"steps_computed": 3, "predictor": "hold", "order": 1}, "order must be 0 with hold, found 1"),
        ({"steps_computed": 3, "granularity": "block"}, "granularity must be body or branch, found 'block'"),
        ({"steps_computed": 0, "predictor": "forecast"}, "number of computed steps must be 1 step or more, found 0"),
        ({"steps_computed": 3, "max_gap": 0}, "largest gap must be 1 step or more, found 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        METHODS["dp"](**settings)
