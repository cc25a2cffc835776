"""Plans of forecasts in which each range of blocks is computed at steps of its own, and those that lie next to them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dicache.anatomy.parts import span
from dicache.calibrate.dp import BODY, branch_of
from dicache.calibrate.foretelling import Foretelling
from dicache.calibrate.forms import Form
from dicache.calibrate.judging import ROUNDING
from dicache.calibrate.methods import letters_of
from dicache.profiler import Profile
from dicache.schedules import Plan, PlanError, Rule, Schedule
from dicache.schedules.plan import ALL, MAX_ORDER, Weights

FACTOR = 3.0  # between two trades that are next to each other
REACH = 2  # steps that a computed one is moved by
MOST = 6  # steps of a kind of move, those foretold to be best


@dataclass(frozen=True)
class Part:
    """Some blocks, and the steps at which they are computed.

    Attributes:
        first: The first block.
        last: The last block.
        computed: Steps, rising from 0.
        kind: Of branch that this is of; `*` for all.
    """

    first: int
    last: int
    computed: tuple[int, ...]
    kind: str = ALL


@dataclass(frozen=True)
class Layout:
    """What a plan computes, and how it foretells the rest.

    Attributes:
        form: What is skipped at the steps that are not computed.
        parts: The blocks of the form, each once for each kind of branch.
        source: Of the weights.
        outputs: Most computed outputs that a forecast is made of.
        trade: As the source has it.
    """

    form: Form
    parts: tuple[Part, ...]
    source: Foretelling
    outputs: int
    trade: float

    @property
    def name(self) -> str:
        return f"{self.source.name}: {self.outputs} outputs, {self.trade:.2g}"

    @property
    def always(self) -> set[int]:
        """The steps at which all of it is computed."""
        return set.intersection(*(set(part.computed) for part in self.parts))

    @property
    def ever(self) -> set[int]:
        """The steps at which any of it is computed."""
        return {step for part in self.parts for step in part.computed}


@dataclass(frozen=True)
class Move:
    """A layout next to another.

    Attributes:
        name: What was changed, in words.
        layout: Itself.
    """

    name: str
    layout: Layout


@dataclass(frozen=True)
class Layouts:
    """Makes the layouts of a model and a sampler.

    Attributes:
        profile: Of them.
        share: Of the multiply-accumulates, that is not exceeded.
    """

    profile: Profile
    share: float

    @property
    def steps(self) -> int:
        return self.profile.steps

    def first(self, form: Form, source: Foretelling, outputs: int, trade: float) -> Layout | None:
        """Return the layout that is foretold to be best, all blocks of the form at the same steps; None if none is
        cheap enough, or all steps can be computed."""
        anatomy, target = self.profile.anatomy, self.profile.provenance.target
        count = form.most_computed(anatomy, target, self.steps, self.share)
        if count is None or count == self.steps:
            return None
        first, last = form.block_range(anatomy)
        computed = source.best(form.action, count, outputs, trade)
        return Layout(form, (Part(first, last, computed),), source, outputs, trade)

    def plan(self, layout: Layout) -> Plan:
        """Return the plan, with the weights that its source foretells."""
        action, rules = layout.form.action, list[Rule]()
        whole = 0, len(self.profile.anatomy.blocks) - 1
        for part in layout.parts:
            letters = letters_of(step in part.computed for step in range(self.steps))
            if "." not in letters:
                continue
            blocks = ALL if (part.first, part.last) == whole else span(part.first, part.last)
            for kind in self._kinds(layout) if part.kind == ALL else (part.kind,):
                of = kind if kind in layout.source.kinds(action) else BODY
                weights: Mapping[int, Weights] = layout.source.weights(of, part.computed, layout.outputs, layout.trade)
                branch = ALL if kind in (ALL, BODY) else branch_of(kind, self.profile.branches)
                rule = Rule(action, letters, blocks, branch, predictor="forecast", weights=weights)
                of_part = self.profile.anatomy.blocks[part.first : part.last + 1]
                if any(rule.covers(site.branch) for block in of_part for site in block.sites):
                    rules.append(rule)
        return Plan(self.steps, tuple(rules))

    def _kinds(self, layout: Layout) -> Sequence[str]:
        kinds = layout.source.kinds(layout.form.action)
        return (ALL,) if kinds == (BODY,) else kinds

    def share_of(self, layout: Layout) -> float:
        """Return the share of the multiply-accumulates that a layout takes."""
        anatomy, target = self.profile.anatomy, self.profile.provenance.target
        return Schedule("auto", {}, anatomy, target, self.steps, self.plan(layout)).macs_fraction()

    # What lies next to a layout

    def moves(self, layout: Layout) -> Iterator[Move]:
        """Yield layouts that differ in one thing and do not exceed the share: some blocks or a kind of branch computed
        at one more step, another step computed in the place of one, other forecasts."""
        yield from self._more(layout)
        yield from self._exchanges(layout)
        for outputs in (layout.outputs - 1, layout.outputs + 1):
            if 1 <= outputs <= MAX_ORDER + 1:
                yield Move(f"{outputs} outputs", replace(layout, outputs=outputs))
        for trade in (layout.trade / FACTOR, layout.trade * FACTOR):
            yield Move(f"{layout.source.name}: {trade:.2g}", replace(layout, trade=trade))

    def _exchanges(self, layout: Layout) -> Iterator[Move]:
        always, ever = layout.always, layout.ever
        pairs = [
            (old, new)
            for old in sorted(always - {0})
            for new in range(max(1, old - REACH), min(self.steps, old + REACH + 1))
            if new not in ever
        ]
        for old, new in self._foremost(layout, pairs, [always - {old} | {new} for old, new in pairs]):
            parts = tuple(replace(p, computed=tuple(sorted({*p.computed} - {old} | {new}))) for p in layout.parts)
            yield Move(f"step {new}, not {old}", replace(layout, parts=parts))

    def _more(self, layout: Layout) -> Iterator[Move]:
        outside = [(step, step) for step in range(self.steps) if step not in layout.ever]
        steps = self._foremost(layout, outside, [layout.always | {step} for step, _ in outside])
        if not steps:
            return
        for first, last, kind in self._affordable(layout, steps[0][0]):
            what = f"blocks {span(first, last)}" if kind == ALL else kind
            for step, _ in steps:
                yield Move(f"{what} at step {step} too", self._with(layout, first, last, kind, step))

    def _foremost(
        self, layout: Layout, pairs: Sequence[tuple[int, int]], choices: Sequence[set[int]]
    ) -> list[tuple[int, int]]:
        """Return the pairs whose choices of steps are foretold to leave the smallest errors."""
        if not pairs:
            return []
        errors = layout.source.errors(layout.form.action, choices, layout.outputs, layout.trade)
        return [pairs[place] for place in errors.argsort(kind="stable")[:MOST].tolist()]

    def _affordable(self, layout: Layout, step: int) -> list[tuple[int, int, str]]:
        """Return the most blocks from the front, the most from the back, and the kinds of branch that can be computed
        at one more step."""
        start, end = layout.form.block_range(self.profile.anatomy)

        def fits(first: int, last: int, kind: str) -> bool:
            try:
                return self.share_of(self._with(layout, first, last, kind, step)) <= self.share + ROUNDING
            except PlanError:  # these blocks cannot be skipped without the others
                return False

        front = next((last for last in range(end, start - 1, -1) if fits(start, last, ALL)), None)
        back = next((first for first in range(start, end + 1) if fits(first, end, ALL)), None)
        found = [] if front is None else [(start, front, ALL)]
        found += [] if back is None else [(back, end, ALL)]
        if layout.form.action == "reuse" and len(self.profile.branches) > 1:
            found += [(start, end, kind) for kind in self.profile.branches if fits(start, end, kind)]
        return list(dict.fromkeys(found))

    def _with(self, layout: Layout, first: int, last: int, kind: str, step: int) -> Layout:
        """Return the layout in which some blocks, or one kind of their branches, are computed at one more step."""
        parts: list[Part] = []
        for part in layout.parts:
            apart = kind != ALL and part.kind == ALL
            for each in [replace(part, kind=k) for k in self.profile.branches] if apart else [part]:
                low, high = max(first, each.first), min(last, each.last)
                if low > high or kind not in (ALL, each.kind):
                    parts.append(each)
                    continue
                more = Part(low, high, tuple(sorted({*each.computed, step})), each.kind)
                cut = [replace(each, last=low - 1), more, replace(each, first=high + 1)]
                parts += [piece for piece in cut if piece.first <= piece.last]
        return replace(layout, parts=tuple(parts))
