"""Static plans: every distinct row is a set of specialised forwards that are put on the modules for its steps."""

from collections.abc import Hashable
from typing import Any

from torch import nn

from dicache.anatomy import Anatomy
from dicache.anatomy.standins import pass_on, view_of_zero
from dicache.runtime.executor import Forward, Installer, Program
from dicache.runtime.generation import Generation, Lane, Signature
from dicache.runtime.stats import Stats, bytes_of
from dicache.runtime.streams import Streams, Tensors, add, delta
from dicache.schedules import Plan, Range, Row, Rows


class Replay:
    """Executes a plan. A module whose output is computed and not kept runs its own forward, unwrapped.

    Args:
        model: The model that the plan is for.
        anatomy: Its anatomy.
        plan: What to compute.
        installer: Puts the forwards on the modules.
        stats: Counted into.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, plan: Plan, installer: Installer, stats: Stats) -> None:
        self._model = model
        self._anatomy = anatomy
        self._plan = plan
        self._installer = installer
        self._stats = stats
        self._rows: dict[str, Rows] = {}
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._steps: dict[tuple[str, int, bool], _Step] = {}
        self._running = _Step(Row(), {}, anatomy)
        self._entries: dict[Any, Any] = {}  # of the lane whose call is running
        self._inputs: dict[Range, Tensors] = {}
        self._streams: dict[int, Streams] = {}
        for block in anatomy.blocks:
            module = model.get_submodule(block.module)
            self._streams[block.index] = Streams(block, module, installer.original(module))

    def prepare(self, lane: Lane, context: str, generation: Generation) -> None:
        """Put the forwards of this step's row in place for a call of `lane`."""
        step = self._step(context, generation.step, compute=False)
        if not (step.row.reuse <= lane.entries.keys() and all(part in lane.entries for part in step.row.skip)):
            lane.clear()
            step = self._step(context, generation.step, compute=True)
        self._installer.install(step.program)
        self._running = step
        self._entries = lane.entries

    def finish(self, lane: Lane) -> None:
        """Release what no later step reads, and count the call."""
        step, stats = self._running, self._stats
        for key in step.released:
            lane.entries.pop(key, None)
        stats.reused_sites += step.reused
        stats.skipped_sites += step.skipped
        stats.computed_sites += step.computed
        stats.macs += step.macs
        if step.changes:  # what a step leaves behind depends on nothing but the step and the shapes
            if lane.signature not in step.bytes_held:
                step.bytes_held[lane.signature] = bytes_of(lane.entries)
            lane.bytes_held = step.bytes_held[lane.signature]

    def leave(self) -> None:
        """Forget the call that ran, also when it failed."""
        self._entries = {}
        self._inputs.clear()

    @property
    def letter(self) -> str:
        return "." if self._running.row.reuse or self._running.row.skip else "C"

    def _step(self, context: str, step: int, *, compute: bool) -> "_Step":
        key = (context, step, compute)
        if key not in self._steps:
            rows = self._rows.get(context)
            if rows is None:
                rows = self._rows[context] = Rows(self._plan, self._anatomy, context)
            row = rows.row(step, compute=compute)
            same = (row.reuse, row.skip, row.keep, row.keep_delta)
            if same not in self._programs:
                self._programs[same] = self._build(row)
            self._steps[key] = _Step(row, self._programs[same], self._anatomy)
        return self._steps[key]

    def _build(self, row: Row) -> Program:
        program: Program = {}
        skipped = {index for start, stop in row.skip for index in range(start, stop)}
        for block in self._anatomy.blocks:
            if block.index in skipped:
                continue
            reused = {site.branch for site in block.sites if block.key(site) in row.reuse}
            for site in block.sites:
                key = block.key(site)
                module = self._model.get_submodule(f"{block.module}.{site.module}")
                inner = {path: self._model.get_submodule(f"{block.module}.{path}") for path in site.inner}
                if site.branch in reused:
                    program[module] = self._give(key)
                    program |= {piece: self._give((key, path)) for path, piece in inner.items()}
                elif key in row.keep:
                    program[module] = self._keep(key, self._installer.original(module))
                    for path, piece in inner.items():
                        program[piece] = self._keep_shape((key, path), self._installer.original(piece))
            for path, feeds in block.norms.items():
                if reused.issuperset(feeds):
                    program[self._model.get_submodule(f"{block.module}.{path}")] = pass_on
        for part in row.skip:
            for index in range(*part):
                streams = self._streams[index]
                program[streams.module] = self._add(part, streams) if index == part[0] else _through(streams)
        for part in row.keep_delta:
            first, last = self._streams[part[0]], self._streams[part[1] - 1]
            program[first.module] = self._enter(part, first, program.get(first.module, first.forward))
            program[last.module] = self._exit(part, last, program.get(last.module, last.forward))
        return program

    def _give(self, key: Hashable) -> Forward:
        def give(*_args: Any, **_kwargs: Any) -> Any:
            return self._entries[key]

        return give

    def _keep(self, key: str, forward: Forward) -> Forward:
        def keep(*args: Any, **kwargs: Any) -> Any:
            out = self._entries[key] = forward(*args, **kwargs)
            return out

        return keep

    def _keep_shape(self, key: Hashable, forward: Forward) -> Forward:
        def keep_shape(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            self._entries[key] = view_of_zero(out)
            return out

        return keep_shape

    def _add(self, part: Range, streams: Streams) -> Forward:
        def add_delta(*args: Any, **kwargs: Any) -> Any:
            return streams.pack(add(streams.read(args, kwargs), self._entries[part]))

        return add_delta

    def _enter(self, part: Range, streams: Streams, forward: Forward) -> Forward:
        def enter(*args: Any, **kwargs: Any) -> Any:
            self._inputs[part] = streams.read(args, kwargs)
            return forward(*args, **kwargs)

        return enter

    def _exit(self, part: Range, streams: Streams, forward: Forward) -> Forward:
        def leave(*args: Any, **kwargs: Any) -> Any:
            returned = forward(*args, **kwargs)
            self._entries[part] = delta(streams.unpack(returned), self._inputs.pop(part))
            return returned

        return leave


class _Step:
    """One step of one context, ready to run: its row, its forwards, and what it will count."""

    def __init__(self, row: Row, program: Program, anatomy: Anatomy) -> None:
        self.row = row
        self.program = program
        inner = [(block.key(site), path) for block in anatomy.blocks for site in block.sites for path in site.inner]
        self.released = (*row.release, *row.release_delta, *(entry for entry in inner if entry[0] in row.release))
        self.changes = bool(self.released or row.keep or row.keep_delta)
        self.bytes_held: dict[Signature, int] = {}
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


def _through(streams: Streams) -> Forward:
    def through(*args: Any, **kwargs: Any) -> Any:
        return streams.pack(streams.read(args, kwargs))

    return through
