"""Policies: whether a row of blocks is skipped is decided while the model runs, and its head runs once."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dicache.anatomy import Anatomy
from dicache.anatomy.standins import view_of_zero
from dicache.runtime.deciding import decider_of
from dicache.runtime.executor import Forward, Installer, Program
from dicache.runtime.generation import Generation, Lane
from dicache.runtime.ranks import Ranks
from dicache.runtime.stats import Stats, bytes_of
from dicache.runtime.storing import Store
from dicache.runtime.streams import Streams, Tensors, add, delta
from dicache.schedules import Range, ScheduleError
from dicache.schedules.policies import Policy


class Adaptive:
    """Executes a policy that skips a row of blocks or computes it.

    A decision taken in the first branch of the first of these blocks sees what enters it, the modulated input. To skip,
    this and the other branches of its block return views of one zero, the block's exit adds the kept delta instead of
    what they make, and all later blocks pass their input on, the first of each segment with its delta added. A decision
    taken before spares the first block as well.

    Args:
        model: The model.
        anatomy: Its anatomy.
        policy: Decides at each step.
        installer: Puts the forwards on the modules.
        stats: Counted into.
        ranks: That decide together.
        store: Where kept deltas are put; None keeps them as they were made. What is decided by stays as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        policy: Policy,
        installer: Installer,
        stats: Stats,
        ranks: Ranks,
        store: Store | None = None,
    ) -> None:
        self._anatomy = anatomy
        self._decider = decider_of(policy, anatomy, ranks)
        self._stats = stats
        self._installer = installer
        self._store = store
        self._program: Program = {}
        self._lane: Lane | None = None
        self._skipping = False
        self._inputs: dict[int, Tensors] = {}  # of the part that is running, by its first block
        self._ran: set[Range] = set()  # parts whose delta was kept or put in, in the call that runs
        first, stop = self._decider.blocks
        self._starts = {index: part[0] for part in self._decider.parts for index in range(*part)}
        self._ends = {part[1] - 1 for part in self._decider.parts}
        self._skipped_sites = sum(len(block.sites) for block in anatomy.blocks[first:stop])
        self._saved = policy.macs_saved(anatomy) / anatomy.macs if anatomy.macs else 0.0
        for block in anatomy.blocks[first:stop]:
            module = model.get_submodule(block.module)
            self._program[module] = self._block(block.index, Streams(block, module, installer.original(module)))
        self._decider.watch(model, self._program, installer)
        decides = anatomy.blocks[first]
        if self._decider.moment == "site":
            for path in (path for site in decides.sites for path in site.modules):
                module = installer.part(model, f"{decides.module}.{path}")
                self._program[module] = self._site(path, module, decides=path == decides.sites[0].entrance)

    def prepare(self, lane: Lane, context: str, generation: Generation) -> None:
        """Make ready for a call of `lane`."""
        self._installer.install(self._program)
        self._lane = lane
        self._decider.begin(lane, generation)
        self._skipping = self._decider.moment == "call" and not self._decider.decide(None)

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the model, which decides on the way."""
        return forward(*args, **kwargs)

    def finish(self, lane: Lane) -> None:
        """Count the call.

        Raises:
            ScheduleError: If a delta was not put in, because the model did not call the block where it goes in.
        """
        left_out = [part for part in self._decider.parts if part not in self._ran]
        if self._skipping and left_out:
            (start, stop), *_ = left_out
            raise ScheduleError(
                f"{self._decider.policy.name}: blocks {start} to {stop - 1} are skipped by what they add, which goes "
                f"in at block {start}, and this guidance pass does not call it any more; take a method that makes a "
                "plan, whose rules may be limited to other passes"
            )
        stats, sites = self._stats, len(self._anatomy.sites)
        skipped = self._skipped_sites if self._skipping else 0
        stats.skipped_sites += skipped
        stats.computed_sites += sites - skipped
        stats.macs += 1 - self._saved if self._skipping else 1
        if left_out:  # the kept deltas are not of one step any more: the pass starts afresh
            lane.clear()
        lane.bytes_held = bytes_of(lane.entries)

    def fail(self, generation: Generation) -> None:
        """Note that the call failed, so that no other rank waits for it."""
        self._decider.fail(self._lane, generation)

    def leave(self) -> None:
        """Forget the call that ran, also when it failed."""
        self._lane = None
        self._inputs.clear()
        self._ran.clear()
        self._decider.leave()
        if self._store is not None:
            self._store.leave()

    @property
    def letter(self) -> str:
        return "." if self._skipping else "C"

    @property
    def distance(self) -> float | None:
        distance: float | None = self._decider.memory.distance
        return distance

    def _running_lane(self) -> Lane:
        assert self._lane is not None  # the program is only installed while a call runs
        return self._lane

    def _site(self, path: str, module: nn.Module, *, decides: bool) -> Forward:
        forward = self._installer.original(module)
        nothing = ("nothing", path)

        def run(*args: Any, **kwargs: Any) -> Any:
            lane = self._running_lane()
            if decides:
                modulated = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
                self._skipping = not self._decider.decide(modulated)
            if self._skipping:
                return lane.entries[nothing]
            out = forward(*args, **kwargs)
            if nothing not in lane.entries:
                lane.entries[nothing] = view_of_zero(out)
            return out

        return run

    def _block(self, index: int, streams: Streams) -> Forward:
        forward, start = streams.forward, self._starts[index]
        ends, key = index in self._ends, self._part(start)
        decides = self._decider.moment == "block" and index == self._decider.blocks[0]

        def run(*args: Any, **kwargs: Any) -> Any:
            lane = self._running_lane()
            if decides:
                self._skipping = not self._decider.decide(None)
            if self._skipping:  # decided before
                into = streams.read(args, kwargs)
                if index == start:
                    self._ran.add(key)
                return streams.pack(add(into, self._kept(lane, key)) if index == start else into)
            if index == start:
                self._inputs[start] = streams.read(args, kwargs)
            returned = forward(*args, **kwargs)
            if self._skipping:  # decided just now, inside
                self._ran.add(key)
                return streams.pack(add(self._inputs.pop(start), self._kept(lane, key)))
            if ends and start in self._inputs:
                self._ran.add(key)
                self._keep(lane, key, delta(streams.unpack(returned), self._inputs.pop(start)))
            return returned

        # Only the ends of a part do anything when it is computed; the others must still be able to pass.
        return run

    def _keep(self, lane: Lane, part: Range, change: Tensors) -> None:
        lane.entries[part] = change if self._store is None else self._store.put(change)

    def _kept(self, lane: Lane, part: Range) -> Tensors:
        kept: Tensors = lane.entries[part] if self._store is None else self._store.get(lane.entries[part])
        return kept

    def _part(self, start: int) -> Range:
        return next(part for part in self._decider.parts if part[0] == start)
