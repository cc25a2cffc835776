"""An anatomy written by hand, for a model of which the survey is not sure, or one that is not from diffusers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from dicache.anatomy.inputs import Inputs, latents_of
from dicache.anatomy.middles import middle_of
from dicache.anatomy.parts import MADE, Anatomy, AnatomyError, Block, Site, check_branch
from dicache.anatomy.probing import continued, norms_of
from dicache.anatomy.streams import check_streams, segments, streams, unread
from dicache.anatomy.surveying import measured
from dicache.anatomy.watching import BlockCall, Blocks, Returns, watch

Branches = Mapping[str, str | Sequence[str]]


def describe(
    model: nn.Module,
    inputs: Inputs,
    blocks: Mapping[str, Branches],
    *,
    returns: Mapping[str, Returns] | None = None,
    runs: Sequence[tuple[int, int]] | None = None,
) -> Anatomy:
    """Return the anatomy of a model by what you say of its blocks; everything else is measured in a call of it.

    What is said is compared with that call, and what does not fit it is refused. Whether the laws of the runtime hold
    with the result, `dicache.conformance` tells.

        describe(model, Inputs((x, t, y), {}), {"blocks": {"attn": "attn", "mlp": "mlp"}}, returns={"blocks": "x"})

    Args:
        model: In evaluation mode.
        inputs: Arguments of one call.
        blocks: Path of each list of blocks that see the latents -> the branches of its blocks: kind, with a name where
            there are several of the kind (`mlp.context`) -> path inside the block of the module whose output is kept.
            Of several paths the last is that module, and the others are modules that feed it and nothing else. Blocks
            of one list that lack a module do not have that branch.
        returns: For each list, the argument of a block that its output continues; of several outputs, one each:
            `made.0` for one that continues none, None where the block gives None. Told by the tensors that pass from
            block to block when left out.
        runs: Runs of blocks [start, stop), counted over all lists in the order in which they are called, that one
            delta may replace, since nothing else touches the streams between them. Watched when left out.

    Raises:
        AnatomyError: If the model has no such list, module or argument, a block is not called once, or its output has
            another shape than the argument that it is to continue.
    """
    if model.training:
        raise AnatomyError(f"the {type(model).__name__} is in training mode, where it draws at random; call its eval()")
    lists = {path: _list(model, path) for path in blocks}
    calls = watch(model, lists, inputs, {path: list(_paths(branches)) for path, branches in blocks.items()})
    seen = [call.path for call in calls]
    for path, container in lists.items():
        for position in range(len(container)):
            if (count := seen.count(f"{path}.{position}")) != 1:
                raise AnatomyError(f"{path}.{position} is called {count} times in a call of the model, needed once")
    said, described = returns or {}, []
    for index, (call, known) in enumerate(zip(calls, streams(calls), strict=True)):
        names = said.get(call.container, known)
        _check_returns(call, names)
        block = Block(
            index=index,
            path=call.container,
            position=call.position,
            kind=type(call.module).__name__,
            returns=names,
            sites=_sites(call, blocks[call.container]),
        )
        if call.container not in said:
            block = replace(block, returns=continued(block, call))
        described.append(replace(block, norms=norms_of(block, call), middle=middle_of(block, call)))
    found = (
        unread(model, inputs, calls, segments(calls, [block.returns for block in described]))
        if runs is None
        else tuple((int(start), int(stop)) for start, stop in runs)
    )
    if [index for start, stop in found for index in range(start, stop)] != list(range(len(calls))):
        raise AnatomyError(f"the runs must cover the blocks 0 to {len(calls) - 1} in order, found {list(found)}")
    described, macs = measured(model, described, inputs)
    return Anatomy(
        model=type(model).__name__,
        blocks=tuple(described),
        segments=found,
        macs=macs,
        latents=tuple(latents_of(inputs.args, inputs.kwargs).shape[1:]),
    )


def _list(model: nn.Module, path: str) -> Blocks:
    try:
        found = model.get_submodule(path)
    except AttributeError:
        found = None
    if not isinstance(found, (nn.ModuleList, nn.Sequential)) or not len(found):
        lists = [name for name, part in model.named_modules() if isinstance(part, (nn.ModuleList, nn.Sequential))]
        raise AnatomyError(
            f"{type(model).__name__} has no list of modules {path!r}; it has {', '.join(lists) or 'none'}"
        )
    return found


def _paths(branches: Branches) -> Iterator[str]:
    for said in branches.values():
        yield from (said,) if isinstance(said, str) else said


def _sites(call: BlockCall, branches: Branches) -> tuple[Site, ...]:
    sites = []
    ran = [piece.path for piece in call.pieces]
    for branch, said in branches.items():
        check_branch(branch)
        paths = (said,) if isinstance(said, str) else tuple(said)
        absent = [path for path in paths if path not in ran]
        if len(absent) == len(paths):
            continue
        if absent:
            raise AnatomyError(f"{call.path} does not call its {absent[0]} once; it calls {', '.join(ran)}")
        sites.append(Site(branch=branch, module=paths[-1], inner=paths[:-1]))
    if not sites:
        said = ", ".join(str(paths) for paths in branches.values())
        raise AnatomyError(f"{call.path} calls none of {said} directly; it calls {', '.join(ran) or 'nothing'}")
    return tuple(sorted(sites, key=lambda site: ran.index(site.entrance)))


def _check_returns(call: BlockCall, returns: Returns) -> None:
    names = (returns,) if isinstance(returns, str) else returns
    if isinstance(returns, str) == isinstance(call.returned, (tuple, list)) or len(names) != len(call.outputs):
        raise AnatomyError(f"{call.path} returns {len(call.outputs)} outputs, and {returns!r} names {len(names)}")
    for name, output in zip(names, call.outputs, strict=True):
        if not name or name.startswith(MADE):
            continue
        if name not in call.arguments:
            raise AnatomyError(f"{call.path} is not given {name!r}; it is given {', '.join(call.arguments)}")
        if getattr(call.arguments[name], "shape", None) != getattr(output, "shape", None):
            raise AnatomyError(f"{call.path}: an output that is to continue {name!r} has another shape than it")
    check_streams(call, returns)
