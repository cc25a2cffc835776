"""Reads the streams of a block from its arguments and packs them into what it returns."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from dicache.anatomy import Block
from dicache.anatomy.watching import signature

Tensors = dict[str, Tensor]


class Streams:
    """The streams of one block."""

    def __init__(self, block: Block, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module = module
        self.forward = forward
        self._returns = block.returns
        parameters = list(signature(module).parameters)
        self._places = [(name, parameters.index(name)) for name in block.streams]
        # The name and place of the argument that leaves the block by itself, if one does.
        self.alone = self._places[0] if isinstance(block.returns, str) and len(self._places) == 1 else None

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensors:
        """Return the streams that enter with a call, by argument name."""
        return {name: kwargs[name] if name in kwargs else args[place] for name, place in self._places}

    def put(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], streams: Mapping[str, Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call with other streams in them."""
        given, named = list(args), dict(kwargs)
        for name, place in self._places:
            if name in named:
                named[name] = streams[name]
            else:
                given[place] = streams[name]
        return tuple(given), named

    def unpack(self, returned: Any) -> Tensors:
        """Return the streams that leave with what the block returned."""
        if isinstance(self._returns, str):
            return {self._returns: returned}
        return {name: out for name, out in zip(self._returns, returned, strict=True) if name is not None}

    def pack(self, streams: Mapping[str, Tensor]) -> Any:
        """Return streams the way the block returns them; where it returns no stream, None."""
        if isinstance(self._returns, str):
            return streams[self._returns]
        return tuple(None if name is None else streams[name] for name in self._returns)


def delta(out: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> Tensors:
    """Return output minus input of a range of blocks, for each stream that leaves it; what it makes anew, whole."""
    return {name: tensor - beside(tensor, into[name]) if name in into else tensor for name, tensor in out.items()}


def add(into: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> Tensors:
    """Return the streams with the delta added; a stream without one passes."""
    both = {name: beside(part, into[name]) + part if name in into else part for name, part in change.items()}
    return {**into, **both}


def replace(into: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> Tensors:
    """Return the streams as a range of blocks left them; a stream that does not leave it passes."""
    return {**into, **made}


def beside(there: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor on the device of another: a range of blocks may begin on one device and end on the next."""
    return tensor if tensor.device == there.device else tensor.to(there.device)
