"""Delta-Cache: skip a range of blocks at most steps, and add what it added at the last step that computed it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dicache.anatomy import Anatomy
from dicache.anatomy.parts import span
from dicache.calibrate.methods import Axis, CalibrationError, method
from dicache.calibrate.spaces import PlanSpace
from dicache.schedules import Plan, Rule

RANGES = ("shallow", "middle", "deep")
USUAL_SHARE = 0.75  # of the blocks, in a named range: 21 of 28 in the paper


@method("delta-cache")
@dataclass(frozen=True)
class DeltaCache:
    """Compute everything every `interval` steps, and skip a range of blocks in between.

    Of a U-Net it skips what lies inside one skip connection, wherever what enters that has the shape of what leaves it.

    Attributes:
        interval: Steps from one full computation to the next; 1 computes everything. Steps that are left over at the
            end, less than an interval, are computed, as the paper's count of operations has it.
        blocks: `shallow`, `middle` or `deep`, three quarters of the blocks; a range such as `7-27`, both ends
            included; or how many, such as `21`.
        start: First block of so many; the first of all when left out.
        branch: In the place of both, of a U-Net: the skip connection, 0 the outermost, as DeepCache counts them.

    References:
        Delta-DiT, arXiv 2406.01125, section 3.2; of a U-Net, appendix G.
    """

    interval: int = 2
    blocks: str = "deep"
    start: int | None = None
    branch: int | None = None

    def __post_init__(self) -> None:
        check_interval("delta-cache", self.interval)
        if self.blocks not in RANGES and re.fullmatch(r"\d+(-\d+)?", self.blocks, re.ASCII) is None:
            raise CalibrationError(
                f"delta-cache: blocks must be {', '.join(RANGES)}, a range such as 7-27 or a number, "
                f"found {self.blocks!r}"
            )
        if self.start is not None and not self.blocks.isdecimal():
            raise CalibrationError(
                f"delta-cache: a first block goes with a number of blocks, found {self.start} and {self.blocks!r}; "
                f"leave it out, or write 21 for the blocks"
            )
        if self.branch is not None and (self.blocks != DeltaCache.blocks or self.start is not None):
            raise CalibrationError(f"delta-cache: give either the blocks, found {self.blocks!r}, or a U-Net's branch")

    def plan(self, anatomy: Anatomy, steps: int) -> Plan:
        letters = interval_letters("delta-cache", self.interval, steps)
        if self.interval == 1:
            return Plan(steps)
        if self.branch is not None:
            blocks = enclosed_span("delta-cache", anatomy, self.branch, delta=True)
        elif anatomy.links and self.blocks in RANGES:
            raise CalibrationError(
                f"delta-cache: {anatomy.model} is a U-Net, of which no {self.blocks} blocks can be skipped; "
                f"give a branch, {_branches(anatomy, delta=True)}"
            )
        else:
            blocks = checked_span("delta-cache", anatomy, *self.range_of(anatomy))
        return Plan(steps, (Rule("skip", letters, blocks=blocks),))

    def range_of(self, anatomy: Anatomy) -> tuple[int, int]:
        """Return the first block, and how many."""
        count = len(anatomy.blocks)
        if self.blocks in RANGES:
            many = usual_blocks(anatomy)
            return {"shallow": 0, "middle": (count - many) // 2, "deep": count - many}[self.blocks], many
        if self.blocks.isdecimal():
            return self.start or 0, int(self.blocks)
        first, last = (int(part) for part in self.blocks.split("-"))
        return first, last - first + 1


@dataclass(frozen=True)
class DeltaCacheSpace(PlanSpace):
    """The interval N, how many blocks N_c are skipped and which is the first of them, I; of a U-Net the branch."""

    saving = ("interval", "blocks")

    def free(self) -> Mapping[str, Axis]:
        axes: dict[str, Axis] = {"interval": self.intervals}
        if self.anatomy.links:
            return {**axes, "branch": tuple(_enclosed(self.anatomy, delta=True))}
        if "blocks" in self.fixed:
            return axes
        count = len(self.anatomy.blocks)
        return {**axes, "blocks": range(1, count + 1), "start": range(count)}

    def usual(self) -> Mapping[str, Any]:
        known = {**super().usual(), "branch": next(iter(_enclosed(self.anatomy, delta=True)), None)}
        if "blocks" not in self.axes:
            return known
        start, many = self.settings.range_of(self.anatomy)
        return {**known, "start": start, "blocks": many}

    def with_parameters(self, parameters: Mapping[str, Any]) -> Any:
        given = dict(parameters)
        if "blocks" in given:
            given["blocks"] = str(given["blocks"])
        return replace(self.settings, **given)


def usual_blocks(anatomy: Anatomy) -> int:
    """Return how many blocks are usually skipped."""
    return max(1, round(USUAL_SHARE * len(anatomy.blocks)))


def check_interval(name: str, interval: int) -> None:
    if interval < 1:
        raise CalibrationError(
            f"{name}: the interval must be 1 (compute everything) or more, found {interval}; 2 is usual"
        )


def interval_letters(name: str, interval: int, steps: int) -> str:
    """Return a letter a step: `C` at the first of each interval and at what is left over at the end, else `.`."""
    if interval > steps:
        raise CalibrationError(f"{name}: the interval must be at most the {steps} steps, found {interval}")
    whole = steps // interval * interval
    return "".join("." if i % interval and i < whole else "C" for i in range(steps))


def checked_span(name: str, anatomy: Anatomy, first: int, many: int, *, delta: bool = True) -> str:
    """Return a range of blocks as a rule has it.

    Raises:
        CalibrationError: If the model does not have these blocks, or one delta cannot stand for them.
    """
    count, last = len(anatomy.blocks), first + many - 1
    if many < 1 or first < 0:
        raise CalibrationError(f"{name}: at least one block must be skipped, found {max(many, 0)} from block {first}")
    if last >= count:
        raise CalibrationError(
            f"{name}: blocks {first}-{last} are skipped, but {anatomy.model} has the blocks 0-{count - 1}; "
            f"skip {count - first} or fewer from block {first}"
            if first < count
            else f"{name}: there is no block {first}; {anatomy.model} has the blocks 0-{count - 1}"
        )
    if anatomy.segment(first) != anatomy.segment(last):
        what = "delta" if delta else "feature map"
        raise CalibrationError(
            f"{name}: no one {what} stands for blocks {first}-{last}, which lie in several segments of "
            f"{anatomy.model}; {_way_out(name, anatomy)}"
        )
    if obstacle := anatomy.obstacle(first, last + 1, delta=delta):
        raise CalibrationError(
            f"{name}: blocks {span(first, last)} of {anatomy.model} cannot be skipped: {obstacle}. What can be is what "
            f"lies inside a skip connection: {', '.join(_enclosed(anatomy, delta).values())}"
        )
    return span(first, last)


def _way_out(name: str, anatomy: Anatomy) -> str:
    """Return what to do where a range lies in several segments."""
    lengths = [stop - start for start, stop in anatomy.segments]
    if max(lengths) == 1:
        return "none of them has more than one block, so take a method that reuses branches, such as fora or taylorseer"
    if name == "delta-cache":
        within = " or ".join(span(start, stop - 1) for start, stop in anatomy.segments)
        return f"choose them within {within}, such as --blocks {span(*_longest(anatomy))}"
    most = min(lengths[0], lengths[-1]) if name == "delta-dit" else lengths[0]
    return f"skip --blocks {most} or fewer"


def _longest(anatomy: Anatomy) -> tuple[int, int]:
    start, stop = max(anatomy.segments, key=lambda segment: segment[1] - segment[0])
    return start, stop - 1


def enclosed_span(name: str, anatomy: Anatomy, branch: int, *, delta: bool) -> str:
    """Return the blocks inside one skip connection of a U-Net as a rule has them.

    Raises:
        CalibrationError: If the model is no U-Net, or has no such connection, or nothing can stand for its inside.
    """
    if not anatomy.links:
        way_out = "fora or faster-diffusion" if name == "deepcache" else "the blocks"
        raise CalibrationError(
            f"{name}: a branch is a skip connection of a U-Net, and {anatomy.model} has none; take {way_out} instead"
        )
    known = _enclosed(anatomy, delta)
    if branch in known:
        return known[branch]
    why = ""
    if 0 <= branch < len(anatomy.links):
        obstacle = anatomy.obstacle(*anatomy.enclosed(branch), delta=delta)
        why = f" (blocks {_span_of(anatomy, branch)}: {obstacle})" if obstacle else ""
    raise CalibrationError(
        f"{name}: found branch {branch}{why}, needed one of {anatomy.model}: {_branches(anatomy, delta=delta)}"
    )


def _enclosed(anatomy: Anatomy, delta: bool) -> dict[int, str]:
    """Return the branches whose inside can be skipped, with its blocks."""
    inside = {branch: anatomy.enclosed(branch) for branch in range(len(anatomy.links))}
    return {
        branch: _span_of(anatomy, branch)
        for branch, (start, stop) in inside.items()
        if start < stop and not anatomy.obstacle(start, stop, delta=delta)
    }


def _span_of(anatomy: Anatomy, branch: int) -> str:
    start, stop = anatomy.enclosed(branch)
    return span(start, stop - 1)


def _branches(anatomy: Anatomy, *, delta: bool) -> str:
    known = [str(branch) for branch in _enclosed(anatomy, delta)]
    return f"{', '.join(known[:-1])} or {known[-1]}" if len(known) > 1 else "".join(known)
