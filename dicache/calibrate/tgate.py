"""T-GATE: cross-attention, and guidance with it, end at a gate; before it self-attention is computed now and then."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from dicache.anatomy import Anatomy
from dicache.anatomy.parts import branch_of, kind_of_branch
from dicache.calibrate.methods import Axis, CalibrationError, letters_of, method
from dicache.calibrate.spaces import PlanSpace
from dicache.schedules import Plan, Rule

AfterGate = Literal["single", "guided"]
LONGEST_INTERVAL = 6  # that a search tries; the published ones are 1 to 5
LONGEST_WARM_UP = 4


@method("tgate")
@dataclass(frozen=True)
class TGate:
    """Hold cross-attention from the gate on, as the mean of both guidance passes, of which one is computed from there.

    Both kinds of attention are computed at the step before the gate, whose outputs are what is held; the published
    pseudo-code has them computed at the gate itself, which is this rule with a gate one step later. Intervals count
    from step 0, and not from the warm-up or the gate. Without guidance, as with LCM, nothing is averaged: each sample
    holds its own.

    After the gate a step computes the first half of a batch that holds both passes, which is the unguided one in
    pipelines of models with cross-attention, or the pass that is called first. Their cross-attention is held, so that
    the text no longer makes a difference, unless the model also reads it elsewhere.

    Attributes:
        gate: First step at which cross-attention is held. The published settings are 10 of 25 steps for SDXL, 15 of 25
            for PixArt, 1 or 2 of 4 for LCM.
        sp_interval: Steps from one computation of self-attention to the next before the gate (semantics planning).
        fi_interval: The same from the gate on (fidelity improving); 1 computes it always.
        warm_up: Steps at the start in which everything is computed; 0 for LCM.
        after_gate: `single`, one pass is computed from the gate on; `guided`, both are, and each holds its own.

    References:
        T-GATE, arXiv 2404.02747, section 4; the released code where they differ.
    """

    gate: int = 10
    sp_interval: int = 5
    fi_interval: int = 1
    warm_up: int = 2
    after_gate: AfterGate = "single"

    def __post_init__(self) -> None:
        if self.gate < 1:
            raise CalibrationError(f"tgate: the gate must be step 1 or later, found {self.gate}")
        for name in ("sp_interval", "fi_interval"):
            if getattr(self, name) < 1:
                raise CalibrationError(
                    f"tgate: {name} must be 1 (self-attention is computed always) or more, found {getattr(self, name)}"
                )
        if not 0 <= self.warm_up < self.gate:
            raise CalibrationError(
                f"tgate: the warm-up must be shorter than the gate, 0 to {self.gate - 1} steps, found {self.warm_up}"
            )
        if self.after_gate not in get_args(AfterGate):
            raise CalibrationError(f"tgate: after the gate it is single or guided, found {self.after_gate!r}")

    def plan(self, anatomy: Anatomy, steps: int) -> Plan:
        """Return what to compute at each step.

        Raises:
            CalibrationError: If there is no step for the gate, or the model has no cross-attention.
        """
        kinds = {kind_of_branch(branch_of(key)) for key in anatomy.sites}
        if "cross_attn" not in kinds:
            raise CalibrationError(f"tgate: {anatomy.model} {_text_in(kinds)}")
        if self.gate >= steps:
            raise CalibrationError(
                f"tgate: the gate must be a step after the first, 1 to {steps - 1} of {steps} steps, found {self.gate}"
            )
        rules = [Rule("reuse", "C" * self.gate + "." * (steps - self.gate), branch="cross_attn")]
        letters = letters_of(map(self._attends, range(steps)))
        if "." in letters and "attn" in kinds:
            rules.append(Rule("reuse", letters, branch="attn"))
        return Plan(steps, tuple(rules), self.gate if self.after_gate == "single" else None)

    def _attends(self, step: int) -> bool:
        """Whether self-attention is computed at a step."""
        if step >= self.gate:
            return step % self.fi_interval == 0
        return step <= self.warm_up or step == self.gate - 1 or step % self.sp_interval == 0


@dataclass(frozen=True)
class TGateSpace(PlanSpace):
    """The gate, how often self-attention is computed before and behind it, and for how long everything is at first."""

    saving = ("fi_interval", "sp_interval", "-gate")

    def free(self) -> Mapping[str, Axis]:
        longest = min(LONGEST_INTERVAL, self.steps - 1)
        return {
            "gate": range(1, self.steps),
            "sp_interval": range(1, longest + 1),
            "fi_interval": range(1, longest + 1),
            "warm_up": range(min(LONGEST_WARM_UP, self.steps - 1) + 1),
        }


def _text_in(kinds: set[str]) -> str:
    if kinds & {"joint_attn", "fused"}:
        return (
            "has no cross-attention to hold: text and image meet in one attention, which the image needs at every "
            "step. Take fora, taylorseer or delta-dit"
        )
    return (
        "has no cross-attention to hold: what it is conditioned on enters through its norms alone. Take fora, "
        "delta-dit or teacache"
    )
