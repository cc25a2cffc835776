from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dicache.calibrate import CalibrationError
from dicache.calibrate.eoc import Eoc
from dicache.calibrate.methods import METHODS
from dicache.profiler import Profile
from dicache.schedules import Plan, Rule, Schedule, Target, TeaCachePolicy
from tests.calibrate.profiled import profile
from tests.toys import written

TWO = written(2)  # sites 0.attn, 0.mlp, 1.attn, 1.mlp
STEPS = 5
LETTERS = "C.C.."
HELD = {1: 0, 3: 2, 4: 2}  # reused step -> the step that it holds
TARGET = Target("fa7a", "float32", num_inference_steps=STEPS, timesteps=(4.0, 3.0, 2.0, 1.0, 0.0))


def base(*rules: Rule, **made_for: Any) -> Schedule:
    return Schedule(
        "fora", {"interval": 2}, TWO, Target(**made_for), STEPS, Plan(STEPS, rules or (Rule("reuse", LETTERS),))
    )


def measured(**changed: Any) -> Profile:
    return profile(TWO, {"magnitude": np.zeros((3, 1, STEPS, 3))}, **{"steps": STEPS, "target": TARGET, **changed})


def prior(site: str) -> tuple[tuple[int, ...], np.ndarray]:
    """Return priors whose half 0 grows by the site's place with each step, and half 1 ten times as fast."""
    rate = 1 + TWO.sites.index(site)
    steps = np.arange(STEPS, dtype=np.float32)
    halves = np.stack([steps * rate, steps * rate * 10])  # (parts, steps)
    return tuple(range(STEPS)), np.broadcast_to(halves[:, :, None, None], (2, STEPS, 3, 4)).astype(np.float32)


def test_the_trend_is_the_prior_less_that_of_the_step_held_for_each_half() -> None:
    schedule = Eoc(weight=0.02).calibrate(measured(), base(), prior)
    found = schedule.corrections
    assert found is not None
    assert (found.form, found.weight, found.contexts) == ("multiply", 0.02, {"0": 2})
    assert found.sites == dict.fromkeys(TWO.sites, LETTERS)
    assert len(found.tensors) == 4 * 3
    for place, site in enumerate(TWO.sites):
        for step, source in HELD.items():
            trend = found.tensors[f"0/{site}/{step}"]
            assert trend.shape == (2, 3, 4)
            assert trend.dtype == np.float32
            assert (trend[0] == (1 + place) * (step - source)).all()
            assert (trend[1] == 10 * (1 + place) * (step - source)).all()
    assert schedule.plan == base().plan
    assert schedule.target == TARGET
    assert METHODS["eoc"] is Eoc


def test_the_schedule_tells_its_base_and_what_it_corrects() -> None:
    schedule = Eoc(first_steps=2).calibrate(measured(), base(), prior)
    assert (schedule.method, schedule.settings["base"], schedule.settings["base_interval"]) == ("eoc", "fora", 2)
    assert (schedule.measured["corrected"], schedule.measured["held"]) == (4, 12)
    assert schedule.measured["correction_bytes"] == 4 * 2 * 3 * 4 * 4
    assert schedule.macs_fraction() == base().macs_fraction()


def corrected(settings: Eoc, *rules: Rule) -> dict[str, str]:
    found = settings.calibrate(measured(), base(*rules), prior).corrections
    assert found is not None
    return dict(found.sites)


def test_the_first_steps_or_some_branches_alone_are_corrected() -> None:
    assert corrected(Eoc(first_steps=4)) == dict.fromkeys(TWO.sites, "C.C.C")
    assert corrected(Eoc(branches=("mlp",))) == {"0.mlp": LETTERS, "1.mlp": LETTERS}


def test_a_block_is_corrected_where_its_score_exceeds_the_threshold() -> None:
    # Trends of a block: (1 + 2) or (3 + 4), times the distance of 1, 1 and 2 steps; the largest is 7 * 2.
    # Of block 0: 3/14, 3/14, 6/14; of block 1: 7/14, 7/14, 14/14.
    assert corrected(Eoc(position_weight=0, threshold=0.45)) == {"1.attn": LETTERS, "1.mlp": LETTERS}
    assert corrected(Eoc(position_weight=0, threshold=0.4)) == {
        **dict.fromkeys(("0.attn", "0.mlp"), "CCCC."),
        **dict.fromkeys(("1.attn", "1.mlp"), LETTERS),
    }
    # Counted down, steps 1, 3, 4 are at 3/5, 1/5, 0: block 0 has 0.81, 0.41, 0.43 and block 1 has 1.1, 0.7, 1.
    assert corrected(Eoc(position_weight=1, threshold=0.75)) == {
        **dict.fromkeys(("0.attn", "0.mlp"), "C.CCC"),
        **dict.fromkeys(("1.attn", "1.mlp"), "C.CC."),
    }


def test_only_what_the_base_holds_is_corrected() -> None:
    rules = Rule("reuse", LETTERS, "0", "mlp"), Rule("reuse", LETTERS, "1", "mlp", predictor="taylor", order=1)
    assert corrected(Eoc(), *rules) == {"0.mlp": LETTERS}
    assert corrected(Eoc(), Rule("skip", "CC.CC", "1"), Rule("reuse", "C.CC.")) == {
        **dict.fromkeys(TWO.sites, "C.CC."),
    }


def test_each_guidance_pass_has_its_own_trend() -> None:
    passes = measured(contexts=("cond", "uncond"), parts=(1, 1))
    found = Eoc().calibrate(passes, base(), prior).corrections
    assert found is not None
    assert found.contexts == {"cond": 1, "uncond": 1}
    assert found.tensors["cond/0.attn/1"].shape == (1, 3, 4)
    assert (found.tensors["uncond/0.attn/1"] == 10 * found.tensors["cond/0.attn/1"]).all()


def test_the_trends_of_a_model_in_half_precision_are_kept_in_half_precision() -> None:
    found = Eoc().calibrate(measured(target=replace(TARGET, dtype="bfloat16")), base(), prior).corrections
    assert found is not None
    assert {tensor.dtype for tensor in found.tensors.values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": float("inf")}, "the weight must be a number, found inf"),
        ({"position_weight": float("nan")}, "the position weight must be a number, found nan"),
        ({"form": "divide"}, "the form must be multiply or add, found 'divide'"),
        ({"first_steps": 0}, "must be 1 or more, found 0"),
        ({"branches": ("attention",)}, "unknown branch 'attention'; write one of attn"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Eoc(**settings)


def test_a_base_that_is_not_for_the_profile_is_refused() -> None:
    adaptive = Schedule("teacache", {}, TWO, Target(), STEPS, policy=TeaCachePolicy(0.1, (1.0, 0.0), (0.0, 1.0)))
    for wrong, message in [
        (adaptive, "teacache decides at run time"),
        (base(weights="beef"), "made for weights beef, found fa7a in the profile"),
        (base(num_inference_steps=9), "made for num inference steps 9, found 5 in the profile"),
        (replace(base(), anatomy=written(3)), "the 6 sites of a Toy, found 4 of a Toy"),
        (replace(base(), steps=2, plan=Plan(2, (Rule("reuse", "C."),))), "2 steps, found 5"),
        (base(Rule("skip", LETTERS)), "the fora schedule holds no output of a branch"),
        (Eoc().calibrate(measured(), base(), prior), "corrected already"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            Eoc().calibrate(measured(), wrong, prior)


def test_priors_that_are_missing_and_a_threshold_that_is_never_reached_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"no prior of 0\.attn at step 2; profile again with --priors"):
        Eoc().calibrate(measured(), base(), lambda site: ((0, 1), prior(site)[1][:, :2]))
    with pytest.raises(CalibrationError, match=r"no score exceeds the threshold 9; the largest is 1\.1"):
        Eoc(threshold=9).calibrate(measured(), base(), prior)
