"""Watch one call of a model: what each block, and each piece inside it, takes and returns."""

import inspect
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dicache.anatomy.inputs import Inputs, moved_inputs
from dicache.anatomy.overrides import TURN, Overrides, forward_of, inside
from dicache.anatomy.parts import MADE, AnatomyError
from dicache.anatomy.recognising import pieces

Returns = str | tuple[str | None, ...]
Blocks = nn.ModuleList | nn.Sequential


@dataclass
class PieceCall:
    """One call of a piece of a block."""

    path: str  # inside the block, with the turn where it is called more than once: `ff#2/2`
    module: nn.Module
    arguments: dict[str, Any]
    returned: Any
    versions: list[int] = field(default_factory=list)  # of the tensors that it returned, as they were then
    written: bool = False  # whether the block has written into them

    def again(self, change: Callable[[Tensor], Tensor]) -> Any:
        """Call the piece again, with its first tensor changed wherever it is given, and return what it returns."""
        bound = inspect.BoundArguments(signature(self.module), OrderedDict(self.arguments))
        given: list[Any] = [*bound.args, *bound.kwargs.values()]
        first = next((value for value in given if isinstance(value, Tensor)), None)
        if first is None:
            raise AnatomyError(f"{self.path} is given no tensor by itself; its tokens cannot be told")
        other = change(first)
        given = [other if value is first else value for value in given]
        count = len(bound.args)
        return self.module(*given[:count], **dict(zip(bound.kwargs, given[count:], strict=True)))

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors among what it returned."""
        returned = self.returned if isinstance(self.returned, (tuple, list)) else (self.returned,)
        return [out for out in returned if isinstance(out, Tensor)]


@dataclass
class BlockCall:
    """One call of a block, as it was seen."""

    container: str
    position: int
    module: nn.Module
    arguments: dict[str, Any]
    returned: Any
    pieces: list[PieceCall]  # in the order in which they ended
    written: frozenset[str] = frozenset()  # arguments that it has written into

    @property
    def path(self) -> str:
        return f"{self.container}.{self.position}"

    @property
    def outputs(self) -> tuple[Any, ...]:
        return tuple(self.returned) if isinstance(self.returned, (tuple, list)) else (self.returned,)

    def streams(self, returns: Returns) -> dict[str, Tensor]:
        """Return the arguments that leave the block again, by name."""
        names = (returns,) if isinstance(returns, str) else returns
        return {name: self.arguments[name] for name in names if name and not name.startswith(MADE)}

    def again(self, changed: Mapping[str, Any]) -> Any:
        """Call the block again, with some of its arguments changed, and return what it returns."""
        bound = inspect.BoundArguments(signature(self.module), OrderedDict({**self.arguments, **changed}))
        return inside(self.module)(*bound.args, **bound.kwargs)


def signature(module: nn.Module) -> inspect.Signature:
    """Return the signature of a module's forward as its class has it, whatever is wrapped round the instance's."""
    whole = inspect.signature(type(module).forward)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of what a module's forward may be given by place, in their order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, parameter in signature(module).parameters.items() if parameter.kind in kinds)


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a module by the names that its forward has for them."""
    return dict(signature(module).bind(*args, **kwargs).arguments)


def watch(
    model: nn.Module,
    containers: Mapping[str, Blocks],
    inputs: Inputs,
    named: Mapping[str, Collection[str]] | None = None,
    entered: Collection[tuple[type, str]] = (),
) -> list[BlockCall]:
    """Call the model once and return the calls of its blocks, in order, with those of the pieces inside them.

    Args:
        model: It is left as it was.
        containers: Lists of blocks by their path.
        inputs: Of the call.
        named: For each container, paths inside its blocks of other modules to watch.
        entered: Class of a block, and path inside it of a module whose own parts are watched in its place.
    """
    calls: list[BlockCall] = []
    open_block: list[BlockCall] = []

    def watch_block(path: str, position: int, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = BlockCall(path, position, module, by_name(module, args, kwargs), None, [])
            open_block.append(call)
            before = {name: _version(value) for name, value in call.arguments.items()}
            call.returned = forward(*args, **kwargs)
            open_block.pop()
            call.written = frozenset(name for name, value in call.arguments.items() if _version(value) != before[name])
            for piece in call.pieces:
                piece.written = piece.versions != [_version(out) for out in piece.outputs]
            _name_turns(call.pieces)
            calls.append(call)
            return call.returned

        return run

    def watch_piece(path: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            returned = forward(*args, **kwargs)
            if open_block:
                piece = PieceCall(path, module, by_name(module, args, kwargs), returned)
                piece.versions = [_version(out) for out in piece.outputs]
                open_block[-1].pieces.append(piece)
            return returned

        return run

    with Overrides() as overrides, torch.no_grad():
        for path, container in containers.items():
            for position, block in enumerate(container):
                overrides.set(block, watch_block(path, position, block, forward_of(block)))
                inside = dict(block.named_modules())
                enter = {place for kind, place in entered if kind is type(block)}
                found = {
                    **dict(pieces(block, enter)),
                    **{p: inside[p] for p in (named or {}).get(path, ()) if p in inside},
                }
                for name, piece in found.items():
                    overrides.set(piece, watch_piece(name, piece, forward_of(piece)))
        model(*inputs.args, **inputs.kwargs)
    return calls


def _version(value: Any) -> int:
    """Return how often a tensor has been written into; inference tensors do not tell."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _name_turns(pieces: list[PieceCall]) -> None:
    """Tell the calls of a piece that its block calls more than once apart."""
    calls, seen = Counter(piece.path for piece in pieces), Counter[str]()
    for piece in pieces:
        path = piece.path
        seen[path] += 1
        if calls[path] > 1:
            piece.path = f"{path}{TURN}{seen[path]}/{calls[path]}"


def refiners(
    model: nn.Module, containers: Mapping[str, Blocks], inputs: Inputs, calls: list[BlockCall], returns: list[Returns]
) -> set[str]:
    """Return the containers that refine text: no stream enters any of their calls that the latents change.

    The model is called again with other latents, and each call of a block compared with the one seen before; and once
    more at another timestep, where it must call the same blocks.
    """
    changed: set[str] = set()

    def compare(before: BlockCall, names: Returns, now: Mapping[str, Any]) -> None:
        streams = before.streams(names)
        if not streams or not all(torch.equal(value, now[name]) for name, value in streams.items()):
            changed.add(before.container)

    _call_alike(model, containers, moved_inputs(model, inputs, time=False), calls, returns, compare)
    _call_alike(model, containers, moved_inputs(model, inputs), calls, returns, lambda *_: None)
    return set(containers) - changed


def _call_alike(
    model: nn.Module,
    containers: Mapping[str, Blocks],
    inputs: Inputs,
    calls: list[BlockCall],
    returns: list[Returns],
    look: Callable[[BlockCall, Returns, Mapping[str, Any]], None],
) -> None:
    """Call the model with other arguments; look at each call of a block beside the one seen before."""
    following = iter(zip(calls, returns, strict=True))
    differs = f"{type(model).__name__} calls other blocks with other latents or at another timestep; not supported"

    def compared(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before, names = next(following, (None, ""))
            if before is None or before.module is not module:
                raise AnatomyError(differs)
            look(before, names, by_name(module, args, kwargs))
            return forward(*args, **kwargs)

        return run

    with Overrides() as overrides, torch.no_grad():
        for container in containers.values():
            for block in container:
                overrides.set(block, compared(block, forward_of(block)))
        model(*inputs.args, **inputs.kwargs)
    if next(following, None) is not None:
        raise AnatomyError(differs)
