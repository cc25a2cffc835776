"""Rows: what one step reads, keeps and releases, found by looking ahead in the plan."""

from collections.abc import Callable
from dataclasses import dataclass

from dicache.anatomy.parts import Anatomy
from dicache.schedules.plan import ACT, COMPUTE, REUSED, Plan

Range = tuple[int, int]  # blocks [start, stop) inside one segment that one delta replaces


@dataclass(frozen=True)
class Row:
    """The actions of one step.

    Attributes:
        reuse: Sites whose kept output is given again.
        skip: Ranges of blocks replaced by their kept delta.
        keep: Sites whose output a later step will read.
        keep_delta: Ranges whose delta a later step will read.
        release: Sites that nothing reads any more once this step is done.
        release_delta: Ranges likewise.
    """

    reuse: frozenset[str] = frozenset()
    skip: tuple[Range, ...] = ()
    keep: frozenset[str] = frozenset()
    keep_delta: tuple[Range, ...] = ()
    release: frozenset[str] = frozenset()
    release_delta: tuple[Range, ...] = ()


class Rows:
    """The rows of one context of a plan.

    Args:
        plan: What to compute.
        anatomy: The model's.
        context: The guidance pass; None applies only the rules for every context.

    Raises:
        PlanError: If the plan does not fit the model.
    """

    def __init__(self, plan: Plan, anatomy: Anatomy, context: str | None = None) -> None:
        self.steps = plan.steps
        self._sites = plan.table(anatomy, context)
        self._ranges = _ranges(plan, anatomy, context)

    def row(self, step: int, *, compute: bool = False) -> Row:
        """Return the row of a step; with `compute`, as if nothing had been kept before it and all must be computed."""
        reuse = frozenset(key for key, letters in self._sites.items() if letters[step] == REUSED and not compute)
        skip = tuple(r for r, letters in self._ranges.items() if letters[step] == ACT and not compute)
        made = {key for key, letters in self._sites.items() if compute or letters[step] == COMPUTE}
        made_delta = [r for r, letters in self._ranges.items() if compute or letters[step] == COMPUTE]
        return Row(
            reuse=reuse,
            skip=skip,
            keep=frozenset(key for key in made if _read_later(self._sites[key], step, REUSED)),
            keep_delta=tuple(r for r in made_delta if _read_later(self._ranges[r], step, ACT)),
            release=frozenset(key for key in reuse if not _read_later(self._sites[key], step, REUSED)),
            release_delta=tuple(r for r in skip if not _read_later(self._ranges[r], step, ACT)),
        )


def _read_later(letters: str, step: int, read: str) -> bool:
    """Whether an entry held at the end of `step` is read before it is made anew."""
    following = letters[step + 1 :]
    return read in following[: following.index(COMPUTE)] if COMPUTE in following else read in following


def _ranges(plan: Plan, anatomy: Anatomy, context: str | None) -> dict[Range, str]:
    """Return, for every range that is skipped at some step, a letter a step.

    `.` where it is skipped, `C` where it runs and its delta can be taken, `x` where part of it is skipped by another
    range, so that its delta cannot.
    """
    acts: dict[Range, list[bool]] = {}
    for rule in plan.rules:
        if rule.action != "skip" or rule.context not in ("*", context):
            continue
        start, stop = rule.block_range(anatomy)
        for first, last in anatomy.segments:
            part = (max(start, first), min(stop, last))
            if part[0] < part[1]:
                marks = acts.setdefault(part, [False] * plan.steps)
                acts[part] = [mark or letter == ACT for mark, letter in zip(marks, rule.steps, strict=True)]

    def letter(part: Range, step: int) -> str:
        if acts[part][step]:
            return ACT
        overlap: Callable[[Range], bool] = lambda other: other[0] < part[1] and part[0] < other[1]  # noqa: E731
        return "x" if any(acts[other][step] and overlap(other) for other in acts) else COMPUTE

    return {part: "".join(letter(part, step) for step in range(plan.steps)) for part in acts}
