"""TeaCache's policy, decided inside the first branch of the first block, so that the model's head runs once."""

from typing import Any

from torch import Tensor, nn

from dicache.anatomy import Anatomy
from dicache.anatomy.signal import l1_change
from dicache.anatomy.standins import view_of_zero
from dicache.runtime.executor import Forward, Installer, Program
from dicache.runtime.generation import Generation, Lane
from dicache.runtime.stats import Stats, bytes_of
from dicache.runtime.streams import Streams, Tensors, add, delta
from dicache.schedules import TeaCachePolicy

INPUT = "modulated input"


class Adaptive:
    """Executes a policy that skips the whole body or computes it.

    The first branch's wrapper sees the modulated input. To skip, it and the other branches of its block return views
    of one zero, the block's exit adds the kept delta instead of what they make, and all later blocks pass their input
    on, the first of each segment with its delta added.

    Args:
        model: The model.
        anatomy: Its anatomy.
        policy: Decides at each step.
        installer: Puts the forwards on the modules.
        stats: Counted into.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, policy: TeaCachePolicy, installer: Installer, stats: Stats
    ) -> None:
        self._anatomy = anatomy
        self._policy = policy
        self._stats = stats
        self._installer = installer
        self._program: Program = {}
        self._lane: Lane | None = None
        self._step = self._steps = 0
        self._skipping = False
        self._inputs: dict[int, Tensors] = {}  # of the segment that is running, by its first block
        for block in anatomy.blocks:
            module = model.get_submodule(block.module)
            streams = Streams(block, module, installer.original(module))
            self._program[module] = self._block(block.index, streams)
        first = anatomy.blocks[0]
        for path in (path for site in first.sites for path in site.modules):
            module = model.get_submodule(f"{first.module}.{path}")
            self._program[module] = self._site(path, module, decides=path == first.sites[0].entrance)

    def prepare(self, lane: Lane, context: str, generation: Generation) -> None:
        """Make ready for a call of `lane`."""
        self._installer.install(self._program)
        self._lane = lane
        self._step, self._steps = generation.step, generation.steps
        self._skipping = False

    def finish(self, lane: Lane) -> None:
        """Count the call."""
        stats, anatomy = self._stats, self._anatomy
        if self._skipping:
            stats.skipped_sites += len(anatomy.sites)
            stats.macs += 1 - anatomy.macs_after_decision / anatomy.macs if anatomy.macs else 1
        else:
            stats.computed_sites += len(anatomy.sites)
            stats.macs += 1
        lane.bytes_held = bytes_of(lane.entries)

    def leave(self) -> None:
        """Forget the call that ran, also when it failed."""
        self._lane = None
        self._inputs.clear()

    @property
    def letter(self) -> str:
        return "." if self._skipping else "C"

    def _running_lane(self) -> Lane:
        assert self._lane is not None  # the program is only installed while a call runs
        return self._lane

    def _decide(self, modulated: Tensor) -> bool:
        """Return whether to compute the body."""
        lane = self._running_lane()
        before = lane.entries.get(INPUT)
        lane.entries[INPUT] = modulated
        x = None
        if before is not None and all(segment[0] in lane.entries for segment in self._anatomy.segments):
            change, size = l1_change(modulated, before)
            x = float(change / size)
        compute, lane.accumulated = self._policy.decide(self._step, self._steps, x, lane.accumulated)
        return compute

    def _site(self, path: str, module: nn.Module, *, decides: bool) -> Forward:
        forward = self._installer.original(module)
        nothing = ("nothing", path)

        def run(*args: Any, **kwargs: Any) -> Any:
            lane = self._running_lane()
            if decides:
                modulated = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
                self._skipping = not self._decide(modulated)
            if self._skipping:
                return lane.entries[nothing]
            out = forward(*args, **kwargs)
            if nothing not in lane.entries:
                lane.entries[nothing] = view_of_zero(out)
            return out

        return run

    def _block(self, index: int, streams: Streams) -> Forward:
        forward = streams.forward
        start, stop = self._anatomy.segment(index)

        def run(*args: Any, **kwargs: Any) -> Any:
            lane = self._running_lane()
            if self._skipping:  # decided in an earlier block
                into = streams.read(args, kwargs)
                return streams.pack(add(into, lane.entries[start]) if index == start else into)
            if index == start:
                self._inputs[start] = streams.read(args, kwargs)
            returned = forward(*args, **kwargs)
            if self._skipping:  # decided just now, inside
                return streams.pack(add(self._inputs.pop(start), lane.entries[start]))
            if index == stop - 1:
                lane.entries[start] = delta(streams.unpack(returned), self._inputs.pop(start))
            return returned

        # Only the ends of a segment do anything when the body is computed; the others must still be able to pass.
        return run
