from typing import Any

import pytest

from dicache.calibrate import CalibrationError
from dicache.calibrate.methods import METHODS, planned_schedule
from dicache.calibrate.tgate import TGate
from dicache.schedules import Rows, Target
from tests.tiny import Build, anatomy_of, dit, flux, pixart, sd3


def letters(settings: TGate, steps: int) -> tuple[str, str]:
    table = settings.plan(anatomy_of(pixart), steps).table(anatomy_of(pixart))
    assert set(table["0.mlp"]) == {"C"}
    assert len({table[f"{block}.attn"] for block in range(3)}) == 1
    return table["0.cross_attn"], table["0.attn"]


@pytest.mark.parametrize(
    ("settings", "steps", "cross", "own"),
    [
        # C computed, S also stored, A also stored as the mean of both passes, r reused; of what the released code does.
        (TGate(10, 5, 1, 2), 25, "CCCCCCCCCArrrrrrrrrrrrrrr", "CCSrrSrrrASSSSSSSSSSSSSSS"),
        (TGate(15, 3, 1, 2), 25, "CCCCCCCCCCCCCCArrrrrrrrrr", "CCSSrrSrrSrrSrASSSSSSSSSS"),
        (TGate(1, 1, 1, 0), 4, "Arrr", "ASSS"),
        (TGate(2, 1, 1, 0), 4, "CArr", "SASS"),
        (TGate(5, 2, 3, 4), 8, "CCCCArrr", "CCCCArSr"),  # the warm-up lasts up to the gate; step 6 is a third one
    ],
)
def test_what_the_released_code_computes_and_reuses(settings: TGate, steps: int, cross: str, own: str) -> None:
    computed = str.maketrans("SAr", "CCR")
    assert letters(settings, steps) == (cross.translate(computed), own.translate(computed))
    plan = settings.plan(anatomy_of(pixart), steps)
    assert plan.collapse_guidance_from == settings.gate == cross.index("A") + 1
    rows = Rows(plan, anatomy_of(pixart))
    # Of what is marked as stored, that which a later step reads is kept.
    kept = [step for step in range(steps) if "0.cross_attn" in rows.row(step).keep]
    assert kept == [cross.index("A")]
    kept = [step for step in range(steps) if "0.attn" in rows.row(step).keep]
    assert kept == [step for step in range(steps - 1) if own[step] in "SA" and own[step + 1] == "r"]


def test_guidance_may_go_on_behind_the_gate() -> None:
    plan = TGate(10, after_gate="guided").plan(anatomy_of(pixart), 25)
    assert plan.collapse_guidance_from is None
    assert plan.rules == TGate(10).plan(anatomy_of(pixart), 25).rules


def test_the_share_counts_the_pass_that_is_saved() -> None:
    anatomy = anatomy_of(pixart)
    schedule = planned_schedule(TGate(2, 1, 1, 0), anatomy, Target(), 4)
    cross = sum(site.macs for block in anatomy.blocks for site in block.sites if site.branch == "cross_attn")
    assert schedule.macs_fraction(guided=False) == pytest.approx(1 - 2 / 4 * cross / anatomy.macs)
    assert schedule.macs_fraction() == pytest.approx((2 * 2 + 2 * (1 - cross / anatomy.macs)) / 8)
    assert METHODS["tgate"] is TGate


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (
            dit,
            "DiTTransformer2DModel has no cross-attention to hold: what it is conditioned on enters through its norms",
        ),
        (sd3, "SD3Transformer2DModel has no cross-attention to hold: text and image meet in one attention"),
        (flux, "FluxTransformer2DModel has no cross-attention to hold: text and image meet in one attention"),
    ],
)
def test_models_without_cross_attention_are_refused_with_what_to_take_instead(build: Build, said: str) -> None:
    with pytest.raises(CalibrationError, match=rf"tgate: {said}.* Take fora, "):
        TGate(2, warm_up=0).plan(anatomy_of(build), 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gate": 0}, "the gate must be step 1 or later, found 0"),
        ({"gate": 4, "warm_up": 4}, "the warm-up must be shorter than the gate, 0 to 3 steps, found 4"),
        ({"warm_up": -1}, "the warm-up must be shorter than the gate, 0 to 9 steps, found -1"),
        ({"sp_interval": 0}, r"sp_interval must be 1 \(self-attention is computed always\) or more, found 0"),
        ({"fi_interval": -2}, r"fi_interval must be 1 \(self-attention is computed always\) or more, found -2"),
        ({"after_gate": "both"}, "after the gate it is single or guided, found 'both'"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_needed(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(CalibrationError, match=f"tgate: {said}"):
        TGate(**settings)


def test_a_gate_behind_the_last_step_is_refused() -> None:
    with pytest.raises(CalibrationError, match="the gate must be a step after the first, 1 to 9 of 10 steps, found 10"):
        TGate(10).plan(anatomy_of(pixart), 10)
    assert TGate(9).plan(anatomy_of(pixart), 10).collapse_guidance_from == 9
