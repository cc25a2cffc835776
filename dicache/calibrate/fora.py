"""FORA: recompute the branches at a fixed interval."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, combinations
from typing import Any, Literal, get_args

from dicache.anatomy import Anatomy
from dicache.calibrate.methods import Axis, CalibrationError, method, planned_schedule
from dicache.schedules import Plan, PlanError, Rule, Schedule, Target

Anchor = Literal["start", "end"]
USUAL_INTERVAL = 2
LONGEST_INTERVAL = 16  # that a search tries; the paper's longest is 10, where the images are ruined


@method("fora")
@dataclass(frozen=True)
class Fora:
    """Recompute every branch each `interval` steps and hold its output, before the gate, in between.

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
class ForaSpace:
    """What a search varies: the interval, where it is counted from, and the kinds of branch that are reused.

    Attributes:
        anatomy: The model's.
        target: What the schedules are bound to.
        steps: As the step clock counts them.
        settings: Where what is not varied comes from.
        fixed: Names of settings that are not varied.
    """

    anatomy: Anatomy
    target: Target
    steps: int
    settings: Fora
    fixed: Collection[str] = ()

    @cached_property
    def axes(self) -> Mapping[str, Axis]:
        axes: dict[str, Axis] = {
            "interval": range(2, min(self.steps, LONGEST_INTERVAL + 1)),
            "anchor": get_args(Anchor),
            "branches": self._kinds,
        }
        return {name: axis for name, axis in axes.items() if name not in self.fixed}

    @cached_property
    def _kinds(self) -> tuple[str, ...]:
        """Kinds of branch that may be reused together, beginning with all of them."""
        kinds = tuple(dict.fromkeys(s.branch.partition(".")[0] for block in self.anatomy.blocks for s in block.sites))
        some = chain.from_iterable(combinations(kinds, n) for n in range(len(kinds), 0, -1))
        return tuple(",".join(names) for names in some)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"method": "fora", "settings": asdict(self.settings), "made_for": self.target.to_json()}

    def plain(self, max_macs: float | None) -> Mapping[str, Any]:
        settings: dict[str, Any] = {
            "interval": self.settings.interval,
            "anchor": self.settings.anchor,
            "branches": self._kinds[0],
        }
        parameters = {name: settings[name] for name in self.axes}
        if "interval" not in parameters:
            return parameters
        if max_macs is None:
            return {**parameters, "interval": USUAL_INTERVAL}
        for interval in range(2, self.steps):
            if self.schedule({**parameters, "interval": interval}).macs_fraction() <= max_macs:
                return {**parameters, "interval": interval}
        raise CalibrationError(f"fora: a share of {max_macs:.3f} of the MACs cannot be reached in {self.steps} steps")

    def schedule(self, parameters: Mapping[str, Any]) -> Schedule:
        given = dict(parameters)
        if "branches" in given:
            given["branches"] = tuple(given["branches"].split(","))
        return planned_schedule(replace(self.settings, **given), self.anatomy, self.target, self.steps)
