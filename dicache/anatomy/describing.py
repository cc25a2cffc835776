"""An anatomy written by hand, for a model of which the survey is not sure, or one that is not from diffusers."""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from dicache.anatomy.inputs import Inputs, latents_of
from dicache.anatomy.parts import MADE, Anatomy, AnatomyError, Block, Site, check_branch
from dicache.anatomy.spread import kind_of
from dicache.anatomy.streams import check_streams, segments, streams
from dicache.anatomy.surveying import described, measured
from dicache.anatomy.verifying import buffers_kept, unread, verified
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

    What is said is compared with that call, and what does not fit it is refused; whether deltas may stand for `runs`
    that you say yourself, `dicache.conformance` tells, as it does all laws of the runtime.

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
    with buffers_kept(model, inputs):
        return _describe(model, inputs, lists, blocks, returns or {}, runs)


def _describe(
    model: nn.Module,
    inputs: Inputs,
    lists: Mapping[str, Blocks],
    blocks: Mapping[str, Branches],
    returns: Mapping[str, Returns],
    runs: Sequence[tuple[int, int]] | None,
) -> Anatomy:
    calls = watch(model, lists, inputs, {path: list(_paths(branches)) for path, branches in blocks.items()})
    seen = [call.path for call in calls]
    for path, container in lists.items():
        for position in range(len(container)):
            if (count := seen.count(f"{path}.{position}")) != 1:
                raise AnatomyError(f"{path}.{position} is called {count} times in a call of the model, needed once")
    known = []
    for index, (call, guessed) in enumerate(zip(calls, streams(calls), strict=True)):
        names = returns.get(call.container, guessed)
        _check_returns(call, names)
        sites = _sites(call, blocks[call.container])
        known.append(described(index, call, names, sites, sure=call.container in returns))
    known = verified(model, inputs, calls, known)
    if runs is None:
        found = unread(model, inputs, calls, segments(calls, [block.returns for block in known]))
    else:
        found = _checked_runs(runs, known)
    known, macs = measured(model, known, inputs)
    return Anatomy(
        model=kind_of(model),
        blocks=tuple(known),
        segments=found,
        macs=macs,
        latents=tuple(latents_of(inputs.args, inputs.kwargs).shape[1:]),
    )


def _checked_runs(runs: Sequence[tuple[int, int]], blocks: Sequence[Block]) -> tuple[tuple[int, int], ...]:
    found = tuple((int(start), int(stop)) for start, stop in runs)
    if [index for start, stop in found for index in range(start, stop)] != list(range(len(blocks))):
        raise AnatomyError(f"the runs must cover the blocks 0 to {len(blocks) - 1} in order, found {list(found)}")
    for start, stop in found:
        for block in blocks[start:stop] if stop - start > 1 else ():
            names = (block.returns,) if isinstance(block.returns, str) else block.returns
            if any(name and name.startswith(MADE) for name in names):
                raise AnatomyError(
                    f"block {block.index} makes something anew besides its streams, so it must be a run by itself; "
                    f"found it in the run {(start, stop)}"
                )
    return found


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
    named = [path for site in sites for path in site.modules]
    for path in named:
        if outer := [other for other in named if path.startswith(f"{other}.") or (path is not other and path == other)]:
            raise AnatomyError(f"{call.path}: {path} lies inside {outer[0]}, and only one of them can be a branch")
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
