"""Rows: what one step reads, keeps and releases, found by looking ahead in the plan."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from dicache.anatomy.parts import Anatomy
from dicache.schedules.plan import ACT, COMPUTE, MAX_ORDER, REUSED, Plan, PlanError, StandIn
from dicache.schedules.predicting import as_differences, taylor_coefficients

Range = tuple[int, int]  # blocks [start, stop) inside one segment that one delta replaces
Key = str | Range  # of a site, or of a range
Older = tuple[Key, int]  # what was computed so many times before the last


@dataclass(frozen=True)
class Row:
    """The actions of one step.

    Attributes:
        reuse: Sites whose kept output is given again, or a prediction from it.
        skip: Ranges of blocks replaced by their kept delta, or a prediction from it.
        keep: Sites whose output a later step will read.
        keep_delta: Ranges whose delta a later step will read.
        release: Sites that nothing reads any more once this step is done.
        release_delta: Ranges likewise.
        features: Ranges whose output itself stands in the place of their delta.
        predict: The sites and ranges that are predicted from more than their last output, with the weights of the
            differences of successive outputs, the last ones first.
        scale: What the last output of a site or a range is multiplied with in its prediction, where that is not 1.
        keep_older: The sites and ranges of which, besides what is kept now, so many outputs from before stay.
        release_older: Outputs from before that nothing reads any more once this step is done.
    """

    reuse: frozenset[str] = frozenset()
    skip: tuple[Range, ...] = ()
    keep: frozenset[str] = frozenset()
    keep_delta: tuple[Range, ...] = ()
    release: frozenset[str] = frozenset()
    release_delta: tuple[Range, ...] = ()
    features: tuple[Range, ...] = ()
    predict: tuple[tuple[Key, tuple[float, ...]], ...] = ()
    scale: tuple[tuple[Key, float], ...] = ()
    keep_older: tuple[tuple[Key, int], ...] = ()
    release_older: tuple[Older, ...] = ()


class Rows:
    """The rows of one context of a plan.

    Args:
        plan: What to compute.
        anatomy: The model's.
        context: The guidance pass; None applies only the rules for every context.

    Raises:
        PlanError: If the plan does not fit the model, or a forecast is not of the outputs computed last.
    """

    def __init__(self, plan: Plan, anatomy: Anatomy, context: str | None = None) -> None:
        self.steps = plan.steps
        stand_ins, ranges = plan.stand_ins(anatomy, context), plan.ranges(anatomy, context)
        self._sites = {
            key: _Course(letters.replace(REUSED, ACT), stand_ins.get(key, {}))
            for key, letters in plan.table(anatomy, context).items()
        }
        self._ranges = {part: _Course(letters, ranges[part]) for part, letters in _letters(ranges, plan.steps).items()}

    def row(self, step: int, *, since: int = 0) -> Row:
        """Return the row of a step.

        Args:
            step: Which.
            since: The step that everything was or is computed at, because nothing was kept before it.
        """
        sites = {key: course.at(step, since) for key, course in self._sites.items()}
        ranges = {part: course.at(step, since) for part, course in self._ranges.items()}
        everything: list[tuple[Key, _Step]] = [*sites.items(), *ranges.items()]
        return Row(
            reuse=frozenset(key for key, here in sites.items() if here.acts),
            skip=tuple(part for part, here in ranges.items() if here.acts),
            keep=frozenset(key for key, here in sites.items() if here.computes and here.after),
            keep_delta=tuple(part for part, here in ranges.items() if here.computes and here.after),
            release=frozenset(key for key, here in sites.items() if here.acts and not here.after),
            release_delta=tuple(part for part, here in ranges.items() if here.acts and not here.after),
            features=tuple(part for part, course in self._ranges.items() if course.feature),
            predict=tuple((key, here.coefficients) for key, here in everything if here.coefficients),
            scale=tuple((key, here.scale) for key, here in everything if here.scale != 1),
            keep_older=tuple((key, here.after - 1) for key, here in everything if here.computes and here.after > 1),
            release_older=tuple(
                (key, age) for key, here in everything for age in range(max(here.after, 1), here.before) if here.acts
            ),
        )

    def held_from(self, site: str, step: int, since: int = 0) -> int:
        """Return the step that a site's last output before a step is of."""
        return self._sites[site].computed(step - 1, since)[0]


def distinct_rows(plan: Plan, anatomy: Anatomy) -> int:
    """Return how many rows of a plan do different things, whatever the weights of what they predict, and however many
    outputs from before stay.

    It is how many graphs a compiled replay needs for a guidance pass; of passes with rules of their own, the most.
    """
    return max(_distinct(Rows(plan, anatomy, context)) for context in (None, *plan.contexts))


def _distinct(rows: Rows) -> int:
    def does(row: Row) -> Hashable:
        predicts = frozenset((key, len(coefficients)) for key, coefficients in row.predict)
        return row.reuse, row.skip, row.keep, row.keep_delta, row.features, predicts

    return len({does(rows.row(step)) for step in range(rows.steps)})


@dataclass(frozen=True)
class _Step:
    """What happens to one site or range at a step.

    Attributes:
        computes: Whether its output or delta is made.
        acts: Whether a stand-in is given for it.
        before: How many of its outputs are held when the step begins.
        after: How many are held when it is done.
        coefficients: With which the differences of the outputs held are weighed in the stand-in.
        scale: Of the last output in it.
    """

    computes: bool
    acts: bool
    before: int
    after: int
    coefficients: tuple[float, ...] = ()
    scale: float = 1.0


class _Course:
    """One site or range over all steps.

    Args:
        letters: A letter a step: `C` computed, `.` a stand-in is given, another where it does not run at all.
        stand_ins: Which is given, by step.
    """

    def __init__(self, letters: str, stand_ins: Mapping[int, StandIn]) -> None:
        self._letters = letters
        self._stand_ins = stand_ins
        self._most = max((stand_in.order for stand_in in stand_ins.values()), default=0)
        self.feature = any(stand_in.predictor == "feature" for stand_in in stand_ins.values())
        last = [0]
        for step, letter in enumerate(letters):
            if letter == COMPUTE:
                last = [step, *last][: MAX_ORDER + 1] if step else last
            if letter == ACT and (weights := stand_ins[step].weights):
                sources = [source for source, _ in weights]
                if sources != (found := last[: len(sources)]):
                    raise PlanError(
                        f"the forecast of step {step} is of steps {sources}, but those computed last are {found}"
                    )

    def at(self, step: int, since: int) -> _Step:
        computes = step == since or self._letters[step] == COMPUTE
        acts = not computes and self._letters[step] == ACT
        before = self._held(step - 1, since) if step > since else 0
        after = self._held(step, since)
        if not acts:
            return _Step(computes, acts, before, after)
        _, order, weights = self._stand_ins[step]
        held = self.computed(step - 1, since)[: order + 1]
        if weights and held == [source for source, _ in weights]:
            return _Step(computes, acts, before, after, *as_differences([weight for _, weight in weights]))
        return _Step(computes, acts, before, after, taylor_coefficients(held, step) if order else ())

    def computed(self, last: int, since: int) -> list[int]:
        """Return the steps up to `last` that it was computed at, the last one first."""
        return [i for i in range(last, since, -1) if self._letters[i] == COMPUTE] + [since]

    def _held(self, step: int, since: int) -> int:
        """Return how many of the last outputs computed are held once a step is done, because later steps read them."""
        most = newer = 0
        for later in range(step + 1, len(self._letters)):
            if self._letters[later] == COMPUTE:
                newer += 1
                if newer > self._most:
                    break
            elif self._letters[later] == ACT:
                most = max(most, self._stand_ins[later].order + 1 - newer)
        return min(most, len(self.computed(step, since))) if most > 1 else most


def _letters(ranges: Mapping[Range, Mapping[int, StandIn]], steps: int) -> dict[Range, str]:
    """Return, for every range that a rule is to skip, a letter a step.

    `.` where it is skipped, `C` where it runs and its delta can be taken, `x` where part of it is skipped by another
    range, so that its delta cannot.
    """

    def letter(part: Range, step: int) -> str:
        if step in ranges[part]:
            return ACT
        overlap: Callable[[Range], bool] = lambda other: other[0] < part[1] and part[0] < other[1]  # noqa: E731
        return "x" if any(step in ranges[other] and overlap(other) for other in ranges) else COMPUTE

    return {part: "".join(letter(part, step) for step in range(steps)) for part in ranges}
