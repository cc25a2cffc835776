"""What an export loses is said, and what would change the picture more than that is refused unless it is asked for."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dicache.calibrate.delta_dit import DeltaDit
from dicache.calibrate.fora import Fora
from dicache.calibrate.magcache import MagCache
from dicache.calibrate.methods import planned_schedule
from dicache.formats import FormatError, Losses, export, find
from dicache.schedules import (
    AdaCachePolicy,
    Corrections,
    FirstBlockPolicy,
    Plan,
    Rule,
    Schedule,
    Target,
    TeaCachePolicy,
)
from tests.calibrate.profiled import profile
from tests.toys import written

ANATOMY, STEPS = written(4), 8
HELD = "branches, held before their gates, become one held change of all blocks"


def planned(*rules: Rule, **more: Any) -> Schedule:
    return Schedule("drawn", {}, ANATOMY, Target(), STEPS, Plan(STEPS, rules), **more)


def losses(schedule: Schedule, name: str) -> Losses:
    return export(schedule, find(name), lossy=True).losses


def text(schedule: Schedule, name: str, **values: Any) -> str:
    return export(schedule, find(name), values=values).text


def test_branches_that_are_held_at_the_same_steps_become_a_mask_and_that_is_said() -> None:
    schedule = planned_schedule(Fora(2, "start"), ANATOMY, Target(), STEPS)
    made = export(schedule, find("mask"))
    assert json.loads(made.text) == [1, 0, 1, 0, 1, 0, 1, 0]
    assert made.losses == Losses([HELD, "which blocks the mask is for"])


def test_a_step_is_computed_where_any_branch_is_and_how_much_more_that_is_is_said() -> None:
    schedule = planned(Rule("reuse", "C.C.C.C."), Rule("reuse", "C...C...", "0", "attn"))
    made = export(schedule, find("mask"))
    assert json.loads(made.text) == [1, 0, 1, 0, 1, 0, 1, 0]
    # One of eight branches, at two of eight steps, is not computed by the plan.
    assert made.losses.stated[1] == (
        "a step is computed where any branch is in any guidance pass, which computes 3.1% of the branches that the "
        "plan does not"
    )


def test_a_step_is_computed_where_either_guidance_pass_is() -> None:
    schedule = planned(Rule("skip", "C...C...", context="cond"), Rule("skip", "C.C.C.C.", context="uncond"))
    made = export(schedule, find("mask"))
    assert json.loads(made.text) == [1, 0, 1, 0, 1, 0, 1, 0]
    assert "in any guidance pass" in made.losses.stated[0]


@pytest.mark.parametrize(
    ("rules", "name", "said"),
    [
        (
            (Rule("skip", "C.C.C.C.", predictor="taylor", order=2),),
            "mask",
            "held where the plan has a taylor of order 2",
        ),
        (
            (Rule("skip", "CCC.CCC.", predictor="taylor", order=1), Rule("skip", "CCCCC.CC")),
            "cache-dit",
            "held where the plan has a taylor of order 1",
        ),
        ((Rule("skip", "C.C.C.C.", predictor="feature"),), "cache-dit", "held where the plan has a feature"),
        ((Rule("skip", "C.C.C.C.", "1-2"),), "diffusers-magcache", "where the plan skips 1 to 2 of them"),
        (
            (Rule("skip", "CC.C.C.C"),),
            "sglang-dpcache",
            "would be extrapolated from the last two, where the plan holds",
        ),
        (
            (Rule("reuse", "CC..C.CC"),),
            "diffusers-taylorseer",
            "would be computed as well: the format has one interval",
        ),
        (
            (Rule("reuse", "C.C.C.C.", branch="mlp"), Rule("reuse", "C.C.C.C.", context="cond")),
            "smoothcache",
            "rules of the guidance pass cond alone",
        ),
    ],
)
def test_what_changes_the_picture_more_is_refused(rules: tuple[Rule, ...], name: str, said: str) -> None:
    values: dict[str, Any] = {"timesteps": [1.0] * STEPS, "sigmas": [1.0] * (STEPS + 1)}
    values |= dict.fromkeys(("pipeline", "checkpoint", "quality", "scheduler", "scheduler_config_sha256"), "x")
    values |= dict.fromkeys(("height", "width", "guidance_scale", "do_classifier_free_guidance"), 1)
    with pytest.raises(FormatError, match="Pass --lossy"):
        export(planned(*rules), find(name), values=values)
    assert said in "; ".join(export(planned(*rules), find(name), lossy=True, values=values).losses.beyond)


def test_corrections_and_the_end_of_guidance_are_kept_by_no_format() -> None:
    trend = {f"0/2.mlp/{step}": np.ones((1, 2, 3), np.float32) for step in (1, 3, 5, 7)}
    corrections = Corrections("multiply", 0.01, {"0": 1}, {"2.mlp": "C.C.C.C."}, trend)
    for name in ("mask", "smoothcache"):
        corrected = planned(Rule("reuse", "C.C.C.C."), corrections=corrections)
        assert losses(corrected, name).beyond == ["the corrections of what is held would be dropped"]
        ending = Schedule("tgate", {}, ANATOMY, Target(), STEPS, Plan(STEPS, (Rule("reuse", "C.C.C.C."),), 5))
        assert "where the plan stops it from step 5 on" in losses(ending, name).beyond[0]


def test_lists_of_blocks_are_one_stack_for_some_models_and_projects() -> None:
    double, single = ANATOMY.blocks[:2], ANATOMY.blocks[2:]
    lists = (*(replace(b, path="double") for b in double), *(replace(b, path="single") for b in single))
    flux = replace(ANATOMY, model="FluxTransformer2DModel", blocks=lists, segments=((0, 2), (2, 4)))
    schedule = replace(planned(Rule("skip", "C.C.C.C.", "1-3")), anatomy=flux)
    assert losses(schedule, "cache-dit") == Losses()
    assert "cannot be chosen in 2 lists" in losses(schedule, "xdit").beyond[0]
    deciding = Schedule("first-block", {}, flux, Target(), STEPS, policy=FirstBlockPolicy(0.1))
    assert losses(deciding, "cache-dit") == Losses()
    assert "would decide by itself" in losses(deciding, "xdit").beyond[0]


def test_a_plan_that_skips_other_blocks_at_other_steps_is_no_mask() -> None:
    schedule = planned_schedule(DeltaDit(interval=2, blocks=2, boundary=4), ANATOMY, Target(), STEPS)
    with pytest.raises(FormatError, match="at no step does this plan leave out all of blocks 0-3"):
        text(schedule, "cache-dit")


def test_what_decides_at_run_time_is_not_written_as_fixed_steps() -> None:
    schedule = Schedule("first-block", {}, ANATOMY, Target(), STEPS, policy=FirstBlockPolicy(0.1))
    with pytest.raises(FormatError, match="dicache schedules freeze"):
        text(schedule, "mask")


def test_a_policy_that_a_project_does_not_have_is_refused() -> None:
    policy = AdaCachePolicy(((0.1, 2), (1.0, 1)), (1,), "block")
    with pytest.raises(FormatError, match="which cache-dit does not have"):
        text(Schedule("adacache", {}, ANATOMY, Target(), STEPS, policy=policy), "cache-dit")


def tea(coefficients: tuple[float, ...], **fields: Any) -> Schedule:
    policy = TeaCachePolicy(0.2, coefficients, (0.1, 0.5), **fields)
    return Schedule("teacache", {}, ANATOMY, Target(), 20, policy=policy)


def test_a_polynomial_is_written_with_five_coefficients_highest_first() -> None:
    assert json.loads(text(tea((2.0, 1.0)), "teacache-coefficients")) == [0, 0, 0, 2.0, 1.0]
    with pytest.raises(FormatError, match="of degree 5, needed 4 or less"):
        text(tea((1.0,) * 6), "vllm-omni")


def test_a_polynomial_that_is_negative_where_it_was_fitted_is_refused_where_that_means_something_else() -> None:
    below = (1.0, -0.3)  # negative below x = 0.3
    with pytest.raises(FormatError, match="adds nothing here and lowers the sum there"):
        text(tea(below), "sglang-teacache")
    with pytest.raises(FormatError, match="adds nothing here and adds its magnitude there"):
        text(tea(below), "vllm-omni")
    assert text(tea(below, negative="abs", last_steps=0), "vllm-omni")
    far = losses(tea((1.0, -0.08)), "sglang-teacache").stated  # negative below 0.08, which is outside
    assert far == [
        "x is held in [0.1, 0.5] here, where p was fitted, and taken as it is there; at x of 0.05 to 0.0795 it is "
        "negative"
    ]


def test_steps_that_are_always_computed_are_kept_where_they_can_be() -> None:
    schedule = tea((1.0, 0.0), first_steps=4, last_steps=0)
    written_for_sglang = json.loads(text(schedule, "sglang-teacache"))
    assert (written_for_sglang["start_skipping"], written_for_sglang["end_skipping"]) == (4, 20)
    node = json.loads(text(schedule, "comfyui-teacache"))
    assert [i for i in range(20) if node["start_percent"] <= i / 20 <= node["end_percent"]] == list(range(4, 20))
    with pytest.raises(FormatError, match="only the first step would be computed always"):
        text(schedule, "vllm-omni")


def test_ratios_of_a_profile_are_kept_where_diffusers_rule_gives_the_plan_by_them() -> None:
    ratios = np.array([np.nan, 1.05, 1.0, 0.98, 0.9, 1.0, 0.97, 0.99])
    magnitude = np.zeros((1, 1, STEPS, 3))
    magnitude[0, 0, :, 0] = ratios
    measured = MagCache(0.06, 3, 0.0).calibrate(profile(ANATOMY, {"magnitude": magnitude}, steps=STEPS))
    kwargs = json.loads(text(measured, "diffusers-magcache"))["kwargs"]
    assert kwargs["mag_ratios"] == [1.0, *ratios[1:]]
    assert (kwargs["threshold"], kwargs["max_skip_steps"], kwargs["retention_ratio"]) == (0.06, 3, 0.0)


def test_smoothcache_writes_a_component_for_all_blocks_or_one_for_each() -> None:
    schedule = planned(Rule("reuse", "C.C.C.C.", branch="mlp"), Rule("reuse", "C..CC..C", "1", "attn"))
    made = json.loads(text(schedule, "smoothcache"))
    assert list(made) == ["attn1-0", "attn1-1", "attn1-2", "attn1-3", "ff"]
    assert made["attn1-1"] == [1, 0, 0, 1, 1, 0, 0, 1]
    assert list(json.loads(text(schedule, "smoothcache", names="branches")))[-1] == "mlp"
