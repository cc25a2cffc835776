"""Calls of a model as pure functions: what was kept goes in, the output and what is to be kept come out.

The compiler follows a call of the model once for each row. What the row does is known then: a function of its own sets
it, and the forwards on the modules look it up while they are followed. So the forwards stay in place for a whole
generation, no choice between rows is left in a graph, and each row has a limit of recompilations of its own.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from dicache.runtime.errors import CacheError
from dicache.runtime.executor import Forward, Installer, Program
from dicache.schedules import Range


class NothingKeptError(Exception):
    """What is to be reused is not there."""


class Tape:
    """What one call reads and makes.

    Args:
        kept: Of earlier calls, by site, range of blocks, or one of these and an age.
        weights: (keys, width), what kept outputs are weighed with in predictions, one row for each that is predicted.
        factors: By site, what corrects its kept tensors.
        given: Streams that enter the block that this call goes on from, by name.

    Attributes:
        entries: What was kept, and what this call has made.
        ran: Ranges of blocks whose stand-in was put in.
        inputs: Streams that entered the ranges that are running.
        middle: The stream in the middle of the block that is running.
        added: What watched blocks have added to the stream.
        seen: What a policy decides by.
        cut: Streams that entered the block at which a policy decides.
    """

    def __init__(
        self,
        kept: Mapping[Hashable, Any],
        weights: Tensor | None,
        factors: Mapping[str, Sequence[Tensor]],
        given: Mapping[str, Tensor],
    ) -> None:
        self.entries = dict(kept)
        self.weights = weights
        self.factors = factors
        self.given = given
        self.ran: list[Range] = []
        self.inputs: dict[Range, dict[str, Tensor]] = {}
        self.middle: Tensor | None = None
        self.added: dict[int, Tensor] = {}
        self.seen: Tensor | None = None
        self.cut: dict[str, Tensor] = {}

    def read(self, key: Hashable) -> Any:
        if key not in self.entries:
            raise NothingKeptError
        return self.entries[key]


class Trace:
    """The forwards of a model's modules, which do what the row that is being followed says.

    Args:
        installer: Knows the modules' own forwards.
        modules: All that some row does something to.

    Attributes:
        program: A forward for each module, the same for all rows.
        tape: Of the call that is being followed.
    """

    def __init__(self, installer: Installer, modules: Iterable[nn.Module]) -> None:
        self._places = {module: place for place, module in enumerate(dict.fromkeys(modules))}
        self._row: Sequence[Forward | None] | None = None
        self._tape: Tape | None = None
        self.program: Program = {
            module: self._chooser(place, installer.original(module)) for module, place in self._places.items()
        }

    @property
    def tape(self) -> Tape:
        assert self._tape is not None  # the forwards of a row are only called while a call is followed
        return self._tape

    def _chooser(self, place: int, own: Forward) -> Forward:
        def chosen(*args: Any, **kwargs: Any) -> Any:
            row = self._row
            forward = own if row is None else row[place] or own
            return forward(*args, **kwargs)

        return chosen

    def function(self, name: str, forward: Forward, program: Program, *, answers: bool = True) -> Callable[..., Any]:
        """Return a call of the model with a row's forwards, as a function with a code object of its own.

        Args:
            name: Of the function, as the compiler's messages have it.
            forward: The model's.
            program: The row's, of some of the modules.
            answers: Whether it returns the model's output; what only feeds that is then not compiled.

        Returns:
            From the call's arguments, and what `Tape` is made of, to the model's output and the tape's results: entries
            made, ranges put in, what watched blocks added, what a policy decides by, and the streams at its cut.
        """
        row: list[Forward | None] = [None] * len(self._places)
        for module, own in program.items():
            row[self._places[module]] = own
        forwards = tuple(row)

        def call(
            args: tuple[Any, ...],
            kwargs: Mapping[str, Any],
            kept: Mapping[Hashable, Any],
            weights: Tensor | None,
            factors: Mapping[str, Sequence[Tensor]],
            given: Mapping[str, Tensor],
        ) -> Any:
            tape = Tape(kept, weights, factors, given)
            self._tape, self._row = tape, forwards
            out = forward(*args, **kwargs)
            self._tape = self._row = None
            made = {key: value for key, value in tape.entries.items() if key not in kept}
            return out if answers else None, made, tuple(tape.ran), tape.added, tape.seen, tape.cut

        code = call.__code__.replace(co_name=name)  # the compiler counts recompilations by code object
        return FunctionType(code, call.__globals__, name, None, call.__closure__)


def explained(error: Exception, model: nn.Module) -> CacheError:
    """Return what to tell of a compiler's error: its first line, and what it says of the place."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    about = [line.partition(": ")[2] for line in lines if line.startswith("Developer debug context: ")]
    said = "; ".join((*lines[:1], *about)) or type(error).__name__
    return CacheError(
        f"a step of the {type(model).__name__} could not be compiled to one graph: {said}. Take off what cannot be "
        "compiled (hooks that offload are such, and other libraries'), or apply the schedule without compile"
    )
