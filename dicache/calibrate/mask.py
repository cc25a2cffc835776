"""Mask: the computed steps are written down, the same for all branches or for each kind of branch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dicache.anatomy import Anatomy
from dicache.anatomy.parts import branch_of, kind_of_branch
from dicache.calibrate.methods import CalibrationError, letters_of, method
from dicache.schedules import Plan, PlanError, Rule

ALL = "*"
PART = re.compile(r"(?P<first>\d+)(?:(?P<range>-)(?P<last>\d+)?(?::(?P<stride>\d+))?)?", re.ASCII)


@method("mask")
@dataclass(frozen=True)
class Mask:
    """Compute the branches at the steps that are listed, and hold their outputs, before the gate, at all others.

    The masks of the EOC paper for 20 steps: a quarter held, `{"*": "0-10:2,11-"}` (steps 1, 3, 5, 7 and 9 are not in
    it), and half held, `{"*": "0-:2"}` (all odd steps).

    Attributes:
        steps_computed: Kind of branch, or `*` for those that have no list of their own, to the steps at which it is
            computed, counted from 0: `0,3,5-9`, `5-` to the last step, `0-:2` every second one. A kind that is not
            covered is always computed.

    References:
        The masks that EOC, arXiv 2501.19243, is judged on.
    """

    steps_computed: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.steps_computed:
            raise CalibrationError("mask: no steps are given; list those that are computed, such as 0,2,4-9")
        for text in self.steps_computed.values():
            for part in text.split(","):
                if PART.fullmatch(part.strip()) is None:
                    raise CalibrationError(
                        f"mask: {part.strip()!r} is no step and no range of steps; write 7, 3-9, 3- or 0-18:2"
                    )

    def plan(self, anatomy: Anatomy, steps: int) -> Plan:
        others = [branch for branch in self.steps_computed if branch != ALL]
        kinds = dict.fromkeys(kind_of_branch(branch_of(key)) for key in anatomy.sites)
        masks: list[tuple[str, str]] = []
        for branch, text in self.steps_computed.items():
            computed = steps_of(text, steps)
            if 0 not in computed:
                raise CalibrationError(f"mask: step 0 must be computed, nothing is kept before it; found {text}")
            letters = letters_of(step in computed for step in range(steps))
            covered = [kind for kind in kinds if kind not in others] if branch == ALL and others else [branch]
            masks += [(kind, letters) for kind in covered]
        try:
            plan = Plan(steps, tuple(Rule("reuse", letters, branch=kind) for kind, letters in masks))
            plan.table(anatomy)
        except PlanError as error:
            raise CalibrationError(f"mask: {error}") from None
        return plan


def steps_of(text: str, steps: int) -> set[int]:
    """Return the steps of a list such as `0,3,5-9,12-,0-:2`.

    Raises:
        CalibrationError: If one of them is not among the `steps` that there are, or a range does not rise.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = PART.fullmatch(part.strip())
        assert match is not None
        first = int(match["first"])
        last = int(match["last"]) if match["last"] else steps - 1 if match["range"] else first
        stride = int(match["stride"] or 1)
        if max(first, last) >= steps:
            raise CalibrationError(f"mask: there is no step {max(first, last)} of {steps}; the steps are 0-{steps - 1}")
        if last < first or stride < 1:
            raise CalibrationError(f"mask: {part.strip()!r} does not rise; write it like 3-9 or 0-18:2")
        found.update(range(first, last + 1, stride))
    return found
