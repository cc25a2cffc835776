"""Streams and segments: what passes from block to block, told by the tensors themselves."""

import weakref
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dicache.anatomy.parts import AnatomyError
from dicache.anatomy.watching import BlockCall, Returns


def streams(calls: list[BlockCall]) -> list[Returns]:
    """Return, for each call, which argument each of its outputs belongs to.

    Output k belongs to argument a if the very same tensor arrives as a in the next block; blocks of one class share
    what any of them showed. A class that never showed it is matched by shape. None where nothing fits.
    """
    shown: dict[str, dict[int, str]] = {}
    for call, following in pairwise(calls):
        for k, output in enumerate(call.outputs):
            for argument, value in following.arguments.items():
                if isinstance(output, Tensor) and value is output and argument in call.arguments:
                    shown.setdefault(type(call.module).__name__, {})[k] = argument

    returns: list[Returns] = []
    for call in calls:
        known = shown.get(type(call.module).__name__, {})
        taken: set[str] = set()
        names: list[str | None] = []
        for k, output in enumerate(call.outputs):
            name = known[k] if k in known else _same_shape(call, output, taken | set(known.values()))
            fits = name is not None and isinstance(output, Tensor) and _shape(call.arguments.get(name)) == output.shape
            names.append(name if fits else None)
            taken.add(name or "")
        returns.append(tuple(names) if isinstance(call.returned, (tuple, list)) else names[0] or "")
    return returns


def check_streams(call: BlockCall, returns: Returns) -> None:
    """Raise AnatomyError unless every tensor that a block returns belongs to one of its arguments."""
    names = (returns,) if isinstance(returns, str) else returns
    kind = type(call.module).__name__
    for k, (name, output) in enumerate(zip(names, call.outputs, strict=True)):
        if name or output is None:
            continue
        if not isinstance(output, Tensor):
            raise AnatomyError(
                f"{call.path}: output {k} of {kind} is a {type(output).__name__}, which is not supported"
            )
        alike = [argument for argument, value in call.arguments.items() if _shape(value) == output.shape]
        why = {0: "none has that shape", 1: f"{alike} has that shape, but another output continues it"}
        raise AnatomyError(
            f"{call.path}: output {k} of {kind} is a tensor of shape {tuple(output.shape)}, and which argument it "
            f"continues is not known: {why.get(len(alike), f'{alike} all have that shape')}. If it is the sizes that "
            "coincide, call survey(model, inputs) with another number of tokens"
        )
    if not any(names):
        raise AnatomyError(f"{call.path}: {kind} returns nothing that continues an argument; it has no streams")


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _same_shape(call: BlockCall, output: Any, taken: set[str]) -> str | None:
    if not isinstance(output, Tensor):
        return None
    names = [n for n, value in call.arguments.items() if _shape(value) == output.shape and n not in taken]
    if len(names) > 1 and sum(isinstance(out, Tensor) for out in call.outputs) > 1:
        return None  # either of two streams of one size; the order in which they leave differs between models
    return next((name for name in ("hidden_states", "x") if name in names), names[0] if names else None)


def segments(calls: list[BlockCall], returns: list[Returns]) -> tuple[tuple[int, int], ...]:
    """Return the runs of blocks between which nothing else touches the streams."""
    used_later = _used_later(calls)
    found: list[tuple[int, int]] = []
    start = 0
    for index in range(1, len(calls)):
        before, here = calls[index - 1], calls[index]
        direct = before.container == here.container and index - 1 not in used_later
        names = returns[index - 1]
        for output, name in zip(before.outputs, (names,) if isinstance(names, str) else names, strict=True):
            direct = direct and (output is None or (name is not None and here.arguments.get(name) is output))
        if not direct:
            found.append((start, index))
            start = index
    found.append((start, len(calls)))
    return tuple(found)


def _used_later(calls: list[BlockCall]) -> set[int]:
    """Return the blocks one of whose outputs enters a block that is not the next one (long skip connections)."""
    made: dict[int, tuple[weakref.ref[Tensor], int]] = {}
    used: set[int] = set()
    for index, call in enumerate(calls):
        for value in _tensors(call.arguments):
            if id(value) in made:
                reference, maker = made[id(value)]
                if reference() is value and maker < index - 1:
                    used.add(maker)
        for output in call.outputs:
            if isinstance(output, Tensor):
                made[id(output)] = (weakref.ref(output), index)
    return used


def _tensors(arguments: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in arguments.values() if isinstance(value, Tensor)]
