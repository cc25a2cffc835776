"""Static plans: every distinct row is a set of specialised forwards that are put on the modules for its steps."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import nn

from dicache.anatomy import Anatomy
from dicache.anatomy.parts import block_of
from dicache.anatomy.standins import pass_on, view_of_zero
from dicache.runtime.executor import Forward, Installer, Program
from dicache.runtime.generation import Generation, Lane, Signature
from dicache.runtime.lean import KINDS, Embeddings, Lean
from dicache.runtime.nested_ranges import Nested, shape_keys
from dicache.runtime.predictors import Corrector, foretell
from dicache.runtime.stats import Stats, bytes_of
from dicache.runtime.storing import Store
from dicache.runtime.streams import Streams, Tensors, add, delta, replace
from dicache.schedules import Range, Row, Rows, Schedule, ScheduleError
from dicache.schedules.plan import ACT
from dicache.schedules.rows import Key


class Replay:
    """Executes a plan. A module whose output is computed and not kept runs its own forward, unwrapped.

    Args:
        model: The model that the schedule is for.
        schedule: Has a plan.
        installer: Puts the forwards on the modules.
        stats: Counted into.
        store: Where what is kept is put; None keeps it as it was made.
    """

    def __init__(
        self, model: nn.Module, schedule: Schedule, installer: Installer, stats: Stats, store: Store | None = None
    ) -> None:
        assert schedule.plan is not None
        self._model = model
        self._anatomy = anatomy = schedule.anatomy
        self._plan = schedule.plan
        self._corrections = schedule.corrections
        self._installer = installer
        self._stats = stats
        self._store = store
        self._rows: dict[str, Rows] = {}
        self._programs: dict[tuple[Any, ...], Lean] = {}
        self._correctors: dict[tuple[str, str, int], Corrector] = {}
        self._steps: dict[tuple[str, int, int], _Step] = {}
        self._embeddings = Embeddings([model.get_submodule(block.module) for block in anatomy.blocks], installer)
        self._running = _Step(Row(), Lean(model, anatomy, Row(), {}, self._embeddings), anatomy)
        self._kind: tuple[Signature, bool] = ((), False)  # of the call that is running
        self._entries: dict[Any, Any] = {}  # of its lane
        self._batch = 1
        self._before: dict[Key, Any] = {}  # last outputs of sites of which older ones stay, when it began
        self._inputs: dict[Range, Tensors] = {}
        self._ran: set[Range] = set()  # ranges whose delta was kept or put in, in the call that runs
        self._streams: dict[int, Streams] = {}
        for block in anatomy.blocks:
            module = model.get_submodule(block.module)
            self._streams[block.index] = Streams(block, module, installer.original(module))
        self._nested = Nested(model, anatomy, installer, self._streams, lambda: self._entries, self._push)

    def prepare(self, lane: Lane, context: str, generation: Generation) -> None:
        """Put the forwards of this step's row in place for a call of `lane`."""
        if lane.since < 0:
            lane.since = generation.step
        step = self._step(context, generation.step, lane.since)
        entries = lane.entries
        missing = [entry for entry, of in step.reads if entry not in entries]
        if missing and any(not isinstance(of, str) or of in lane.made for entry, of in step.reads if entry in missing):
            # The pass left out the block of a site that it had called before, or one at which a range begins or ends,
            # so that nothing was kept: it computes. A site that it has never called is not waited for.
            lane.since = generation.step
            lane.made.clear()
            step = self._step(context, generation.step, lane.since)
        if step.ageing:
            self._before = {key: entries.get(key) for key in step.ageing}
        for key in step.replaced:
            entries.pop(key, None)
        self._running = step
        self._kind = (lane.signature, lane.single == "halves")
        self._installer.install(step.lean.program(self._kind))
        self._entries = entries
        self._batch = lane.batch
        if self._store is not None:
            self._store.begin(entries.get(entry) for entry, _ in step.reads)

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the model, whose modules have the step's forwards."""
        return forward(*args, **kwargs)

    def finish(self, lane: Lane) -> None:
        """Release what no later step reads, and count the call."""
        step, stats = self._running, self._stats
        if step.changes or step.row.skip:
            self._check_ran(step, lane)
        for key in step.released:
            lane.entries.pop(key, None)
        stats.reused_sites += step.reused
        stats.skipped_sites += step.skipped
        stats.computed_sites += step.computed
        stats.macs += step.macs / 2 if lane.single == "halves" else step.macs
        if step.changes:  # what a step leaves behind depends on nothing but the step and the shapes
            if self._kind not in step.bytes_held:
                if len(step.bytes_held) == KINDS:
                    step.bytes_held.clear()
                step.bytes_held[self._kind] = bytes_of(lane.entries)
            lane.bytes_held = step.bytes_held[self._kind]

    def _check_ran(self, step: "_Step", lane: Lane) -> None:
        """Forget what was not made anew, and refuse what was not put in, because the model did not call the blocks."""
        row, entries = step.row, lane.entries
        absent: list[Key] = [key for key in step.replaced if entries.get(key) is None]
        absent += [key for key, before in self._before.items() if entries.get(key) is before]
        for key in absent:
            _forget(lane, key)
        lane.made |= row.keep.difference(absent) if absent else row.keep
        if self._anatomy.links:
            return
        for part in row.keep_delta:
            if part not in self._ran:
                _forget(lane, part)
        for start, stop in row.skip:
            if (start, stop) not in self._ran:
                raise ScheduleError(
                    f"blocks {start} to {stop - 1} are skipped by what they add, which goes in at block {start}, and "
                    "this guidance pass does not call it any more; limit the schedule's rule to the other passes"
                )

    def fail(self, generation: Generation) -> None:
        """A plan has nobody to tell."""

    def leave(self) -> None:
        """Forget the call that ran, also when it failed."""
        self._entries = {}
        self._before = {}
        self._inputs.clear()
        self._ran.clear()
        self._nested.clear()
        self._embeddings.clear()
        if self._store is not None:
            self._store.leave()

    @property
    def letter(self) -> str:
        return self._running.letter

    @property
    def distance(self) -> None:
        return None

    def _step(self, context: str, step: int, since: int) -> "_Step":
        key = (context, step, since)
        if key not in self._steps:
            rows = self._rows.get(context)
            if rows is None:
                rows = self._rows[context] = Rows(self._plan, self._anatomy, context)
            row = rows.row(step, since=since)
            correctors = {
                site: self._corrector(context, site, step) for site in self._corrected(rows, row, step, since)
            }
            kept = (row.keep, row.keep_delta, row.keep_older, row.features)
            same = (row.reuse, row.skip, *kept, row.predict, row.scale, *correctors.items())
            if same not in self._programs:
                self._programs[same] = self._lean(row, correctors)
            self._steps[key] = _Step(row, self._programs[same], self._anatomy)
        return self._steps[key]

    def _corrected(self, rows: Rows, row: Row, step: int, since: int) -> list[str]:
        """Return the sites whose held output is corrected: as a trend says, from the step that it is held since."""
        if self._corrections is None:
            return []
        sites = [site for site, letters in self._corrections.sites.items() if letters[step] == ACT]
        return [s for s in sites if s in row.reuse and rows.held_from(s, step, since) == rows.held_from(s, step)]

    def _corrector(self, context: str, site: str, step: int) -> Corrector:
        key = (context, site, step)
        if key not in self._correctors:
            assert self._corrections is not None
            self._correctors[key] = Corrector(self._corrections, *key, self._stats)
        return self._correctors[key]

    def _lean(self, row: Row, correctors: Mapping[str, Corrector]) -> Lean:
        """Return the forwards that are put on the modules for the steps of a row."""
        return Lean(self._model, self._anatomy, row, self._build(row, correctors), self._embeddings)

    def _build(self, row: Row, correctors: Mapping[str, Corrector]) -> Program:
        older = dict(row.keep_older)
        program: Program = {}
        skipped = {index for start, stop in row.skip for index in range(start, stop)}
        for block in self._anatomy.blocks:
            if block.index in skipped:
                continue
            reused = {site.branch for site in block.sites if block.key(site) in row.reuse}
            for site in block.sites:
                key = block.key(site)
                module = self._installer.part(self._model, f"{block.module}.{site.module}")
                inner = {path: self._installer.part(self._model, f"{block.module}.{path}") for path in site.inner}
                if site.branch in reused:
                    program[module] = self._stand_in(row, key, correctors.get(key))
                    program |= {piece: self._give((key, path)) for path, piece in inner.items()}
                elif key in row.keep:
                    program[module] = self._keep(key, self._installer.original(module), older.get(key, 0))
                    for path, piece in inner.items():
                        program[piece] = self._keep_shape((key, path), self._installer.original(piece))
            for path, feeds in block.norms.items():
                if reused.issuperset(feeds):
                    program[self._model.get_submodule(f"{block.module}.{path}")] = pass_on
        for part in row.skip if self._anatomy.links else ():
            program |= self._nested.skip(part, self._stand_in(row, part), feature=part in row.features)
        for part in row.keep_delta if self._anatomy.links else ():
            program |= self._nested.keep(part, program, older.get(part, 0), feature=part in row.features)
        if self._anatomy.links:
            return program
        for part in row.skip:
            for index in range(*part):
                streams = self._streams[index]
                program[streams.module] = _through(streams)
            first = self._streams[part[0]]
            change = self._stand_in(row, part)
            program[first.module] = self._changed(part, first, change, replace if part in row.features else add)
        for part in row.keep_delta:
            first, last = self._streams[part[0]], self._streams[part[1] - 1]
            forward = program.get(last.module, last.forward)
            if part in row.features:
                program[last.module] = self._exit(part, last, forward, older.get(part, 0), feature=True)
                continue
            program[last.module] = self._exit(part, last, forward, older.get(part, 0))
            program[first.module] = self._enter(part, first, program.get(first.module, first.forward))
        return program

    def _stand_in(self, row: Row, key: Key, corrector: Corrector | None = None) -> Forward:
        """Return what gives the stand-in for a site or a range."""
        coefficients, scale = dict(row.predict).get(key, ()), dict(row.scale).get(key, 1.0)
        if coefficients or scale != 1:
            keys = (key, *((key, age) for age in range(1, len(coefficients) + 1)))
            return lambda *_args, **_kwargs: foretell([self._kept(kept) for kept in keys], coefficients, scale)
        if corrector is not None:
            return lambda *_args, **_kwargs: corrector(self._kept(key), self._batch)
        return self._give(key)

    def _give(self, key: Hashable) -> Forward:
        if self._store is not None:
            return lambda *_args, **_kwargs: self._kept(key)

        def give(*_args: Any, **_kwargs: Any) -> Any:
            kept = self._entries.get(key)
            return self._kept(key) if kept is None else kept

        return give

    def _kept(self, key: Any) -> Any:
        if key not in self._entries:
            site = key if isinstance(key, str) else key[0]
            raise ScheduleError(
                f"the output of site {site} is to be reused, and none was kept, because this guidance pass did not "
                "call its block when it was computed and does now; limit the schedule's rule to the other passes, or "
                "to blocks that are always called"
            )
        entry = self._entries[key]
        return entry if self._store is None else self._store.get(entry)

    def _keep(self, key: str, forward: Forward, older: int) -> Forward:
        def keep(*args: Any, **kwargs: Any) -> Any:
            out = self._entries[key] = forward(*args, **kwargs)
            return out

        def push(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            self._push(key, out, older)
            return out

        return push if older or self._store is not None else keep

    def _push(self, key: Key, out: Any, older: int) -> None:
        """Keep an output, and so many of those before it."""
        entries = self._entries
        for age in range(older, 1, -1):
            if (key, age - 1) in entries:  # not after a call that left the block out
                entries[key, age] = entries[key, age - 1]
        if older and key in entries:
            entries[key, 1] = entries[key]
        entries[key] = out if self._store is None else self._store.put(out)

    def _keep_shape(self, key: Hashable, forward: Forward) -> Forward:
        def keep_shape(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            self._entries[key] = view_of_zero(out)
            return out

        return keep_shape

    def _enter(self, part: Range, streams: Streams, forward: Forward) -> Forward:
        def enter(*args: Any, **kwargs: Any) -> Any:
            self._inputs[part] = streams.read(args, kwargs)
            return forward(*args, **kwargs)

        return enter

    def _changed(
        self, part: Range, streams: Streams, change: Forward, act: Callable[[Tensors, Tensors], Tensors]
    ) -> Forward:
        def changed(*args: Any, **kwargs: Any) -> Any:
            self._ran.add(part)
            return streams.pack(act(streams.read(args, kwargs), change()))

        return changed

    def _exit(self, part: Range, streams: Streams, forward: Forward, older: int, *, feature: bool = False) -> Forward:
        def leave(*args: Any, **kwargs: Any) -> Any:
            returned = forward(*args, **kwargs)
            left = streams.unpack(returned)
            if feature or part in self._inputs:
                self._push(part, left if feature else delta(left, self._inputs.pop(part)), older)
                self._ran.add(part)
            return returned

        return leave


class _Step:
    """One step of one context, ready to run: its row, its forwards, and what it will count."""

    def __init__(self, row: Row, lean: Lean, anatomy: Anatomy) -> None:
        self.row = row
        self.lean = lean
        older: dict[Key, int] = dict(row.keep_older)
        self.ageing = tuple(key for key in row.keep if key in older)  # sites of which outputs from before stay
        self.replaced = row.keep.difference(older)
        inner = [(block.key(site), path) for block in anatomy.blocks for site in block.sites for path in site.inner]
        ended = (entry for entry in inner if entry[0] in row.release)
        shapes = (key for part in row.release_delta for key in shape_keys(anatomy, part))
        self.released = (*row.release, *row.release_delta, *row.release_older, *ended, *shapes)
        ages: dict[Key, int] = {key: len(weights) for key, weights in row.predict}
        used: list[Key] = [*(key for key in anatomy.sites if key in row.reuse), *row.skip]
        used.sort(key=lambda key: block_of(key) if isinstance(key, str) else key[0])  # as they are read
        self.reads = tuple(
            (entry, key) for key in used for entry in (key, *((key, age + 1) for age in range(ages.get(key, 0))))
        )
        self.letter = "." if row.reuse or row.skip else "C"
        self.changes = bool(self.released or row.keep or row.keep_delta)
        self.bytes_held: dict[tuple[Signature, bool], int] = {}
        self.computed = self.reused = self.skipped = saved = 0
        for block in anatomy.blocks:
            skipped = any(start <= block.index < stop for start, stop in row.skip)
            saved += block.macs if skipped else 0
            for site in block.sites:
                if skipped:
                    self.skipped += 1
                elif block.key(site) in row.reuse:
                    self.reused += 1
                    saved += site.macs
                else:
                    self.computed += 1
        self.macs = 1 - saved / anatomy.macs if anatomy.macs else 1.0


def _forget(lane: Lane, key: Key) -> None:
    """Let go of all that is kept of a site or a range."""
    for entry in [e for e in lane.entries if e == key or (isinstance(e, tuple) and e[0] == key)]:
        del lane.entries[entry]


def _through(streams: Streams) -> Forward:
    if streams.alone is not None:
        name, place = streams.alone

        def pass_by(*args: Any, **kwargs: Any) -> Any:
            return kwargs[name] if name in kwargs else args[place]

        return pass_by

    def through(*args: Any, **kwargs: Any) -> Any:
        return streams.pack(streams.read(args, kwargs))

    return through
