"""Deciders: what each policy looks at while the model runs, and when."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from dicache.anatomy import Anatomy, Block
from dicache.anatomy.signal import frames_of, l1_change, motion_of
from dicache.anatomy.spread import RanksError, group_of_tokens
from dicache.runtime.executor import Forward, Installer, Program
from dicache.runtime.generation import Generation, Lane
from dicache.runtime.ranks import Ranks
from dicache.runtime.streams import Streams, beside
from dicache.schedules.policies import AdaCachePolicy, FirstBlockPolicy, Policy, TeaCachePolicy
from dicache.schedules.rows import Range

Moment = Literal["call", "site", "block"]
P = TypeVar("P", bound=Policy)
INPUT = "modulated input"
ADDED = "what the first blocks added"


class Decider(ABC, Generic[P]):
    """Decides in each call whether it skips the policy's blocks.

    Subclasses say at which moment: before the `call`; in the first `site` of the skipped blocks, from what enters it;
    or at the first skipped `block`, from what it has watched in those before it.

    Args:
        policy: The rule.
        anatomy: The model's.
        ranks: That decide together.

    Attributes:
        blocks: That a skip leaves out, [start, stop).
        parts: The same cut at the ends of the segments: what has one delta each.
        measured: How many numbers the ranks agree on in one go.
        memory: The policy's, of the pass that runs.
    """

    moment: ClassVar[Moment]
    measured: int = 1
    memory: Any  # the Memory that the policy's `remember` gives

    def __init__(self, policy: P, anatomy: Anatomy, ranks: Ranks) -> None:
        self.policy = policy
        self.blocks = start, stop = policy.skipped(anatomy)
        cut = ((max(start, a), min(stop, b)) for a, b in anatomy.segments)
        self.parts: tuple[Range, ...] = tuple((a, b) for a, b in cut if a < b)
        self._ranks = ranks
        self._agreed = False
        self.entries: dict[Hashable, Any] = {}

    def begin(self, lane: Lane, generation: Generation) -> None:
        """Make ready for a call of a guidance pass."""
        if lane.memory is None:
            lane.memory = self.policy.remember()
        self.memory, self.entries = lane.memory, lane.entries
        self.step, self.steps = generation.step, generation.steps
        self._agreed = False

    def watch(self, model: nn.Module, program: Program, installer: Installer) -> None:  # most need nothing
        """Add to the forwards of a call what else the decider has to see."""

    @abstractmethod
    def decide(self, seen: Tensor | None) -> bool:
        """Return whether to compute the blocks, from what is seen at the decider's moment."""

    @property
    def comparable(self) -> bool:
        """Whether there is anything to decide: every delta is kept, and the step may be skipped."""
        kept = all(part in self.entries for part in self.parts)
        return kept and not self.policy.forced(self.step, self.steps)

    def agree(self, sums: Tensor) -> list[float]:
        """Return the quotients of pairs of numbers, (measured, 2), as all ranks have them."""
        self._agreed = True
        return self._ranks.quotients(sums)

    def leave(self) -> None:
        """Let go of what the pass keeps."""
        self.entries = {}

    def fail(self, running: Lane | None, generation: Generation) -> None:
        """Tell the other ranks, where a decision is still to come in this generation, that this one has failed.

        Args:
            running: The guidance pass whose call failed; None if it failed before that was known.
            generation: With all its passes.
        """
        now = generation.step
        for lane in generation.lanes.values():
            if lane.memory is None or lane.step < now - 1:  # it computes, whatever comes, when it is called again
                continue
            over = lane.step == now and (lane is not running or self._agreed or not self._measures(lane.entries))
            if self.awaited(lane.memory, now + over, generation.steps):
                self._ranks.give_up(2 * self.measured)
                return

    def _measures(self, entries: Mapping[Hashable, Any]) -> bool:
        """Return whether the call that runs has something to measure."""
        return all(part in entries for part in self.parts)

    def awaited(self, memory: Any, step: int, steps: int) -> bool:
        """Return whether something is measured in a step or a later one of a pass, as far as its memory tells."""
        return any(not self.policy.forced(later, steps) for later in range(step, steps))


class ByModulatedInput(Decider[TeaCachePolicy]):
    """TeaCache: the change of what enters the first branch, from step to step."""

    moment = "site"

    def decide(self, seen: Tensor | None) -> bool:
        assert seen is not None
        x = None
        if self.comparable and INPUT in self.entries:
            x = self.agree(torch.stack(l1_change(seen, self.entries[INPUT]))[None])[0]
        self.entries[INPUT] = seen
        return self.policy.decide(self.step, self.steps, x, self.memory)


class ByResiduals(Decider[AdaCachePolicy]):
    """AdaCache: what decision blocks add to the stream, from one computed step to the next."""

    moment = "call"

    def __init__(self, policy: AdaCachePolicy, anatomy: Anatomy, ranks: Ranks) -> None:
        super().__init__(policy, anatomy, ranks)
        self.measured = len(policy.decision_blocks) + (policy.motion is not None)
        self._watched = [anatomy.blocks[index] for index in policy.decision_blocks]
        self._watching = self._measuring = False
        self._before: dict[int, Tensor] = {}  # what the decision blocks still to run added when they were watched last
        self._middle: Tensor | None = None  # the stream in the decision block that runs
        self._sums: list[Tensor] = []  # pairs, of those that have run

    def begin(self, lane: Lane, generation: Generation) -> None:
        super().begin(lane, generation)
        self._latents, self._middle, self._sums = lane.latents, None, []

    def decide(self, seen: Tensor | None) -> bool:
        compute = self.policy.decide(self.step, self.steps, None, self.memory)
        self._watching = compute and self.policy.watches(self.step, self.steps)
        known = [block.index for block in self._watched if _residual(block.index) in self.entries]
        self._before = {index: self.entries.pop(_residual(index)) for index in known if self._watching}
        self._measuring = len(self._before) == len(self._watched)
        return compute

    @property
    def watching(self) -> bool:
        """Whether what the decision blocks add is to be told in the call that runs, by `take`, in their order."""
        return self._watching

    def leave(self) -> None:
        super().leave()
        self._middle, self._sums, self._before = None, [], {}

    def _measures(self, entries: Mapping[Hashable, Any]) -> bool:
        return self._measuring

    def awaited(self, memory: Any, step: int, steps: int) -> bool:
        if memory.last == step:  # it is being computed
            return True
        computed = next((later for later in range(step, steps) if self.policy.due(later, steps, memory)), None)
        return computed is not None and self.policy.watches(computed, steps)

    def watch(self, model: nn.Module, program: Program, installer: Installer) -> None:
        if self.policy.motion is not None and group_of_tokens(model) is not None:
            raise RanksError(
                "adacache: motion is measured between whole frames, and the tokens of this model are spread over "
                "ranks; calibrate with --no-motion"
            )
        self._frames = partial(frames_of, model)
        for block in self._watched:
            module = model.get_submodule(block.module)
            streams = Streams(block, module, program[module])
            program[module] = self._around(block, streams)
            if self.policy.branch != "block":
                middle = installer.part(model, f"{block.module}.{block.middle}")
                program[middle] = self._inside(installer.original(middle))

    def _inside(self, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._middle = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            return forward(*args, **kwargs)

        return run

    def _around(self, block: Block, streams: Streams) -> Forward:
        name, branch = block.main_stream, self.policy.branch

        def run(*args: Any, **kwargs: Any) -> Any:
            returned = streams.forward(*args, **kwargs)
            if self._watching:
                start = streams.read(args, kwargs)[name] if branch != "rest" else self._middle
                stop = streams.unpack(returned)[name] if branch != "attn" else self._middle
                assert start is not None
                assert stop is not None
                self.take(block.index, stop - beside(stop, start))
            self._middle = None
            return returned

        return run

    def take(self, index: int, residual: Tensor) -> None:
        """Keep what a decision block adds; with that of the last of them, choose the rate."""
        before = self._before.pop(index, None)
        self.entries[_residual(index)] = residual
        if not self._measuring or before is None:
            return
        sums = torch.stack(l1_change(residual, before))
        self._sums.append(beside(self._sums[0], sums) if self._sums else sums)
        if index != self._watched[-1].index or len(self._sums) < len(self._watched):  # the model left one out
            return
        if self.policy.motion is not None:
            shape = self._latents
            self._sums.append(beside(self._sums[0], torch.stack(motion_of(residual, self._frames(shape), shape[0]))))
        found = self.agree(torch.stack(self._sums))
        blocks = len(self._watched)
        motion = found[blocks] if len(found) > blocks else None
        self.policy.observe(self.step, self.steps, found[:blocks], motion, self.memory)


def _residual(block: int) -> tuple[str, int]:
    """Return the key of what a block added."""
    return "residual", block


class ByFirstBlocks(Decider[FirstBlockPolicy]):
    """FirstBlockCache: how far what the first blocks add to the latents has come since the last computed step."""

    moment = "block"

    def __init__(self, policy: FirstBlockPolicy, anatomy: Anatomy, ranks: Ranks) -> None:
        super().__init__(policy, anatomy, ranks)
        self._ends = anatomy.blocks[0], anatomy.blocks[policy.first - 1]
        self._entered: Tensor | None = None
        self._added: Tensor | None = None

    def awaited(self, memory: Any, step: int, steps: int) -> bool:
        if self.policy.allows(memory):
            return super().awaited(memory, step, steps)
        return self.policy.allows(replace(memory, in_a_row=0)) and super().awaited(memory, step + 1, steps)

    def watch(self, model: nn.Module, program: Program, installer: Installer) -> None:
        head, tail = self._ends

        def watched(block: Block) -> Forward:
            module = model.get_submodule(block.module)
            streams = Streams(block, module, installer.original(module))

            def run(*args: Any, **kwargs: Any) -> Any:
                if block is head:
                    self._entered = streams.read(args, kwargs)[block.main_stream]
                returned = streams.forward(*args, **kwargs)
                if block is tail and self._entered is not None:  # else the model left out the head
                    left = streams.unpack(returned)[block.main_stream]
                    self._added, self._entered = left - beside(left, self._entered), None
                return returned

            return run

        for block in (head, tail):
            program[model.get_submodule(block.module)] = watched(block)

    def saw(self, added: Tensor | None) -> None:
        """Take what the first blocks have added in the call that runs; None if it left one out."""
        self._added = added

    def decide(self, seen: Tensor | None) -> bool:
        added, self._added = self._added, None
        before = self.entries.get(ADDED)
        x = None
        if added is None:  # the model left out the first or the last of the first blocks
            self.entries.pop(ADDED, None)
        elif self.comparable and before is not None and self.policy.allows(self.memory):
            x = self.agree(torch.stack(l1_change(added, before))[None])[0]
        computes = self.policy.decide(self.step, self.steps, x, self.memory)
        self._agreed = True  # or it is computed in any case
        if computes and added is not None:
            self.entries[ADDED] = added
        return computes

    def leave(self) -> None:
        super().leave()
        self._entered = self._added = None


DECIDERS: dict[type[Policy], type[Decider[Any]]] = {
    TeaCachePolicy: ByModulatedInput,
    AdaCachePolicy: ByResiduals,
    FirstBlockPolicy: ByFirstBlocks,
}


def decider_of(policy: Policy, anatomy: Anatomy, ranks: Ranks) -> Decider[Any]:
    return DECIDERS[type(policy)](policy, anatomy, ranks)
