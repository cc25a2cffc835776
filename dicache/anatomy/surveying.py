"""Find the blocks, sites, streams and segments of a model by watching one call of it. No table of models."""

from collections.abc import Hashable, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

from torch import Tensor, nn

from dicache.anatomy.branches import sites_of, wrappers
from dicache.anatomy.inputs import Inputs, example_inputs, latents_of
from dicache.anatomy.macs import TOTAL, count_macs
from dicache.anatomy.middles import middle_of
from dicache.anatomy.parts import Anatomy, AnatomyError, Block, Site
from dicache.anatomy.probing import continued, does_with_one_token, norms_of
from dicache.anatomy.recognising import containers
from dicache.anatomy.spread import kind_of
from dicache.anatomy.streams import check_streams, segments, streams
from dicache.anatomy.unets import is_unet, unet_blocks, without_additions
from dicache.anatomy.verifying import buffers_kept, unread, verified
from dicache.anatomy.watching import BlockCall, Returns, refiners, watch

# Are put round a forward, or share it out among devices, and do not change what it is.
HOOKS = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_parallel_config")


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
        blocks, macs = measured(model, blocks, inputs)
        return Anatomy(
            model=kind_of(model),
            blocks=tuple(blocks),
            segments=((0, len(blocks)),),
            macs=macs,
            latents=tuple(latents_of(inputs.args, inputs.kwargs).shape[1:]),
            links=links,
        )
    with buffers_kept(model, inputs):
        return _survey_transformer(model, inputs)


def _survey_transformer(model: nn.Module, inputs: Inputs) -> Anatomy:
    lists = containers(model)
    if not lists:
        raise AnatomyError(
            f"{type(model).__name__} has no list of modules that each hold an attention: found no transformer blocks; "
            "say where they are with dicache.anatomy.describe"
        )
    entered: set[tuple[type, str]] = set()
    calls = watch(model, lists, inputs)
    returns = streams(calls)
    while further := _wrappers(calls, returns) - entered:
        entered |= further
        calls = watch(model, lists, inputs, entered=entered)
        returns = streams(calls)
    text = refiners(model, lists, inputs, calls, returns)
    main = [place for place, call in enumerate(calls) if call.container not in text]
    calls, returns = [calls[place] for place in main], [returns[place] for place in main]
    _check_called_once(model, calls, lists)
    known: dict[Hashable, Block] = {}
    blocks = [_block(index, *seen, known) for index, seen in enumerate(zip(calls, returns, strict=True))]
    blocks = verified(model, inputs, calls, blocks)
    blocks, macs = measured(model, blocks, inputs)
    return Anatomy(
        model=kind_of(model),
        blocks=tuple(blocks),
        segments=unread(model, inputs, calls, segments(calls, [block.returns for block in blocks])),
        macs=macs,
        latents=tuple(latents_of(inputs.args, inputs.kwargs).shape[1:]),
    )


def _wrappers(calls: list[BlockCall], returns: list[Returns]) -> set[tuple[type, str]]:
    """Return which parts of which blocks hold a branch and its residual, and are not a branch."""
    kinds = {_kind(call, names): (call, names) for call, names in zip(calls, returns, strict=True)}
    return {(type(call.module), path) for call, names in kinds.values() for path in wrappers(call, names)}


def _check_called_once(model: nn.Module, calls: list[BlockCall], lists: dict[str, nn.ModuleList]) -> None:
    if not calls:
        raise AnatomyError(f"{type(model).__name__}: no block of {', '.join(lists)} was called")
    seen: set[int] = set()
    for call in calls:
        if id(call.module) in seen:
            raise AnatomyError(f"{type(model).__name__} calls {call.path} more than once a step; not supported")
        seen.add(id(call.module))


def _block(index: int, call: BlockCall, returns: Returns, known: dict[Hashable, Block]) -> Block:
    """Return a block's description; one that is made and called as a known one is has the same, and is not probed."""
    kind = _kind(call, returns)
    if kind in known:
        return replace(known[kind], index=index, path=call.container, position=call.position)
    check_streams(call, returns)
    try:
        known[kind] = described(index, call, returns, sites_of(call, returns))
    except AnatomyError:
        raise
    except Exception as error:
        raise AnatomyError(
            f"{call.path} cannot be probed with NaN or zeros: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    return known[kind]


def described(index: int, call: BlockCall, returns: Returns, sites: tuple[Site, ...], *, sure: bool = False) -> Block:
    """Return a block with these sites, and what is found out about it by probing.

    Args:
        index: Of the block.
        call: A call of it.
        returns: The argument that each of its outputs continues.
        sites: Its own.
        sure: Whether that is said and not guessed.

    Raises:
        AnatomyError: If the block writes into a stream or into what a branch gave.
    """
    if written := call.written & call.streams(returns).keys():
        raise AnatomyError(
            f"{call.path} writes into its {min(written)}, so that what it adds to it cannot be told; not supported"
        )
    for piece in call.pieces:
        if piece.written and any(piece.path == site.module for site in sites):
            raise AnatomyError(
                f"{call.path} writes into what its {piece.path} gives, which then cannot be kept; not supported"
            )
    block = Block(
        index=index,
        path=call.container,
        position=call.position,
        kind=kind_of(call.module),
        returns=returns,
        sites=sites,
    )
    if not sure:
        block = replace(block, returns=continued(block, call))
    block = replace(block, norms=norms_of(block, call), middle=middle_of(block, call))
    return replace(block, one_token=does_with_one_token(block, call))


def _kind(call: BlockCall, returns: Returns) -> Hashable:
    """Return what two blocks share that are made alike, setting by setting, and called alike."""
    parts = [(path, type(part), _form(vars(part))) for path, part in call.module.named_modules()]
    arguments = [(name, _form(value)) for name, value in call.arguments.items()]
    pieces = [(piece.path, _form(piece.returned)) for piece in call.pieces]
    return returns, _form(call.returned), tuple(parts), tuple(arguments), tuple(pieces)


def _form(value: Any) -> Any:
    """Return what of a setting, an argument or an output has to be equal in blocks that are alike."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, nn.Module) or type(value).__module__.startswith("torch.distributed"):
        return type(value)  # looked at by itself, or of how the model is spread
    if isinstance(value, (tuple, list, set, frozenset)):
        return type(value), tuple(map(_form, value))
    if isinstance(value, Mapping):
        return type(value), tuple((key, _form(part)) for key, part in value.items() if key not in HOOKS)
    if isinstance(value, Hashable) and (type(value).__module__ == "builtins" or isinstance(value, Enum)):
        return value  # numbers, words, functions, classes
    return type(value), _form(vars(value)) if hasattr(value, "__dict__") else id(value)


def measured(model: nn.Module, blocks: list[Block], inputs: Inputs) -> tuple[list[Block], int]:
    """Return the blocks with the multiply-accumulates of each and of its sites, and those of the whole call."""
    paths = [block.module for block in blocks]
    paths += [f"{block.module}.{path}" for block in blocks for site in block.sites for path in site.modules]
    macs = count_macs(lambda: model(*inputs.args, **inputs.kwargs), model, paths)
    found = []
    for block in blocks:
        sites = [
            replace(site, macs=sum(macs[f"{block.module}.{path}"] for path in site.modules)) for site in block.sites
        ]
        found.append(replace(block, macs=macs[block.module], sites=tuple(sites)))
    return found, macs[TOTAL]
