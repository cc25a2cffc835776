"""Find the blocks, sites, streams and segments of a model by watching one call of it. No table of models."""

from dataclasses import replace

from torch import nn

from dicache.anatomy.branches import sites_of
from dicache.anatomy.inputs import Inputs, example_inputs, latents_of
from dicache.anatomy.macs import TOTAL, count_macs
from dicache.anatomy.middles import middle_of
from dicache.anatomy.parts import Anatomy, AnatomyError, Block
from dicache.anatomy.probing import norms_of
from dicache.anatomy.recognising import containers
from dicache.anatomy.streams import check_streams, segments, streams
from dicache.anatomy.unets import is_unet, unet_blocks, without_additions
from dicache.anatomy.watching import BlockCall, Returns, refiners, watch


def survey(model: nn.Module, inputs: Inputs | None = None) -> Anatomy:
    """Return the anatomy of a diffusion transformer or U-Net.

    The model is called a few times without gradients. What its blocks take and return, tensor object by tensor
    object, tells the streams and which blocks follow one another directly; replacing a module's output by NaN tells
    what it feeds; operators are counted, not guessed.

    Args:
        model: A transformer or U-Net in evaluation mode, as diffusers builds it.
        inputs: Arguments of one call; made up from the model's configuration when left out.

    Raises:
        AnatomyError: If no blocks or no branches in them are found, or they are called in a way that is not understood.
    """
    if model.training:
        raise AnatomyError(f"the {type(model).__name__} is in training mode, where it draws at random; call its eval()")
    inputs = inputs or example_inputs(model)
    if is_unet(model):
        inputs = without_additions(inputs)
        blocks, links = unet_blocks(model, inputs)
        blocks, macs = _measure(model, blocks, inputs)
        return Anatomy(
            model=type(model).__name__,
            blocks=tuple(blocks),
            segments=((0, len(blocks)),),
            macs=macs,
            latents=tuple(latents_of(inputs.args, inputs.kwargs).shape[1:]),
            links=links,
        )
    lists = containers(model)
    if not lists:
        raise AnatomyError(
            f"{type(model).__name__} has no list of modules that each hold an attention: found no transformer blocks"
        )
    calls = watch(model, lists, inputs)
    returns = streams(calls)
    text = refiners(model, lists, inputs, calls, returns)
    main = [place for place, call in enumerate(calls) if call.container not in text]
    calls, returns = [calls[place] for place in main], [returns[place] for place in main]
    _check_called_once(model, calls, lists)
    blocks = [_block(index, *seen) for index, seen in enumerate(zip(calls, returns, strict=True))]
    blocks, macs = _measure(model, blocks, inputs)
    return Anatomy(
        model=type(model).__name__,
        blocks=tuple(blocks),
        segments=segments(calls, returns),
        macs=macs,
        latents=tuple(latents_of(inputs.args, inputs.kwargs).shape[1:]),
    )


def _check_called_once(model: nn.Module, calls: list[BlockCall], lists: dict[str, nn.ModuleList]) -> None:
    if not calls:
        raise AnatomyError(f"{type(model).__name__}: no block of {', '.join(lists)} was called")
    seen: set[int] = set()
    for call in calls:
        if id(call.module) in seen:
            raise AnatomyError(f"{type(model).__name__} calls {call.path} more than once a step; not supported")
        seen.add(id(call.module))


def _block(index: int, call: BlockCall, returns: Returns) -> Block:
    check_streams(call, returns)
    block = Block(
        index=index,
        path=call.container,
        position=call.position,
        kind=type(call.module).__name__,
        returns=returns,
        sites=sites_of(call, returns),
    )
    return replace(block, norms=norms_of(block, call), middle=middle_of(block, call))


def _measure(model: nn.Module, blocks: list[Block], inputs: Inputs) -> tuple[list[Block], int]:
    """Return the blocks with the multiply-accumulates of each and of its sites, and those of the whole call."""
    paths = [block.module for block in blocks]
    paths += [f"{block.module}.{path}" for block in blocks for site in block.sites for path in site.modules]
    macs = count_macs(lambda: model(*inputs.args, **inputs.kwargs), {path: model.get_submodule(path) for path in paths})
    measured = []
    for block in blocks:
        sites = [
            replace(site, macs=sum(macs[f"{block.module}.{path}"] for path in site.modules)) for site in block.sites
        ]
        measured.append(replace(block, macs=macs[block.module], sites=tuple(sites)))
    return measured, macs[TOTAL]
