"""What differs between two schedules."""

import json
from dataclasses import replace
from typing import Any

import pytest

from dicache.schedules import Plan, Rule, Schedule, Target, TeaCachePolicy
from dicache.schedules.comparing import compare, in_words
from tests.toys import written


def planned(*rules: Rule, blocks: int = 2, **fields: Any) -> Schedule:
    steps = len(rules[0].steps) if rules else 4
    return replace(Schedule("test", {}, written(blocks), Target(), steps, Plan(steps, rules)), **fields)


def adaptive(threshold: float, **measured: Any) -> Schedule:
    policy = TeaCachePolicy(threshold, (1.0, 0.0), (0.0, 1.0))
    return Schedule("teacache", {}, written(2), Target(), 4, policy=policy, measured=measured)


@pytest.mark.parametrize("schedule", [planned(Rule("reuse", "C.C.")), adaptive(0.1), adaptive(0.1, macs_fraction=0.5)])
def test_a_schedule_and_itself_say_the_same(schedule: Schedule) -> None:
    found = compare(schedule, schedule)
    assert found.equal
    said = found.to_json()
    assert said["equal"] is True
    assert not any(said[key] for key in ("settings", "made_for", "policy", "plan", "measured", "anatomy", "sites"))


def test_settings_that_are_not_from_a_file_are_compared_as_the_file_has_them() -> None:
    written_down = planned(settings={"branches": ["mlp"]})
    assert compare(planned(settings={"branches": ("mlp",)}), written_down).equal


def test_what_differs_stands_under_its_section_with_none_for_what_is_not_there() -> None:
    a = planned(settings={"interval": 2, "anchor": "end"}, target=Target(dtype="float32", scheduler="DDIMScheduler"))
    b = planned(settings={"interval": 3, "anchor": "end"}, target=Target(scheduler="PNDMScheduler"), method="other")
    found = compare(a, b)
    assert not found.equal
    assert found.method == ("test", "other")
    assert found.sections["settings"] == {"interval": (2, 3)}
    assert found.sections["made_for"] == {"dtype": ("float32", None), "scheduler": ("DDIMScheduler", "PNDMScheduler")}
    assert not found.sites


def test_sites_are_those_whose_letters_differ() -> None:
    found = compare(planned(Rule("reuse", "C.C.")), planned(Rule("reuse", "C.CC"), Rule("reuse", "C.C.", "0", "mlp")))
    assert found.sites == dict.fromkeys(("0.attn", "1.attn", "1.mlp"), ("CRCR", "CRCC"))
    assert found.macs_fraction == pytest.approx((1 - 4 * 90 / 1600, 1 - (2 * 90 + 60) / 1600))


def test_rules_that_are_written_differently_and_do_the_same_differ_in_the_plan_alone() -> None:
    found = compare(planned(Rule("reuse", "C.C.")), planned(Rule("reuse", "C.C.", "0"), Rule("reuse", "C.C.", "1")))
    assert not found.equal
    assert not found.sites
    assert list(found.sections["plan"]) == ["rules"]


def test_each_pass_with_rules_of_its_own_in_either_is_compared() -> None:
    found = compare(planned(Rule("reuse", "C.", context="uncond")), planned(Rule("reuse", "CC", context="cond")))
    assert not found.sites
    assert found.sites_by_context["cond"] == {}
    assert set(found.sites_by_context["uncond"].values()) == {("CR", "CC")}
    said = found.to_json()
    assert said["macs_fraction_by_context"] == {"cond": [1, 1], "uncond": [pytest.approx(1 - 180 / 800), 1]}
    assert said["sites_by_context"]["uncond"]["1.mlp"] == ["CR", "CC"]


def test_policies_are_compared_number_by_number_and_by_what_was_expected() -> None:
    found = compare(adaptive(0.1, expected_steps="C.CC"), adaptive(0.2, expected_steps="C..C"))
    assert found.sections["policy"] == {"threshold": (0.1, 0.2)}
    assert set(found.sites.values()) == {("CSCC", "CSSC")}


def test_a_policy_of_which_nothing_is_expected_is_not_compared_step_by_step() -> None:
    found = compare(planned(Rule("reuse", "C.C.")), adaptive(0.2))
    assert found.sites == {}
    assert "decided at run time" in found.not_compared


def test_other_models_are_said_and_the_rest_is_compared() -> None:
    a = planned(Rule("reuse", "C.C."), settings={"interval": 2})
    found = compare(a, planned(Rule("reuse", "C.C."), blocks=3, settings={"interval": 3}))
    assert {"blocks", "macs", "segments"} == found.sections["anatomy"].keys()
    assert found.not_compared == "the models have other blocks or branches"
    assert found.sections["settings"] == {"interval": (2, 3)}
    assert found.sites == {}


def test_a_share_that_is_not_known_is_null() -> None:
    uncounted = planned(anatomy=replace(written(2), macs=0))
    said = compare(uncounted, planned()).to_json()
    assert said["macs_fraction"] == [None, 1.0]
    json.dumps(said, allow_nan=False)


LONG = [float(n) for n in range(20)]


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        ((2, 3), "2 | 3"),
        ((None, "float32"), "- | float32"),
        (([1, 2], [1, 3]), "[1, 2] | [1, 3]"),
        ((LONG, None), "20 values | -"),
        ((LONG, LONG[:9]), "20 values | 9 values"),
        ((LONG, [*LONG[:3], 7.5, *LONG[4:-1], 0.0]), "2 of 20 values differ, the first at 3: 3.0 | 7.5"),
        (({"a": "x" * 50}, {}), "1 values | {}"),
        (("y" * 50, "z"), f"{'y' * 37}... | z"),
    ],
)
def test_two_values_are_written_in_a_line(pair: tuple[Any, Any], text: str) -> None:
    assert in_words(pair) == text
