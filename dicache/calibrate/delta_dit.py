"""Delta-DiT: skip the deep blocks while the outline forms and the shallow ones while the details do."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from dicache.anatomy import Anatomy
from dicache.calibrate.delta_cache import check_interval, checked_span, interval_letters, usual_blocks
from dicache.calibrate.methods import Axis, CalibrationError, method
from dicache.calibrate.spaces import PlanSpace
from dicache.schedules import Plan, Rule

if TYPE_CHECKING:
    from dicache.profiler import Profile

Order = Literal["aligned", "reversed", "auto"]
USUAL_BOUNDARY = 0.6  # of the steps: 12 of 20 in the paper, 2 of 4
LONGEST_INTERVAL = 6  # that a search tries
ROUNDING = 0.02  # of a block: targets have four or five digits, so that 7.006 blocks are meant to be 7


@method("delta-dit")
@dataclass(frozen=True)
class DeltaDit:
    """Skip a range of blocks at all but each `interval`-th step: the deep ones early and the shallow ones late.

    Which delta a computed step keeps is decided by the skipped step that will use it.

    Attributes:
        interval: Steps from one full computation to the next; 1 computes everything. Steps left over at the end are
            computed.
        blocks: N_c, how many blocks are skipped; three quarters of them when left out.
        boundary: b, the number of elapsed steps from which on the shallow range is skipped: 0 for always, the number
            of steps for never. 0.6 of the steps when left out. The paper counts so, and not down, as its tables show.
        order: `aligned` is the paper's; `reversed` skips the shallow range early and the deep one late (its table 5);
            `auto` takes what a profile says is the cheaper one.

    References:
        Delta-DiT, arXiv 2406.01125, section 3.3.
    """

    interval: int = 2
    blocks: int | None = None
    boundary: int | None = None
    order: Order = "aligned"

    def __post_init__(self) -> None:
        check_interval("delta-dit", self.interval)
        if self.order not in get_args(Order):
            raise CalibrationError(f"delta-dit: the order must be aligned, reversed or auto, found {self.order!r}")

    def plan(self, anatomy: Anatomy, steps: int) -> Plan:
        if self.order == "auto":
            raise CalibrationError("delta-dit: which order is the better one is read from a profile; give --profile")
        letters = interval_letters("delta-dit", self.interval, steps)
        if self.interval == 1:
            return Plan(steps)
        boundary = self.boundary_of(steps)
        early, late = self.spans(anatomy)
        rules = (
            Rule("skip", letters[:boundary] + "C" * (steps - boundary), blocks=early),
            Rule("skip", "C" * boundary + letters[boundary:], blocks=late),
        )
        return Plan(steps, tuple(rule for rule in rules if "." in rule.steps))

    def spans(self, anatomy: Anatomy) -> tuple[str, str]:
        """Return the blocks that are skipped before the boundary, and behind it."""
        many = usual_blocks(anatomy) if self.blocks is None else self.blocks
        count = len(anatomy.blocks)
        if not 1 <= many <= count:
            raise CalibrationError(
                f"delta-dit: 1 to {count} blocks of {anatomy.model} can be skipped, found {many}; "
                f"{usual_blocks(anatomy)} are usual"
            )
        deep = checked_span("delta-dit", anatomy, count - many, many)
        shallow = checked_span("delta-dit", anatomy, 0, many)
        return (shallow, deep) if self.order == "reversed" else (deep, shallow)

    def boundary_of(self, steps: int) -> int:
        if self.boundary is None:
            return round(USUAL_BOUNDARY * steps)
        if not 0 <= self.boundary <= steps:
            raise CalibrationError(
                f"delta-dit: the boundary must be 0 to {steps} elapsed steps, found {self.boundary}; "
                f"{round(USUAL_BOUNDARY * steps)} is usual"
            )
        return self.boundary


def ordered(settings: DeltaDit, profile: "Profile") -> tuple[DeltaDit, dict[str, float]]:
    """Return the settings in the order that costs less, and the mean error of each order.

    The error of a skipped step is |delta_i - delta_(i-1)| / |delta_i| of the range that is skipped. For intervals above
    2 the errors of the steps since the range was computed are added up, as a profile has no others.
    """
    errors = {}
    for order in ("aligned", "reversed"):
        plan = replace(settings, order=order).plan(profile.anatomy, profile.steps)
        found: list[float] = []
        for rule in plan.rules:
            error = profile.range_error(*rule.block_range(profile.anatomy))  # (runs, passes, steps)
            known = np.isfinite(error).sum(axis=(0, 1))  # a pass may be left out at some steps
            change = np.nansum(error, axis=(0, 1)) / np.where(known, known, np.nan)
            for step, letter in enumerate(rule.steps):
                if letter == ".":
                    computed = step - step % settings.interval
                    found.append(float(change[computed + 1 : step + 1].sum()))
        if not np.isfinite(found).all():
            raise CalibrationError(
                "delta-dit: the profile has no errors of some of the steps that are skipped, as no guidance pass calls "
                "the model there and at the step before; give --order aligned or reversed"
            )
        errors[order] = float(np.mean(found)) if found else 0.0
    better: Order = "aligned" if errors["aligned"] <= errors["reversed"] else "reversed"
    return replace(settings, order=better), {order: round(error, 5) for order, error in errors.items()}


def within_budget(steps: int, blocks: int, share: float, interval: int | None = None) -> tuple[int, int]:
    """Return the interval N and the number N_c of blocks to skip for a share of the multiply-accumulates.

    N = ceil(T N_b M_b / M_g), and of K, the blocks that a skipped step still computes,

        K = ((M_g - (T mod N) N_b M_b) / floor(T/N) - N_b M_b) / (M_b (N - 1)),

    N_c is N_b - ceil(K). The paper prints K as if it were N_c, and divides by M_b once too often; its tables follow
    this. Rounding up computes more than the target, by less than a block at each skipped step. Where K is negative,
    because of steps that are left over, N is raised.

    Args:
        steps: T.
        blocks: N_b; all of them cost M_b, the same.
        share: M_g / (T N_b M_b), the multiply-accumulates that are aimed at, of those of all blocks at all steps.
        interval: N, if it is not to be chosen.

    Raises:
        CalibrationError: If the share cannot be reached.

    References:
        Delta-DiT, arXiv 2406.01125, equations 6 and 7.
    """
    if not 0 < share < 1:
        raise CalibrationError(f"delta-dit: the share of the MACs must be between 0 and 1, found {share:g}")
    lowest = max(2, math.ceil(1 / share - 1e-3)) if interval is None else interval
    for n in range(lowest, steps + 1 if interval is None else interval + 1):
        if not 2 <= n <= steps:
            break
        groups, left_over = divmod(steps, n)
        computed = (steps * blocks * share - left_over * blocks) / groups - blocks
        k = computed / (n - 1)
        if k > -ROUNDING:
            many = blocks - max(math.ceil(k - ROUNDING), 0)
            if many == 0:
                raise CalibrationError(f"delta-dit: a share of {share:.4g} of the MACs leaves no block to skip")
            return n, many
    least = steps if interval is None else min(max(interval, 1), steps)
    groups, left_over = divmod(steps, least)
    raise CalibrationError(
        f"delta-dit: a share of {share:.3f} of the MACs cannot be reached in {steps} steps"
        + (f" with an interval of {interval}" if interval is not None else "")
        + f"; the least is {(groups + left_over) / steps:.3f}"
    )


@dataclass(frozen=True)
class DeltaDitSpace(PlanSpace):
    """The boundary b, how many blocks N_c are skipped, the order and the interval N."""

    settings: DeltaDit = field(default_factory=DeltaDit)
    saving = ("interval", "blocks")

    def free(self) -> Mapping[str, Axis]:
        return {
            "interval": range(2, min(self.steps, LONGEST_INTERVAL) + 1),
            "blocks": range(1, len(self.anatomy.blocks) + 1),
            "boundary": range(self.steps + 1),
            "order": ("aligned", "reversed"),
        }

    def usual(self) -> Mapping[str, Any]:
        known = {**super().usual(), "boundary": self.settings.boundary_of(self.steps)}
        return {**known, "blocks": self.settings.blocks or usual_blocks(self.anatomy)}
