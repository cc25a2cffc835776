"""Static plans, each row of which is one graph."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dicache.runtime.compiled.calls import Calls
from dicache.runtime.compiled.rows import Kind, RowForwards, weights_of
from dicache.runtime.compiled.settings import Compiling
from dicache.runtime.compiled.tracing import NothingKeptError
from dicache.runtime.executor import Forward, Installer
from dicache.runtime.generation import Generation, Lane
from dicache.runtime.lean import Lean
from dicache.runtime.nested_ranges import shape_keys
from dicache.runtime.predictors import Corrector
from dicache.runtime.replay import Replay
from dicache.runtime.stats import Stats
from dicache.runtime.storing import Store
from dicache.schedules import Row, Schedule
from dicache.schedules.plan import REUSED
from dicache.schedules.rows import Key, Rows


@dataclass(frozen=True)
class _Ready:
    """One step of one guidance pass, ready to run.

    Attributes:
        kind: Of its row.
        reads: Places of what was kept that it may read.
        weights: Of its predictions.
        correctors: By site.
        older: Of what is kept, how many outputs from before stay.
    """

    kind: Kind
    reads: tuple[Hashable, ...]
    weights: Tensor | None
    correctors: Mapping[str, Corrector]
    older: Mapping[Key, int]


class CompiledReplay(Replay):
    """Executes a plan by compiled calls of the model.

    What a step reads, keeps and releases, and what is counted, is found outside of the graphs, as without compiling.

    Args:
        model: The model that the schedule is for.
        schedule: Has a plan.
        installer: Puts the forwards on the modules.
        stats: Counted into.
        store: Where what is kept is put; None keeps it as it was made.
        compiling: How rows are compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        installer: Installer,
        stats: Stats,
        store: Store | None,
        compiling: Compiling,
    ) -> None:
        super().__init__(model, schedule, installer, stats, store)
        plan, anatomy = self._plan, self._anatomy
        contexts = (None, *plan.contexts)
        tables = [plan.table(anatomy, context) for context in contexts]
        self._forwards = RowForwards(
            model,
            anatomy,
            installer,
            sites={site for table in tables for site, letters in table.items() if REUSED in letters},
            ranges={part for context in contexts for part in plan.ranges(anatomy, context)},
            form=None if self._corrections is None else self._corrections.form,
        )
        self._calls = Calls(model, self._forwards.trace, compiling)
        self._readied: dict[tuple[str, int, int], _Ready] = {}
        self._weighed: tuple[torch.device, torch.dtype] | None = None  # where the weights of those are
        self._predicted: dict[str, frozenset[Key]] = {}
        self._now: tuple[_Ready, Lane] | None = None

    def _lean(self, row: Row, correctors: Mapping[str, Corrector]) -> Lean:
        """Return the forwards that ask which row runs; a compiler leaves out by itself what nothing needs."""
        return Lean(self._model, self._anatomy, Row(), self._forwards.trace.program, self._embeddings)

    def prepare(self, lane: Lane, context: str, generation: Generation) -> None:
        super().prepare(lane, context, generation)
        like = next(self._model.parameters())  # which may be moved from one generation to the next
        if (like.device, like.dtype) != self._weighed:
            self._readied.clear()
            self._weighed = like.device, like.dtype
        key = (context, generation.step, lane.since)
        if key not in self._readied:
            self._readied[key] = self._ready(context, generation.step, lane.since)
        self._now = self._readied[key], lane

    def leave(self) -> None:
        super().leave()
        self._now = None

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the model for the step that was prepared.

        Args:
            forward: The model's.
            args, kwargs: Of the call.
        """
        assert self._now is not None
        ready, lane = self._now
        kept = {key: self._kept(key) for key in ready.reads if key in lane.entries}
        factors = {
            site: corrector.factors(kept[site], lane.batch)
            for site, corrector in ready.correctors.items()
            if site in kept
        }
        try:
            results = self._calls.run(
                ready.kind,
                lambda: self._forwards.program(ready.kind),
                lane,
                forward,
                args,
                kwargs,
                kept=kept,
                weights=ready.weights,
                factors=factors,
            )
        except NothingKeptError:
            self._kept(next(key for key in ready.reads if key not in kept))
            raise
        made: dict[Any, Any] = results.made
        for key, value in made.items():
            inside = isinstance(key, tuple) and isinstance(key[1], str)
            if inside:  # the shape of a module inside of a site or a range, which takes no memory
                self._entries[key] = value
            else:
                self._push(key, value, ready.older.get(key, 0))
        self._ran.update(results.ran)
        self._ran.update(part for part in ready.kind.keep_delta if part in made)
        return results.out

    def _ready(self, context: str, step: int, since: int) -> _Ready:
        rows = self._rows[context]
        row = rows.row(step, since=since)
        correctors = {site: self._corrector(context, site, step) for site in self._corrected(rows, row, step, since)}
        predict, scale = dict(row.predict), dict(row.scale)
        used: list[Key] = [*sorted(row.reuse), *row.skip]
        predicted = [
            key for key in used if key in self._ever_predicted(context, rows) or key in predict or key in scale
        ]
        orders = tuple((key, len(predict.get(key, ()))) for key in predicted)
        kind = Kind(
            row.reuse,
            row.skip,
            row.keep,
            row.keep_delta,
            row.features,
            orders,
            frozenset(correctors.keys() - dict(orders)),
        )
        like = next(self._model.parameters())
        weights = weights_of(orders, predict, scale, like)
        return _Ready(kind, self._reads(row, dict(orders)), weights, correctors, dict(row.keep_older))

    def _ever_predicted(self, context: str, rows: Rows) -> frozenset[Key]:
        """Return what is predicted at some step, and so is weighed at all, lest a weight of 1 be another graph."""
        if context not in self._predicted:
            every = [rows.row(step) for step in range(rows.steps)]
            self._predicted[context] = frozenset(key for row in every for key, _ in (*row.predict, *row.scale))
        return self._predicted[context]

    def _reads(self, row: Row, orders: Mapping[Key, int]) -> tuple[Hashable, ...]:
        used: tuple[Key, ...] = (*row.reuse, *row.skip)
        aged = ((key, age) for key in used for age in range(1, orders.get(key, 0) + 1))
        inner = (
            (block.key(site), path)
            for block in self._anatomy.blocks
            for site in block.sites
            for path in site.inner
            if block.key(site) in row.reuse
        )
        return (*used, *aged, *inner, *(key for part in row.skip for key in shape_keys(self._anatomy, part)))
