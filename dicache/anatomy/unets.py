"""U-Nets: residual blocks, transformers and samplers in the order in which they run, and the skip connections."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dicache.anatomy.branches import sites_of
from dicache.anatomy.inputs import Inputs
from dicache.anatomy.overrides import Overrides
from dicache.anatomy.parts import AnatomyError, Block, Site
from dicache.anatomy.probing import Probe, carries, feeding_only, nan_like, norms_of
from dicache.anatomy.recognising import count_matrices, is_matrix
from dicache.anatomy.streams import check_streams, streams
from dicache.anatomy.watching import BlockCall, Returns, signature, watch

LISTS = ("resnets", "attentions", "downsamplers", "upsamplers")  # what diffusers calls a stage's lists of blocks
TRANSFORMER = "transformer_blocks"  # and the list inside of what stands in `attentions`
# Arguments of a call that add to what its blocks make; what they are made of can be seen without them.
ADDED = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)

Links = tuple[tuple[int, int], ...]


def is_unet(model: nn.Module) -> bool:
    """Whether a model has stages that go down and up and hold residual blocks."""
    stages = [getattr(model, name, None) for name in ("down_blocks", "up_blocks")]
    return all(isinstance(s, nn.ModuleList) and any(hasattr(stage, "resnets") for stage in s) for s in stages)


def without_additions(inputs: Inputs) -> Inputs:
    """Return arguments of a call without what a ControlNet or an adapter adds."""
    return Inputs(inputs.args, {name: value for name, value in inputs.kwargs.items() if name not in ADDED})


def unet_blocks(model: nn.Module, inputs: Inputs) -> tuple[list[Block], Links]:
    """Return the blocks of a U-Net in the order in which they run, and its skip connections.

    Which block takes what another made is told by the numbers that arrive, and then shown: with everything inside a
    skip connection replaced by NaN, but for the one tensor that leaves it, none may arrive in the model's output.

    Args:
        model: As diffusers builds it.
        inputs: Arguments of one call, without additions.

    Raises:
        AnatomyError: If it is built in a way that is not understood.
    """
    lists = dict(_lists(model))
    if any(getattr(stage, "s1", None) for stage in model.up_blocks):  # type: ignore[union-attr]
        raise AnatomyError(
            f"FreeU is on in this {type(model).__name__} and changes what its skip connections carry; call its "
            "disable_freeu() while it is surveyed. A schedule may be replayed with FreeU on"
        )
    calls = watch(model, lists, inputs)
    _check_calls(model, calls, lists)
    links = _links(model, calls)
    inner = _transformers(model, lists, inputs)
    blocks = [_block(index, call, inner.get(call.path, [])) for index, call in enumerate(calls)]
    for maker, taker in links:
        _show(model, inputs, calls, maker + 1, taker)
    return blocks, links


def _lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of blocks with their paths."""
    stages = [(f"{name}.{i}", s) for name in ("down_blocks", "up_blocks") for i, s in enumerate(getattr(model, name))]
    middle = getattr(model, "mid_block", None)
    for path, stage in [*stages, *([("mid_block", middle)] if middle is not None else [])]:
        for name, child in stage.named_children():
            if name in LISTS and isinstance(child, nn.ModuleList):
                yield f"{path}.{name}", child
            elif count_matrices(child):
                raise AnatomyError(
                    f"{type(model).__name__}: {path} has {name}, a {type(child).__name__}, besides its "
                    f"{', '.join(LISTS)}; such U-Nets are not supported"
                )


def _check_calls(model: nn.Module, calls: list[BlockCall], lists: Mapping[str, nn.ModuleList]) -> None:
    ran = [call.path for call in calls]
    known = [f"{path}.{position}" for path, blocks in lists.items() for position in range(len(blocks))]
    if sorted(ran) != sorted(known):
        odd = sorted(path for path in known if ran.count(path) != 1)
        raise AnatomyError(f"{type(model).__name__} calls {odd[0]} {ran.count(odd[0])} times a step; needed once")
    for call in calls:
        if not isinstance(_enters(call), Tensor) or not all(isinstance(out, Tensor) for out in call.outputs):
            raise AnatomyError(f"{call.path}: {type(call.module).__name__} takes or returns what is not supported")
        if len(call.outputs) != 1:
            raise AnatomyError(
                f"{call.path}: {type(call.module).__name__} returns {len(call.outputs)} tensors, not one"
            )


def _stream(call: BlockCall) -> str:
    """Return the name of the argument that the one before has made."""
    return next(iter(signature(call.module).parameters))


def _enters(call: BlockCall) -> Any:
    return call.arguments.get(_stream(call))


def _links(model: nn.Module, calls: list[BlockCall]) -> Links:
    """Return what enters each block besides the output of the one before it, the outermost skip connection first.

    Raises:
        AnatomyError: If something else enters a block, or what is inside one connection is not inside the next.
    """
    made = [_enters(calls[0]), *(call.outputs[0] for call in calls)]  # by block -1, 0, 1, ...
    links: list[tuple[int, int]] = []
    for index, call in enumerate(calls[1:], 1):
        given = _enters(call)
        before = made[index].to(given.device)  # the model may lie on several
        if given.shape == before.shape and torch.equal(given, before):
            continue
        rest = given[:, before.shape[1] :]
        # A later maker first: an attention that adds nothing makes what the block before it made.
        makers = [m for m in range(index - 1, -2, -1) if rest.shape == made[m + 1].shape]
        maker = next((m for m in makers if torch.equal(rest, made[m + 1].to(rest.device))), None)
        if maker is None or not torch.equal(given[:, : before.shape[1]], before):
            raise AnatomyError(
                f"{type(model).__name__}: what enters {call.path} is neither what the block before it made, nor that "
                "and what an earlier block made; such U-Nets are not supported"
            )
        links.append((maker, index))
    links.sort()
    if not links or any(maker == other or taker <= last for (maker, last), (other, taker) in _pairs(links)):
        raise AnatomyError(f"{type(model).__name__}: its skip connections {links} are not one inside the other")
    return tuple(links)


def _pairs(links: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield each connection after the one that is inside it."""
    return zip(links[1:], links, strict=False)


def _show(model: nn.Module, inputs: Inputs, calls: list[BlockCall], start: int, stop: int) -> None:
    """Raise AnatomyError unless the output of the last of some blocks is all that the others need of them."""

    if start == stop:
        return
    given = {calls[index].module: calls[index].returned for index in (*range(start), stop - 1)}
    given |= {calls[index].module: nan_like(calls[index].returned) for index in range(start, stop - 1)}
    with Overrides() as overrides, torch.no_grad():
        for module, value in given.items():
            overrides.set(module, partial(_give, value))
        out = model(*inputs.args, **inputs.kwargs)
    if torch.isnan(out[0] if isinstance(out, (tuple, list)) else out.sample).any():
        raise AnatomyError(
            f"{type(model).__name__}: besides what leaves {calls[stop - 1].path}, something else that the blocks from "
            f"{calls[start].path} on make is used behind them; such U-Nets are not supported"
        )


def _give(value: Any, *_args: Any, **_kwargs: Any) -> Any:
    return value


def _transformers(
    model: nn.Module, lists: Mapping[str, nn.ModuleList], inputs: Inputs
) -> dict[str, list[tuple[BlockCall, Returns]]]:
    """Return the calls of the transformer blocks inside of each block that has them, by its path."""
    inside: dict[str, nn.ModuleList] = {}
    for path, blocks in lists.items():
        for position, block in enumerate(blocks):
            found = getattr(block, TRANSFORMER, None)
            if isinstance(found, nn.ModuleList):
                inside[f"{path}.{position}.{TRANSFORMER}"] = found
            elif path.endswith(".attentions"):
                raise AnatomyError(
                    f"{path}.{position} is a {type(block).__name__} without {TRANSFORMER}, which is not supported"
                )
    calls = watch(model, inside, inputs) if inside else []
    by_path: dict[str, list[tuple[BlockCall, Returns]]] = {}
    for call, returns in zip(calls, streams(calls), strict=True):
        check_streams(call, returns)
        by_path.setdefault(call.container.removesuffix(f".{TRANSFORMER}"), []).append((call, returns))
    return by_path


def _block(index: int, call: BlockCall, transformers: list[tuple[BlockCall, Returns]]) -> Block:
    name = _stream(call)
    shapes = tuple(tuple(tensor.shape[1:]) for tensor in (_enters(call), call.outputs[0]))
    block = Block(
        index=index,
        path=call.container,
        position=call.position,
        kind=type(call.module).__name__,
        returns=(name,) if isinstance(call.returned, (tuple, list)) else name,
        sites=(),
        shapes=shapes,
    )
    if not transformers:
        block = replace(block, sites=_convolutions(call, block))
        return replace(block, norms=norms_of(block, call)) if block.sites else block
    sites: list[Site] = []
    norms: dict[str, tuple[str, ...]] = {}
    for place, (inner, returns) in enumerate(transformers):
        path = f"{TRANSFORMER}.{inner.position}"
        own = replace(block, sites=sites_of(inner, returns), returns=returns)
        feeds = norms_of(own, inner)
        named = {site.branch: site.branch if len(transformers) == 1 else f"{site.branch}.{place}" for site in own.sites}
        sites += [
            replace(
                site,
                branch=named[site.branch],
                module=f"{path}.{site.module}",
                inner=tuple(f"{path}.{part}" for part in site.inner),
            )
            for site in own.sites
        ]
        norms |= {f"{path}.{norm}": tuple(named[branch] for branch in fed) for norm, fed in feeds.items()}
    return replace(block, sites=tuple(sites), norms=norms)


def _convolutions(call: BlockCall, block: Block) -> tuple[Site, ...]:
    """Return the site of a residual block, what is added to its stream, or of a sampler, its convolution."""
    order = [piece.path for piece in call.pieces if is_matrix(piece.module)]
    if len(order) == 1:
        return (Site("conv", order[0]),)
    probe = Probe(call)
    entering = {name: call.arguments[name] for name in block.streams}
    for path in reversed(order):
        if order.count(path) == 1 and not carries(probe, path, entering):
            inner = feeding_only(probe, path, order[: order.index(path)])
            if inner:
                return (Site("conv", path, inner=inner),)
    if order:
        raise AnatomyError(f"{call.path}: which convolution of this {block.kind} is added to its stream is not known")
    return ()
