"""What replays a schedule: its contract, and how its forwards are put on the modules."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from dicache.anatomy.overrides import Overrides
from dicache.runtime.generation import Generation, Lane

Forward = Callable[..., Any]
Program = dict[nn.Module, Forward]


class Executor(Protocol):
    """Runs the calls of a model by a plan or a policy."""

    def prepare(self, lane: Lane, context: str, generation: Generation) -> None:
        """Put forwards in place for a call of `lane`."""

    def finish(self, lane: Lane) -> None:
        """Release what nothing will read, and count the call."""

    def fail(self, generation: Generation) -> None:
        """Note that the call failed, while what its pass keeps is still there."""

    def leave(self) -> None:
        """Forget the call that ran, also when it failed."""

    @property
    def letter(self) -> str:
        """`C` if the call computed everything, else `.`."""

    @property
    def distance(self) -> float | None:
        """What a policy compared with its limit in the call; None if nothing was."""


class Installer:
    """Puts programs on the modules of one model, one at a time: a program is a forward for each of some modules."""

    def __init__(self, overrides: Overrides) -> None:
        self._overrides = overrides
        self._nothing: Program = {}
        self._installed = self._nothing
        self._moves: dict[tuple[int, int], tuple[Program, list[tuple[dict[str, Any], Forward]]]] = {}
        self._known: list[Program] = []  # kept alive, since they are told apart by identity

    def original(self, module: nn.Module) -> Forward:
        """Return the forward that a module has without any program."""
        return self._overrides.original(module)

    def part(self, model: nn.Module, path: str) -> nn.Module:
        """Return what stands under a path of the model; see `Overrides.part`."""
        return self._overrides.part(model, path)

    def install(self, program: Program) -> None:
        """Put a program's forwards in place of those of the one before."""
        if program is self._installed:
            return
        change = (id(self._installed), id(program))
        if change not in self._moves:
            self._moves[change] = self._move(program)
        both, moves = self._moves[change]
        self._installed = both  # an interrupt may come before all forwards are in place
        for namespace, forward in moves:
            namespace["forward"] = forward
        self._installed = program

    def _move(self, program: Program) -> tuple[Program, list[tuple[dict[str, Any], Forward]]]:
        """Return the modules of the installed program and of another, and what puts the other in its place."""
        both = {**self._installed, **program}
        self._known += [program, both]
        for module in both:
            self._overrides.set(module, module.forward)  # changes nothing yet
        return both, [(vars(module), program.get(module) or self.original(module)) for module in both]

    def uninstall(self) -> None:
        """Let the model run as it is."""
        self.install(self._nothing)
