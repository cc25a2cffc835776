"""Schedules: the table, the share of work, and what contradicts itself."""

import math
from dataclasses import replace
from typing import Any

import pytest

from dicache.schedules import Plan, PlanError, Rule, Schedule, ScheduleError, Target, TeaCachePolicy
from tests.toys import written

POLICY = TeaCachePolicy(0.1, (1.0, 0.0), (0.0, 1.0))


def schedule(*rules: Rule, **settings: Any) -> Schedule:
    """Return a schedule for two blocks; without rules it has a policy for four steps."""
    steps = len(rules[0].steps) if rules else 4
    plan = Plan(steps, rules) if rules else None
    policy = None if rules else POLICY
    return Schedule("test", {}, written(2), Target(), steps, plan, policy, **settings)


def test_a_schedule_has_a_plan_or_a_policy_and_not_both() -> None:
    with pytest.raises(ScheduleError, match="either a plan or a policy"):
        Schedule("test", {}, written(2), Target(), 2, Plan(2), POLICY)
    with pytest.raises(ScheduleError, match="either a plan or a policy"):
        Schedule("test", {}, written(2), Target(), 2)
    assert schedule().adaptive
    assert not schedule(Rule("reuse", "C.")).adaptive


def test_a_plan_of_another_length_is_refused() -> None:
    with pytest.raises(ScheduleError, match="the plan has 3 steps, the schedule 2"):
        Schedule("test", {}, written(2), Target(), 2, Plan(3))


def test_a_plan_that_does_not_fit_the_model_is_refused_when_the_schedule_is_made() -> None:
    with pytest.raises(PlanError, match="Toy has the blocks 0-1"):
        schedule(Rule("skip", "C.", blocks="0-2"))


def test_skips_that_overlap_in_one_guidance_pass_are_refused_when_the_schedule_is_made() -> None:
    with pytest.raises(PlanError, match="two rules skip block 1 at step 1"):
        schedule(Rule("skip", "C.", "0-1", context="uncond"), Rule("skip", "C.", "1", context="uncond"))


def test_the_table_of_a_policy_is_what_its_calibration_foresaw() -> None:
    assert set(schedule().table().values()) == {"CCCC"}
    assert set(schedule(measured={"expected_steps": "C.CC"}).table().values()) == {"CSCC"}


@pytest.mark.parametrize(
    ("rules", "fraction"),
    [  # a call is 400: two blocks of 100, each with an attention of 30 and an MLP of 60, and 200 around them
        ((Rule("reuse", "CC"),), 1.0),
        ((Rule("reuse", "C.", branch="attn"),), 1 - 2 * 30 / 800),
        ((Rule("reuse", "C.", branch="attn", blocks="1"),), 1 - 30 / 800),
        ((Rule("reuse", "C."),), 1 - 2 * (30 + 60) / 800),
        ((Rule("skip", "C."),), 1 - 200 / 800),
        ((Rule("skip", "C...", blocks="0"),), 1 - 3 * 100 / 1600),
        ((Rule("skip", "C.CC", blocks="0"), Rule("reuse", "C..C", branch="mlp")), 1 - (100 + 60 + 2 * 60) / 1600),
    ],
)
def test_the_share_of_work_is_one_less_what_reused_sites_and_skipped_blocks_save(
    rules: tuple[Rule, ...], fraction: float
) -> None:
    assert schedule(*rules).macs_fraction() == pytest.approx(fraction, abs=1e-12)


def test_the_share_of_work_of_a_policy_is_what_its_calibration_expected() -> None:
    assert schedule().macs_fraction() == 1
    assert schedule(measured={"macs_fraction": 0.4}).macs_fraction() == 0.4


def test_the_share_of_work_of_a_model_without_counts_is_not_known() -> None:
    uncounted = replace(written(2), macs=0)
    assert math.isnan(Schedule("test", {}, uncounted, Target(), 2, Plan(2)).macs_fraction())


def test_a_target_names_what_it_does_not_bind() -> None:
    assert Target().unbound() == (
        "weights",
        "dtype",
        "latents",
        "scheduler",
        "num_inference_steps",
        "timesteps",
        "noise_levels",
        "guidance",
    )
    assert Target(dtype="float32", latents=(4, 8, 8)).unbound() == (
        "weights",
        "scheduler",
        "num_inference_steps",
        "timesteps",
        "noise_levels",
        "guidance",
    )


def test_every_field_that_is_given_and_differs_is_a_sentence() -> None:
    target = Target(
        "abc", "float32", (4, 8, 8), "DDIMScheduler", 4, (750.0, 500.0, 250.0, 0.0), (3.0, 2.0, 1.0, 0.0), 4.0
    )
    said = target.differences(
        weights="def",
        dtype="float16",
        latents=(4, 16, 16),
        scheduler="PNDMScheduler",
        num_inference_steps=5,
        timesteps=(750.0, 500.0, 200.0, 0.0),
        noise_levels=(3.0, 2.5, 1.0, 0.0),
        guidance=7.5,
    )
    assert said == [
        "weights abc, found def",
        "dtype float32, found float16",
        "latents (4, 8, 8), found (4, 16, 16)",
        "scheduler DDIMScheduler, found PNDMScheduler",
        "num inference steps 4, found 5",
        "timestep 250 at step 2, found 200",
        "noise level 2 at step 1, found 2.5",
        "guidance 4, found 7.5",
    ]


def test_what_is_not_bound_or_not_given_or_differs_by_rounding_is_no_difference() -> None:
    assert Target().differences(weights="abc", timesteps=(1.0,)) == []
    assert Target(weights="abc").differences(dtype="float16") == []
    assert Target(guidance=4.0).differences(guidance=None) == []
    assert Target(guidance=4.0).differences(guidance=4) == []
    assert Target(timesteps=(999.0, 500.0)).differences(timesteps=(999.4, 499.9)) == []


def test_another_number_of_steps_is_said_as_such() -> None:
    assert Target(timesteps=(2.0, 1.0)).differences(timesteps=(2.0, 1.0, 0.0)) == ["2 steps, found 3"]


def test_a_pass_with_rules_of_its_own_has_a_share_of_its_own() -> None:
    made = schedule(Rule("skip", "C.", context="uncond"), Rule("reuse", "C.", blocks="0", branch="attn"))
    assert made.contexts == ("uncond",)
    assert made.macs_fraction("uncond") == pytest.approx(1 - 200 / 800)
    assert made.macs_fraction() == made.macs_fraction("cond") == pytest.approx(1 - 30 / 800)
    assert schedule().contexts == schedule(Rule("reuse", "C.")).contexts == ()


@pytest.mark.parametrize("expected", ["CC", "CSSC", ".CCC", 4, None])
def test_expected_steps_that_are_no_letters_for_the_steps_are_refused(expected: Any) -> None:
    with pytest.raises(ScheduleError, match="expected_steps must be 4 letters C or"):
        schedule(measured={"expected_steps": expected})


@pytest.mark.parametrize("fraction", ["half", -1, True, None])
def test_an_expected_share_that_is_none_is_refused(fraction: Any) -> None:
    with pytest.raises(ScheduleError, match="macs_fraction must be a number of 0 or more"):
        schedule(measured={"macs_fraction": fraction})
