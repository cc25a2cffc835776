"""Compiled calls of a model: one function for each kind of row and of call."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dicache.runtime.compiled.settings import Compiling, Traced
from dicache.runtime.compiled.tracing import NothingKeptError, Trace, explained
from dicache.runtime.executor import Forward, Program
from dicache.runtime.generation import Lane, Signature
from dicache.schedules import Range

_COUNT = count()  # the compiler remembers which sizes have changed by the function's name


FORMS = 64  # signatures of which the form is known at a time


class Results(NamedTuple):
    """What a call gives.

    Attributes:
        out: The model's output.
        made: What is to be kept.
        ran: Ranges of blocks whose stand-in was put in.
        added: What watched blocks have added to the stream, by block.
        seen: What a policy decides by; None if the call did not come there.
        cut: Streams at the block where it decides, by name.
    """

    out: Any
    made: dict[Hashable, Any]
    ran: tuple[Range, ...]
    added: dict[int, Tensor]
    seen: Tensor | None
    cut: dict[str, Tensor]


class Calls:
    """Compiles calls of a model when they are first made.

    Rows of a kind share a function, whichever guidance pass they are of, if their calls differ in nothing but sizes:
    another dtype or argument would be another graph, and a function may be compiled eight times only. So would other
    numbers in a list, such as the layers that a pass leaves out.

    Args:
        model: The model.
        trace: Follows its calls.
        compiling: How.
    """

    def __init__(self, model: nn.Module, trace: Trace, compiling: Compiling) -> None:
        self._model = model
        self._trace = trace
        self._compiling = compiling
        self._functions: dict[Hashable, Traced] = {}
        self._forms: dict[Signature, Signature] = {}

    def run(
        self,
        kind: Hashable,
        program: Callable[[], Program],
        lane: Lane,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        kept: Mapping[Hashable, Any],
        weights: Tensor | None = None,
        factors: Mapping[str, Sequence[Tensor]] | None = None,
        given: Mapping[str, Tensor] | None = None,
        answers: bool = True,
    ) -> Results:
        """Call the model with a row's forwards.

        Args:
            kind: Tells rows that do different things apart.
            program: Makes the row's forwards.
            lane: Of the guidance pass.
            forward: The model's.
            args, kwargs: Of the call.
            kept, weights, factors, given: See `Tape`.
            answers: Whether the model's output is wanted.

        Raises:
            NothingKeptError: If the row reads what is not there.
            CacheError: If the call cannot be compiled to one graph.
        """
        listed = _listed((*args, *kwargs.values()))
        key = (kind, forward, self._form(lane.signature), lane.single == "halves", listed)
        if key not in self._functions:
            name = f"row_{next(_COUNT)}"
            self._functions[key] = self._compiling.compile(
                self._trace.function(name, forward, program(), answers=answers)
            )
        try:
            return Results(*self._functions[key](args, dict(kwargs), dict(kept), weights, factors or {}, given or {}))
        except torch._dynamo.exc.TorchDynamoException as error:
            if NothingKeptError.__name__ in str(error):
                raise NothingKeptError from error
            raise explained(error, self._model) from error

    def _form(self, signature: Signature) -> Signature:
        """Return a call's signature without sizes."""
        if self._compiling.sizes_are_fixed:
            return signature
        if signature not in self._forms:
            if len(self._forms) == FORMS:
                self._forms.clear()
            self._forms[signature] = tuple(map(_without_sizes, signature))
        return self._forms[signature]


def _without_sizes(part: Any) -> Any:
    """Return a part of a signature with the number of dimensions in the place of each shape, also in lists."""
    if isinstance(part, torch.Size):
        return len(part)
    return tuple(map(_without_sizes, part)) if isinstance(part, tuple) else part


def _listed(values: Iterable[Any]) -> tuple[Hashable, ...]:
    """Return the numbers in lists, tuples and dictionaries of arguments.

    Where they change, the compiler takes them for numbers that it does not know, and then finds none of them in its
    list (torch 2.13): what a pass with `skip_layers` computes would be wrong without an error.
    """
    found: list[Hashable] = []
    for value in values:
        if isinstance(value, Mapping):
            found.append(_listed(value.values()))
        elif isinstance(value, (tuple, list)):
            found.append((*(part for part in value if isinstance(part, (int, float))), _listed(value)))
    return tuple(found)
