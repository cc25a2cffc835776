"""Forecasts: weighted sums of the outputs computed last, with the weights in the file."""

import json
import math
from typing import Any

import pytest

from dicache import Schedule
from dicache.schedules import Plan, PlanError, Rows, Rule, Target
from dicache.schedules.plan import Weights
from tests.toys import written

ONE = written(1)
LETTERS = "C.C..C"
WEIGHTS: dict[int, Weights] = {1: ((0, 0.5),), 3: ((2, 1.75), (0, -0.75)), 4: ((2, 2.0), (0, -1.0))}
RULE = Rule("skip", LETTERS, predictor="forecast", weights=WEIGHTS)
KEY = (0, 1)


def schedule(*rules: Rule) -> Schedule:
    return Schedule("auto", {}, ONE, Target("Toy"), 6, plan=Plan(6, rules))


def test_a_forecast_is_written_as_an_object_of_steps_and_read_again() -> None:
    content = json.loads(json.dumps(RULE.to_json()))
    assert content["weights"]["3"] == {"2": 1.75, "0": -0.75}
    assert Rule.from_json(content) == RULE
    made = schedule(RULE)
    assert Schedule.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_forecast_weighs_the_last_output_and_the_differences_between_those_before() -> None:
    rows = [Rows(Plan(6, (RULE,)), ONE).row(step) for step in range(6)]
    assert (rows[1].predict, rows[1].scale) == ((), ((KEY, 0.5),))
    assert (rows[3].predict, rows[3].scale) == (((KEY, (0.75,)),), ())  # 1.75 a - 0.75 b = a + 0.75 (a - b)
    assert [dict(row.keep_older).get(KEY, 0) for row in rows] == [0, 0, 1, 0, 0, 0]
    assert rows[4].release_delta == (KEY,)


def test_a_pass_that_began_later_takes_a_taylor_expansion_of_what_it_has() -> None:
    rows = Rows(Plan(6, (RULE,)), ONE)
    assert rows.row(3, since=2).predict == () == rows.row(3, since=2).scale  # only step 2 is kept: it is held
    assert dict(rows.row(4, since=1).predict)[KEY] == (2.0,)  # of steps 2 and 1, and not with the weights of 2 and 0


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ({1: ((0, 1.0),), 3: ((2, 1.0),)}, "has no weights for step 4"),
        ({**WEIGHTS, 5: ((2, 1.0),)}, "has unwanted weights for step 5"),
        ({**WEIGHTS, 4: ((3, 1.0),)}, "at which the rule does not act"),
        ({**WEIGHTS, 4: ((0, 1.0), (2, 1.0))}, "the last one first"),
        ({**WEIGHTS, 4: ()}, "1 to 5 steps"),
        ({**WEIGHTS, 4: ((5, 1.0),)}, "must be of steps before it"),
        ({**WEIGHTS, 4: ((2, math.nan),)}, "must be finite"),
    ],
)
def test_weights_that_fit_no_forecast_are_refused(weights: dict[int, Weights], found: str) -> None:
    with pytest.raises(PlanError, match=found):
        Rule("skip", LETTERS, predictor="forecast", weights=weights)


def test_other_predictors_have_no_weights() -> None:
    with pytest.raises(PlanError, match="predictor hold has unwanted weights for step 1"):
        Rule("skip", LETTERS, weights=WEIGHTS)


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ({"1": 0.5}, "must be an object of a number for each step"),
        ({"1": {"0": "half"}}, "must be an object of a number"),
        ({"1": {"0": True}}, "must be an object of a number"),
        ({"1": {"last": 0.5}}, "must be named by steps"),
        ([], "weights must be of type Mapping"),
    ],
)
def test_a_file_with_other_weights_is_refused(weights: Any, found: str) -> None:
    content = {"action": "skip", "steps": "C.CCCC", "predictor": "forecast", "weights": weights}
    with pytest.raises(PlanError, match=found):
        Rule.from_json(content)


def test_a_forecast_of_others_than_those_computed_last_is_refused() -> None:
    other = Rule("skip", LETTERS, predictor="forecast", weights={**WEIGHTS, 3: ((0, 1.0),)})
    with pytest.raises(PlanError, match=r"of steps \[0\], but those computed last are \[2\]"):
        schedule(other)


def test_a_forecast_of_a_step_that_another_rule_leaves_out_is_refused() -> None:
    plan = Plan(6, (RULE, Rule("skip", "CC.CCC", blocks="0")))
    with pytest.raises(PlanError, match=r"of steps \[2, 0\], but those computed last are \[0\]"):
        Schedule("auto", {}, written(2), Target("Toy"), 6, plan=plan)


def test_two_rules_with_other_weights_contradict_each_other() -> None:
    other = Rule("skip", LETTERS, predictor="forecast", weights={**WEIGHTS, 1: ((0, 0.25),)})
    with pytest.raises(PlanError, match=r"two rules predict blocks .* at step 1: forecast with weights 0.5 and"):
        schedule(RULE, other)


def test_at_another_number_of_steps_a_taylor_expansion_takes_the_place_of_a_forecast() -> None:
    levels = (3.0, 2.0, 1.0, 0.0, -1.0, -2.0)
    made = Schedule("auto", {}, ONE, Target("Toy", noise_levels=levels), 6, plan=Plan(6, (RULE,)))
    plan = made.resampled(tuple(x / 2 for x in range(6, -6, -1)), 12).plan
    assert plan is not None
    assert [(rule.predictor, rule.order, rule.weights) for rule in plan.rules] == [("taylor", 1, {})]
