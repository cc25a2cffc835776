"""FORA: recompute the branches at a fixed interval."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Any, Literal, get_args

from dicache.anatomy import Anatomy
from dicache.calibrate.methods import Axis, CalibrationError, method
from dicache.calibrate.spaces import PlanSpace
from dicache.schedules import Plan, PlanError, Rule

Anchor = Literal["start", "end"]
USUAL_INTERVAL = 2


@method("fora")
@dataclass(frozen=True)
class Fora:
    """Recompute every branch every `interval` steps and hold its output, before the gate, in between.

    Attributes:
        interval: Steps from one computation to the next; 1 computes everything.
        anchor: `end` counts down to the last step, which is then always computed; the released code does so, and the
            published numbers are its. `start` counts up from the first, as the common restatement has it.
        branches: Kinds of branch to reuse; all of them when empty.
        first: First step that may reuse, counted from 0.
        last: Last step that may reuse; None for the last of all.

    References:
        FORA, arXiv 2407.01425, section 3.3.
    """

    interval: int
    anchor: Anchor = "end"
    branches: tuple[str, ...] = ()
    first: int = 0
    last: int | None = None

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise CalibrationError(
                f"fora: the interval must be 1 (compute everything) or more, found {self.interval}; 2 or 3 is usual"
            )
        if self.anchor not in get_args(Anchor):
            raise CalibrationError(f"fora: the anchor must be start or end, found {self.anchor!r}")
        if self.first < 0 or (self.last is not None and self.last < self.first):
            raise CalibrationError(f"fora: steps {self.first} to {self.last} are not a range")

    def plan(self, anatomy: Anatomy, steps: int) -> Plan:
        if self.interval >= steps > 1:
            raise CalibrationError(f"fora: the interval must be below the {steps} steps, found {self.interval}")
        if max(self.first, self.last or 0) >= steps:
            raise CalibrationError(
                f"fora: there is no step {max(self.first, self.last or 0)} of {steps}; the steps are 0-{steps - 1}"
            )
        if self.interval == 1:
            return Plan(steps)
        last = steps - 1 if self.last is None else self.last
        letters = "".join(
            "." if self.first <= i <= last and not self._computes(i, steps) else "C" for i in range(steps)
        )
        plan = Plan(steps, tuple(Rule("reuse", letters, branch=branch) for branch in self.branches or ("*",)))
        try:
            plan.table(anatomy)
        except PlanError as error:
            raise CalibrationError(f"fora: {error}") from None
        return plan

    def _computes(self, i: int, steps: int) -> bool:
        if i == 0:
            return True
        return (steps - 1 - i if self.anchor == "end" else i) % self.interval == 0


@dataclass(frozen=True)
class ForaSpace(PlanSpace):
    """The interval, where it is counted from, and the kinds of branch that are reused."""

    saving = ("interval",)

    def free(self) -> Mapping[str, Axis]:
        some = chain.from_iterable(combinations(self.kinds, n) for n in range(len(self.kinds), 0, -1))
        return {
            "interval": self.intervals,
            "anchor": get_args(Anchor),
            "branches": tuple(",".join(names) for names in some),  # beginning with all of them
        }

    def usual(self) -> Mapping[str, Any]:
        return {**super().usual(), "branches": ",".join(self.kinds)}

    def with_parameters(self, parameters: Mapping[str, Any]) -> Any:
        given = dict(parameters)
        if "branches" in given:
            given["branches"] = tuple(given["branches"].split(","))
        return replace(self.settings, **given)
