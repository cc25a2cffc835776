"""TeaCache's policy, by head."""

import json
import math
from typing import Any, get_args

import pytest

from dicache.schedules import PlanError, TeaCachePolicy
from dicache.schedules.policies import Negative, read_policy
from dicache.schedules.policies.teacache import Sum
from dicache.schedules.schema import schema_text


def policy(**settings: Any) -> TeaCachePolicy:
    """Return a policy whose polynomial is x itself."""
    given = {"threshold": 1.0, "coefficients": (1.0, 0.0), "input_range": (0.0, 10.0), **settings}
    return TeaCachePolicy(**given)


def decisions(of: TeaCachePolicy, changes: list[float]) -> str:
    """Return a letter for each step of a run with these changes between its steps."""
    memory = of.remember()
    return "".join(
        "C" if of.decide(step, len(changes) + 1, x, memory) else "." for step, x in enumerate([None, *changes])
    )


def after(of: TeaCachePolicy, step: int, x: float | None, accumulated: float) -> tuple[bool, float]:
    """Return whether step `step` of 9 is computed, and the sum after it."""
    memory = Sum(accumulated=accumulated)
    return of.decide(step, 9, x, memory), memory.accumulated


def test_changes_add_up_until_they_reach_the_threshold_and_start_again() -> None:
    assert after(policy(), 1, 0.25, 0.5) == (False, 0.75)
    assert after(policy(), 1, 0.5, 0.5) == (True, 0.0)  # at the threshold itself
    assert decisions(policy(), [0.5, 0.25, 0.25, 0.5, 0.5, 0.0]) == "C..C.CC"


def test_first_and_last_steps_are_computed_and_the_sum_starts_again() -> None:
    assert after(policy(), 0, 0.1, 0.7) == (True, 0.0)
    assert after(policy(), 8, 0.1, 0.7) == (True, 0.0)
    assert decisions(policy(), [0.0] * 5) == "C....C"
    assert decisions(policy(first_steps=3, last_steps=2), [0.0] * 7) == "CCC...CC"
    assert decisions(policy(last_steps=0), [0.0] * 3) == "C..."


def test_a_step_without_one_before_it_is_computed() -> None:
    assert after(policy(), 4, None, 0.7) == (True, 0.0)


def test_a_threshold_of_zero_computes_everything() -> None:
    assert decisions(policy(threshold=0.0), [0.0] * 5) == "CCCCCC"


def test_the_polynomial_has_its_highest_power_first() -> None:
    assert policy(coefficients=(2.0, 3.0, 4.0)).rescale(5.0) == 2 * 25 + 3 * 5 + 4


def test_a_change_outside_the_fitted_range_counts_as_its_end() -> None:
    of = policy(input_range=(0.25, 0.5))
    assert (of.rescale(0.0), of.rescale(0.375), of.rescale(9.0)) == (0.25, 0.375, 0.5)


def test_a_negative_prediction_counts_as_none() -> None:
    of = policy(coefficients=(1.0, -0.5))
    assert (of.rescale(0.25), of.rescale(0.75)) == (0.0, 0.25)
    assert after(of, 1, 0.25, 0.7) == (False, 0.7)  # the sum never falls


def test_the_magnitude_of_a_negative_prediction_can_count() -> None:
    of = policy(coefficients=(1.0, -0.5), input_range=(0.125, 1.0), negative="abs")
    assert (of.rescale(0.25), of.rescale(0.75)) == (0.25, 0.25)
    assert of.rescale(0.0) == 0.375  # the input is held in its range
    assert after(of, 1, 0.25, 0.75) == (True, 0.0)


def test_as_published_a_negative_prediction_lowers_the_sum_and_the_range_is_not_looked_at() -> None:
    of = policy(coefficients=(1.0, -0.5), input_range=(0.25, 0.75), negative="reference")
    assert (of.rescale(0.0), of.rescale(0.25), of.rescale(2.0)) == (-0.5, -0.25, 1.5)
    assert after(of, 1, 0.25, 0.75) == (False, 0.5)
    assert decisions(of, [0.0] * 20) == "C" + "." * 19 + "C"


@pytest.mark.parametrize("negative", ["clamp", "abs", "reference"])
def test_a_change_that_is_not_a_number_computes(negative: str) -> None:
    for coefficients in ((1.0, 0.0), (0.5,)):
        assert after(policy(coefficients=coefficients, negative=negative), 1, math.nan, 0.0) == (True, 0.0)
    assert after(policy(negative=negative), 1, math.inf, 0.0) == (True, 0.0)
    assert after(policy(coefficients=(-1.0, 0.0), negative="reference"), 1, math.inf, 0.0) == (True, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -0.1}, "the threshold must be 0 or more, found -0.1"),
        ({"threshold": math.nan}, "must be finite numbers"),
        ({"coefficients": (1.0, math.inf)}, "must be finite numbers"),
        ({"coefficients": ("1",)}, "must be finite numbers"),
        ({"coefficients": ()}, "the polynomial has no coefficients"),
        ({"input_range": (1.0, 0.5)}, "input_range must be a smallest and a largest value"),
        ({"input_range": (1.0, 2.0, 3.0)}, "input_range must be a smallest and a largest value"),
        ({"first_steps": 0}, "first_steps must be 1 or more"),
        ({"last_steps": -1}, "last_steps 0 or more"),
        ({"negative": "zero"}, "negative must be one of clamp, abs, reference, found 'zero'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        policy(**settings)


def test_a_policy_survives_being_written_and_read() -> None:
    of = policy(threshold=0.15, coefficients=(1.5, -2.0, 0.25), first_steps=2, last_steps=0, negative="abs")
    assert read_policy(of.to_json()) == of


def test_the_schema_knows_what_a_negative_prediction_may_add() -> None:
    known = json.loads(schema_text())["$defs"]["teacache"]["properties"]
    assert set(known) == set(policy().to_json())
    assert tuple(known["negative"]["enum"]) == get_args(Negative)


def test_a_policy_that_does_not_say_what_a_negative_prediction_adds_adds_nothing() -> None:
    content = policy().to_json()
    del content["negative"]
    assert read_policy(content) == policy(negative="clamp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "magic"}, "unknown policy .* known: .*teacache"),
        ({"colour": 1}, "unknown or missing key 'colour'"),
        ({"coefficients": None}, "cannot be read"),
        ({"input_range": [0.5]}, "teacache"),
        ({"input_range": [0.5, 1.0, 2.0]}, "input_range must be a smallest and a largest value"),
        ({"first_steps": "two"}, "must be whole numbers, found 'two' and 1"),
        ({"last_steps": 1.5}, "must be whole numbers"),
        ({"first_steps": True}, "must be whole numbers"),
        ({"threshold": True}, "must be finite numbers"),
        ({"threshold": None}, "must be finite numbers"),
        ({"negative": None}, "negative must be one of"),
        ({"negative": ["abs"]}, "negative must be one of"),
    ],
)
def test_a_policy_that_is_not_written_as_one_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read_policy({**policy().to_json(), **change})


def test_a_policy_with_a_missing_key_is_refused() -> None:
    content = policy().to_json()
    del content["last_steps"]
    with pytest.raises(PlanError, match="unknown or missing key 'last_steps'"):
        read_policy(content)
