"""Policies whose rows are compiled, and which decide between them outside of the graphs."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from dicache.anatomy import Anatomy
from dicache.runtime.adaptive import Adaptive
from dicache.runtime.compiled.calls import Calls, Results
from dicache.runtime.compiled.rows import Kind, RowForwards
from dicache.runtime.compiled.settings import Compiling
from dicache.runtime.deciding import ByFirstBlocks, ByResiduals
from dicache.runtime.executor import Forward, Installer, Program
from dicache.runtime.generation import Lane
from dicache.runtime.ranks import Ranks
from dicache.runtime.stats import Stats
from dicache.runtime.storing import Store
from dicache.schedules.policies import Policy


class CompiledAdaptive(Adaptive):
    """Executes a policy by compiled calls of the model: one that computes, one that skips.

    Where the decision needs something of the call itself, a third graph comes before them. It ends where the policy
    decides, and gives what it decides by and the streams there; the others go on from these. What the model makes of
    the timestep and the text, and the one norm that is looked at, runs in both.

    Args:
        model: The model.
        anatomy: Its anatomy.
        policy: Decides at each step.
        installer: Puts the forwards on the modules.
        stats: Counted into.
        ranks: That decide together.
        store: Where kept deltas are put; None keeps them as they were made.
        compiling: How rows are compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        policy: Policy,
        installer: Installer,
        stats: Stats,
        ranks: Ranks,
        store: Store | None,
        compiling: Compiling,
    ) -> None:
        super().__init__(model, anatomy, policy, installer, stats, ranks, store)
        decider = self._decider
        here = anatomy.blocks[decider.blocks[0]]
        watched = [model.get_submodule(block.module) for block in anatomy.blocks if decider.moment != "call"]
        if decider.moment == "site":
            watched.append(installer.part(model, f"{here.module}.{here.sites[0].entrance}"))
        if isinstance(decider, ByResiduals) and decider.policy.branch != "block":
            decision = (anatomy.blocks[index] for index in decider.policy.decision_blocks)
            watched += [installer.part(model, f"{block.module}.{block.middle}") for block in decision]
        self._forwards = RowForwards(model, anatomy, installer, sites=(), ranges=decider.parts, watched=watched)
        self._program = self._forwards.trace.program
        self._calls = Calls(model, self._forwards.trace, compiling)

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the model, and decide on the way.

        Args:
            forward: The model's.
            args, kwargs: Of the call.
        """
        decider, lane = self._decider, self._running_lane()
        call = partial(self._call, lane, forward, args, kwargs)
        given: Mapping[str, Tensor] = {}
        if decider.moment != "call":
            looked = call("look", answers=False)
            given = looked.cut
            if given and (decider.moment == "block" or looked.seen is not None):
                if isinstance(decider, ByFirstBlocks):
                    decider.saw(looked.seen)
                self._skipping = not decider.decide(looked.seen)
        if self._skipping:
            kept = {part: self._kept(lane, part) for part in decider.parts if part in lane.entries}
            results = call("skip", kept=kept, given=given)
        else:
            results = call("watch" if isinstance(decider, ByResiduals) and decider.watching else "compute", given=given)
        for part in decider.parts:
            if part in results.made:
                self._keep(lane, part, results.made[part])
        self._ran.update(results.ran, (part for part in decider.parts if part in results.made))
        if isinstance(decider, ByResiduals):
            for index, residual in results.added.items():
                decider.take(index, residual)
        return results.out

    def _call(
        self,
        lane: Lane,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        does: str,
        *,
        kept: Mapping[Any, Any] | None = None,
        given: Mapping[str, Tensor] | None = None,
        answers: bool = True,
    ) -> Results:
        return self._calls.run(
            (does, bool(given)),
            lambda: self._row(does, goes_on=bool(given)),
            lane,
            forward,
            args,
            kwargs,
            kept=kept or {},
            given=given,
            answers=answers,
        )

    def _row(self, does: str, *, goes_on: bool) -> Program:
        """Return the forwards of a row.

        Args:
            does: `look`, `skip`, `compute` or `watch`.
            goes_on: Whether it goes on from the block at which the policy decides; else the call does not come there.
        """
        decider, forwards = self._decider, self._forwards
        first = decider.blocks[0]
        if does == "look":
            assert decider.moment != "call"
            return forwards.up_to(first, decider.moment)
        parts = decider.parts
        program = forwards.program(Kind(skip=parts) if does == "skip" else Kind(keep_delta=parts))
        if does == "watch":
            assert isinstance(decider, ByResiduals)
            for index in decider.policy.decision_blocks:
                program = forwards.watch(index, decider.policy.branch, program)
        return forwards.go_on_from(first, program) if goes_on else program
