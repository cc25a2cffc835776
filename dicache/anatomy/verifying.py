"""Checks of a whole model, after its blocks were looked at one by one."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dicache.anatomy.inputs import Inputs, moved_inputs
from dicache.anatomy.nested import tensors_of
from dicache.anatomy.overrides import Overrides, without_turn
from dicache.anatomy.parts import AnatomyError, Block
from dicache.anatomy.probing import nan_like
from dicache.anatomy.standins import one_token, pass_on, view_of_zero
from dicache.anatomy.watching import BlockCall

Given = dict[str, Callable[..., Any]]  # path of a module -> what stands in for its forward
Runs = tuple[tuple[int, int], ...]


@contextmanager
def buffers_kept(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Put back, behind what is done inside, the buffers of a model: some of its modules are given NaN there.

    Raises:
        AnatomyError: If a call changes a buffer by itself: what it makes of it cannot be made when it does not run.
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def put_back() -> list[str]:
        changed = [n for n, b in model.named_buffers() if n in before and not _equal(b, before[n])]
        buffers = dict(model.named_buffers())
        for name in changed:
            buffers[name].copy_(before[name])
        return changed

    with torch.no_grad():
        model(*inputs.args, **inputs.kwargs)
        if changed := put_back():
            raise AnatomyError(
                f"a call of the {type(model).__name__} changes its buffer {changed[0]}, which would be another one "
                "where modules do not run; not supported"
            )
        try:
            yield
        finally:
            put_back()


def _equal(one: Tensor, two: Tensor) -> bool:
    """Whether tensors are equal bit for bit; NaN equals itself, as where the weights hold one."""
    return one.shape == two.shape and bool(((one == two) | (one.isnan() & two.isnan())).all())


def _alike(want: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    return len(want) == len(got) and all(map(_equal, want, got))


def verified(model: nn.Module, inputs: Inputs, calls: Sequence[BlockCall], blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks, without the norms that something reads besides their branches, or whose tokens it counts.

    With every branch giving what it gave, and the norms that feed only branches left out, the model's output is the
    same; and so it is, behind a call with other latents, with every block giving what it gave.

    Raises:
        AnatomyError: If it is not: something else goes from branch to branch, or from block to block, than what they
            return, and would be missing or old where they do not run; or if the model gives another output each time.
    """
    want = _output(model, inputs, {})
    if not want:
        raise AnatomyError(
            f"the {type(model).__name__} returns no tensor that can be found, so that nothing can be told by "
            "comparing; let it return tensors, alone or in tuples, lists, dictionaries and dataclasses"
        )
    if not _alike(want, _output(model, inputs, {})):
        raise AnatomyError(
            f"the {type(model).__name__} gives another output each time that it is called with the same arguments, so "
            "that nothing can be told by comparing; survey it with torch.use_deterministic_algorithms(True)"
        )
    holders = _holders(model)
    blocks = [_unshared(model, block, holders) for block in blocks]
    branches: Given = {}
    for call, block in zip(calls, blocks, strict=True):
        made = {piece.path: piece.returned for piece in call.pieces}
        for site in block.sites:
            branches[f"{block.module}.{site.module}"] = _giving(made[site.module])
            branches |= {f"{block.module}.{path}": _giving(view_of_zero(made[path])) for path in site.inner}
    norms = {block.index: {f"{block.module}.{path}": pass_on for path in block.norms} for block in blocks}

    def fits(*chosen: int) -> bool:
        without = {path: stand_in for index in chosen for path, stand_in in norms[index].items()}
        return _alike(want, _output(model, inputs, {**branches, **without}))

    held = [block.index for block in blocks]
    if not fits(*held):
        held = [index for index in held if fits(index)]
        if not fits(*held):
            held = []
    if not fits(*held):
        raise AnatomyError(
            f"with every branch of the {type(model).__name__} giving what it gave, its output is another: something "
            "else than what they return passes from them to the rest of the model; not supported"
        )
    blocks = [block if block.index in held else replace(block, norms={}, one_token=False) for block in blocks]
    brief = {f"{b.module}.{path}": one_token for b in blocks if b.one_token for path in b.norms}
    if brief and not _alike(want, _output(model, inputs, {**branches, **brief})):
        blocks = [replace(block, one_token=False) for block in blocks]
    with torch.no_grad():
        other = moved_inputs(model, inputs)
        model(*other.args, **other.kwargs)
    if not _alike(want, _output(model, inputs, {call.path: _giving(call.returned) for call in calls})):
        raise AnatomyError(
            f"with every block of the {type(model).__name__} giving what it gave, its output is another: a block "
            "leaves something behind that it does not return, and that would be old where it is skipped; not supported"
        )
    return blocks


def _holders(model: nn.Module) -> Counter[nn.Module]:
    """Return how many modules each module is a part of."""
    return Counter(child for part in model.modules() for child in set(part.children()))


def _unshared(model: nn.Module, block: Block, holders: Mapping[nn.Module, int]) -> Block:
    """Return a block without the norms that it shares with others; a branch that it shares is refused."""

    def shared(path: str) -> bool:
        return holders[model.get_submodule(f"{block.module}.{without_turn(path)}")] > 1

    for path in (path for site in block.sites for path in site.modules):
        if shared(path):
            raise AnatomyError(
                f"{block.module}.{path} is a part of other modules as well; a shared branch is not supported"
            )
    norms = {path: feeds for path, feeds in block.norms.items() if not shared(path)}
    return replace(block, norms=norms, one_token=block.one_token and norms.keys() == block.norms.keys())


def unread(model: nn.Module, inputs: Inputs, calls: Sequence[BlockCall], found: Runs) -> Runs:
    """Return the segments, cut where something that is no block reads what a block inside of one made.

    With the last block of a segment giving what it gave, and those before it NaN, the model's output is the same.
    """
    want = _output(model, inputs, {})
    cut: list[tuple[int, int]] = []
    for start, stop in found:
        lost = {call.path: _giving(nan_like(call.returned)) for call in calls[start : stop - 1]}
        last = calls[stop - 1]
        ends = [stop]
        if lost and not _alike(want, _output(model, inputs, {**lost, last.path: _giving(last.returned)})):
            pairs = [(calls[i], calls[i + 1]) for i in range(start, stop - 1)]
            given = [{a.path: _giving(nan_like(a.returned)), b.path: _giving(b.returned)} for a, b in pairs]
            ends = [i for i, g in enumerate(given, start + 1) if not _alike(want, _output(model, inputs, g))] + ends
        cut += pairwise([start, *ends])
    return tuple(cut)


def _giving(value: Any) -> Callable[..., Any]:
    return partial(lambda value, *_args, **_kwargs: value, value)


def _output(model: nn.Module, inputs: Inputs, given: Given) -> list[Tensor]:
    """Return what the model gives when some of its modules do not run."""
    with Overrides() as overrides, torch.no_grad():
        for path, forward in given.items():
            overrides.set(overrides.part(model, path), forward)
        return list(tensors_of(model(*inputs.args, **inputs.kwargs)))
