"""What replays a schedule: its contract, and how its forwards are put on the modules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from dicache.anatomy.overrides import Overrides, home, modules_of, or_own, put
from dicache.runtime.errors import CacheError
from dicache.runtime.generation import Generation, Lane

Forward = Callable[..., Any]
Program = dict[nn.Module, Forward]


CHANGES = 128  # from one program to another that are ready at a time


class Executor(Protocol):
    """Runs the calls of a model by a plan or a policy."""

    def prepare(self, lane: Lane, context: str, generation: Generation) -> None:
        """Put forwards in place for a call of `lane`."""

    def run(self, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the model, by its own forward or by something compiled of it, and return its output."""

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
    """Puts programs on the modules of one model, one at a time: a program is a forward for each of some modules.

    While nothing is installed, the modules stand as they were found, and whatever others put on them then (the hooks of
    an offloaded model, an adapter) is part of them for the next installer. While a program is installed, nobody else
    may change what it has replaced.

    Args:
        model: The model. Its own forward is no part of any program.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._turns = Overrides()
        self._found = _forwards(modules_of(model))
        self._nothing: Program = {}
        self._installed = self._nothing
        self._moves: dict[
            tuple[int, int], tuple[Program, list[tuple[dict[str, Any], Forward | None, Forward | None]]]
        ] = {}
        self._known: list[Program] = []  # kept alive, since they are told apart by identity
        self._gone = False
        self._changing = False

    def outdated(self, parts: Sequence[nn.Module]) -> bool:
        """Whether modules of the model were added, taken away or given another forward since this was made.

        Only known while nothing is installed.

        Args:
            parts: All modules that the model has now.
        """
        return {**_forwards(parts), **self._turns.untouched()} != self._found

    def original(self, module: nn.Module) -> Forward:
        """Return the forward that a module has without any program."""
        return or_own(module, self._found.get(module))

    def part(self, model: nn.Module, path: str) -> nn.Module:
        """Return what stands under a path of the model; see `Overrides.part`."""
        return self._turns.part(model, path)

    def rewind(self) -> None:
        """Begin with the first call of every module again, in case the model's call before was interrupted."""
        self._turns.rewind()

    def check_turns(self) -> None:
        """Refuse what a call gave in which a module was not called as often as when the model was surveyed.

        Raises:
            CacheError: If so: which of its calls was which is then not known.
        """
        if self._turns.between_turns:
            raise CacheError(
                "a module that its block calls several times, for several streams, was called another number of times "
                "in this guidance pass; which of them was reused is not known. Limit the schedule to the other passes, "
                "by context, or to other branches"
            )

    def install(self, program: Program) -> None:
        """Put a program's forwards in place of those of the one before.

        Raises:
            CacheError: If something else has put a forward on one of the modules since.
        """
        if program is self._installed:
            return
        if self._gone:
            raise CacheError(
                "the model was changed while a generation was running: modules were added or given hooks since it "
                "began. Begin the generation again"
            )
        if self._changing:  # an interrupt came before all forwards were in place
            self.restore()
        change = (id(self._installed), id(program))
        if change not in self._moves:
            if len(self._moves) == CHANGES:
                self._moves.clear()
                self._known.clear()
            self._moves[change] = self._move(program)
        both, moves = self._moves[change]
        for namespace, before, _ in moves:
            if namespace.get("forward") is not before:
                self._refuse(both)
        self._changing, self._installed = True, both
        for namespace, _, after in moves:
            if after is None:
                namespace.pop("forward", None)
            else:
                namespace["forward"] = after
        self._installed, self._changing = program, False

    def _move(self, program: Program) -> tuple[Program, list[tuple[dict[str, Any], Forward | None, Forward | None]]]:
        """Return the modules of the installed program and of another, and what stands on each before and after."""
        both = {**self._installed, **program}
        self._known += [self._installed, program, both]
        return both, [(home(m), self._with(self._installed, m), self._with(program, m)) for m in both]

    def uninstall(self) -> None:
        """Let the model run as it is.

        Raises:
            CacheError: If something else has put a forward on one of the modules since.
        """
        self.install(self._nothing)

    def restore(self) -> None:
        """Put back what was found on the modules of the program, whatever has been put on them since."""
        for module in self._installed:
            found = self._with(self._nothing, module)
            put(module, found)
        self._installed, self._changing = self._nothing, False

    def leave(self) -> None:
        """Leave the model for good."""
        self.restore()
        self._turns.restore()
        self._gone = True

    def _with(self, program: Program, module: nn.Module) -> Forward | None:
        """Return what stands on a module while a program is installed; None for the forward of its class."""
        return program.get(module) or self._found.get(module)

    def _refuse(self, program: Program) -> None:
        paths = {module: path for path, module in self._model.named_modules()}
        changed = (m for m in program if home(m).get("forward") is not self._with(self._installed, m))
        path = next((paths.get(m, type(m).__name__) for m in changed), f"a block of the {type(self._model).__name__}")
        raise CacheError(
            f"the forward of {path} was replaced while a generation was running; "
            "put hooks (offloading, casting, guidance that skips layers) on the model, and take them off, before the "
            "generation begins"
        )


def _forwards(parts: Sequence[nn.Module]) -> dict[nn.Module, Forward | None]:
    """Return what stands on each module of a model in place of its class's forward, the model itself left out."""
    return {
        module: (home(module) if "_diffusers_hook" in (own := vars(module)) else own).get("forward")
        for module in parts[1:]
    }
