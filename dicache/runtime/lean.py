"""Blocks all of whose branches are reused: what they still do, and nothing else.

Such a block adds what is kept to its streams, through gates. Around that, two things are left that nothing needs. A
norm whose output nothing looks at is passed by, yet the block goes on to scale and shift what stands in for it, token
by token: one token does as well, where the survey has found so. And where each block embeds the timestep for itself,
all of them begin with the same sines and cosines.
"""

import sys
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dicache.anatomy import Anatomy
from dicache.anatomy.standins import one_token, pass_on
from dicache.runtime.executor import Forward, Installer, Program
from dicache.schedules import Row

KINDS = 8  # kinds of calls that are ready at a time: with prompts of any length there is no end of them


class Lean:
    """The forwards of one row, with less left to do in the blocks that it reuses altogether.

    Args:
        model: The model.
        anatomy: Its own.
        row: What is reused.
        program: The forwards of the row.
        embeddings: Of all blocks.
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, row: Row, program: Program, embeddings: "Embeddings"
    ) -> None:
        reused = [
            block
            for block in anatomy.blocks
            if block.sites and not anatomy.links and all(block.key(site) in row.reuse for site in block.sites)
        ]
        brief = (f"{block.module}.{path}" for block in reused if block.one_token for path in block.norms)
        self._norms = [norm for norm in map(model.get_submodule, brief) if program.get(norm) is pass_on]
        shared = embeddings.program([model.get_submodule(block.module) for block in reused])
        self._program: Program = {**shared, **program}
        self._programs: dict[Hashable, Program] = {}

    def program(self, kind: Hashable) -> Program:
        """Return the forwards for a call of some kind: with the same shapes, types and modes."""
        if not self._norms:
            return self._program
        if kind not in self._programs:
            if len(self._programs) == KINDS:
                self._programs.clear()
            self._programs[kind] = {**self._program, **{norm: _one_token() for norm in self._norms}}
        return self._programs[kind]


def _one_token() -> Forward:
    """Return what gives, in calls of one kind, always the same token: nothing looks at it."""
    made: list[Tensor] = []

    def give(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiler drops what nothing reads, and would guard what is kept here
            return one_token(*args, **kwargs)
        if not made:
            made.append(torch.zeros_like(one_token(*args, **kwargs)))
        return made[0]

    return give


class Embeddings:
    """Lets blocks share the sines and cosines of a timestep, where each of them embeds it for itself.

    They are those of diffusers, which depend on the timestep and on four numbers; they are shared between modules of
    equal numbers that are given the same tensor, unwritten since, in one call of the model.

    Args:
        blocks: Modules in which to look for them.
        installer: Knows the modules' own forwards.
    """

    def __init__(self, blocks: Sequence[nn.Module], installer: Installer) -> None:
        self._made: dict[Hashable, tuple[Tensor, int | None, Tensor, int | None]] = {}
        known = sys.modules.get("diffusers.models.embeddings")
        kind = getattr(known, "Timesteps", None)
        self._programs: dict[nn.Module, Program] = {
            block: {
                part: self._shared(part, installer.original(part)) for part in block.modules() if type(part) is kind
            }
            for block in blocks
        }

    def program(self, blocks: Sequence[nn.Module]) -> Program:
        """Return the forwards with which some of the blocks share what they embed; none where one embeds alone."""
        found = {part: forward for block in blocks for part, forward in self._programs[block].items()}
        return found if len(found) > 1 else {}

    def clear(self) -> None:
        """Forget the call that ran."""
        self._made.clear()

    def _shared(self, module: Any, forward: Forward) -> Forward:
        key = (module.num_channels, module.flip_sin_to_cos, module.downscale_freq_shift, module.scale)

        def run(timesteps: Any) -> Any:
            if torch.compiler.is_compiling():
                return forward(timesteps)
            given, before, made, then = self._made.get(key, (None, None, None, None))
            if given is timesteps and before == _version(timesteps) and then == _version(made):
                return made
            made = forward(timesteps)
            versions = _version(timesteps), _version(made)
            if None not in versions:  # where it is not counted, that one was written to could not be seen
                self._made[key] = (timesteps, versions[0], made, versions[1])
            return made

        return run


def _version(tensor: Any) -> int | None:
    """Return how often a tensor was written to; None if that is not counted."""
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else None
