"""TaylorSeer: compute at a fixed interval, and foretell what lies in between from the last computed outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from dicache.anatomy import Anatomy
from dicache.calibrate.methods import Axis, CalibrationError, letters_of, method
from dicache.calibrate.spaces import PlanSpace
from dicache.schedules import Plan, Rule
from dicache.schedules.plan import MAX_ORDER

Granularity = Literal["branch", "body"]
Anchor = Literal["reference", "diffusers"]
LONGEST_WARM_UP = 5  # that a search tries; the published ones are 2 and 3


@method("taylorseer")
@dataclass(frozen=True)
class TaylorSeer:
    """Compute everything every `interval` steps, and expand the outputs to the steps in between.

    The memory is `order + 1` times that of holding: of every branch, or of one delta for the body.

    Attributes:
        interval: Steps from one computation to the next; 1 computes everything.
        order: Of the expansion; 0 holds. It is reached once `order + 1` steps are computed. The published results are
            of order 3 with interval 3, and 4 with 4, on DiT in 50 steps; with fewer steps lower ones are safer.
        warm_up: Steps at the start that are computed: 2 in the released code for DiT, 3 for FLUX.
        granularity: `branch` foretells each branch's output, before the gate, as the released code does; `body` the
            change that all blocks make together, which takes far less memory.
        anchor: Where the interval is counted from. `reference`, the released code: from the last step of the warm-up.
            `diffusers`: from the second step after it, which is computed for that.

    References:
        TaylorSeer, arXiv 2503.06923, section 3.3; Shenyi-Z/TaylorSeer.
    """

    interval: int = 3
    order: int = 3
    warm_up: int = 2
    granularity: Granularity = "branch"
    anchor: Anchor = "reference"

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise CalibrationError(
                f"taylorseer: the interval must be 1 (compute everything) or more, found {self.interval}; 3 to 6 is "
                "usual"
            )
        if not 0 <= self.order <= MAX_ORDER:
            raise CalibrationError(f"taylorseer: the order must be 0 (hold) to {MAX_ORDER}, found {self.order}")
        if self.warm_up < 1:
            raise CalibrationError(f"taylorseer: the warm-up must be 1 step or more, found {self.warm_up}")
        for name, kind in (("granularity", Granularity), ("anchor", Anchor)):
            if getattr(self, name) not in get_args(kind):
                known = " or ".join(get_args(kind))
                raise CalibrationError(f"taylorseer: the {name} must be {known}, found {getattr(self, name)!r}")

    def plan(self, anatomy: Anatomy, steps: int) -> Plan:
        for name, value in (("interval", self.interval), ("warm-up", self.warm_up)):
            if value >= steps > 1:
                raise CalibrationError(f"taylorseer: the {name} must be below the {steps} steps, found {value}")
        letters = letters_of(map(self._computes, range(steps)))
        if "." not in letters:
            return Plan(steps)
        action: Literal["reuse", "skip"] = "reuse" if self.granularity == "branch" else "skip"
        return Plan(steps, (Rule(action, letters, predictor="taylor", order=self.order),))

    def _computes(self, i: int) -> bool:
        counted_from = self.warm_up + (1 if self.anchor == "diffusers" else -1)
        return i < self.warm_up or (i - counted_from) % self.interval == 0


@dataclass(frozen=True)
class TaylorSeerSpace(PlanSpace):
    """The interval, the order, how many steps are computed at first, and what is foretold."""

    saving = ("interval",)

    def free(self) -> Mapping[str, Axis]:
        return {
            "interval": self.intervals,
            "order": range(MAX_ORDER + 1),
            "warm_up": range(1, min(LONGEST_WARM_UP, self.steps - 1) + 1),
            "granularity": get_args(Granularity),
        }
