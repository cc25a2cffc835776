"""Find the blocks, sites, streams and segments of a model by watching one call of it. No table of models."""

import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dicache.anatomy.inputs import Inputs, example_inputs, latents_of
from dicache.anatomy.macs import TOTAL, count_macs
from dicache.anatomy.overrides import Overrides
from dicache.anatomy.parts import Anatomy, AnatomyError, Block, Site

NOT_A_BRANCH = re.compile(r"norm|modulat|embed|adaln|rope|scale", re.IGNORECASE)
ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
FEED_FORWARD = re.compile(r"feedforward|mlp|swiglu|moe|ffn", re.IGNORECASE)
NORM = re.compile(r"norm", re.IGNORECASE)
KIND_WORDS = re.compile(r"self_?attn|cross_?attn|attention|attn|feed_?forward|ffn|mlp|ff|\d+$", re.IGNORECASE)


@dataclass
class _Call:
    """One call of a block, as it was seen."""

    path: str
    position: int
    module: nn.Module
    arguments: dict[str, Any]
    returned: Any
    inner: list["_Inner"]

    @property
    def outputs(self) -> tuple[Any, ...]:
        return tuple(self.returned) if isinstance(self.returned, (tuple, list)) else (self.returned,)


@dataclass
class _Inner:
    """One call of a branch inside a block."""

    name: str  # path inside the block
    module: nn.Module
    arguments: dict[str, Any]
    returned: Any


def survey(model: nn.Module, inputs: Inputs | None = None) -> Anatomy:
    """Return the anatomy of a diffusion transformer.

    The model is called a few times without gradients. What its blocks take and return, tensor object by tensor
    object, tells the streams and which blocks follow one another directly; replacing a norm's output by NaN tells
    what it feeds; operators are counted, not guessed.

    Args:
        model: A transformer in evaluation mode, as diffusers builds it.
        inputs: Arguments of one call; made up from the model's configuration when left out.

    Raises:
        AnatomyError: If no blocks or no branches in them are found, or they are called in a way that is not understood.
    """
    if model.training:
        raise AnatomyError(f"the {type(model).__name__} is in training mode, where it draws at random; call its eval()")
    inputs = inputs or example_inputs(model)
    containers = _containers(model)
    if not containers:
        raise AnatomyError(
            f"{type(model).__name__} has no list of modules that each hold an attention: found no transformer blocks"
        )
    calls = _watch(model, containers, inputs)
    refiners = _refiners(model, containers, inputs)
    calls = [call for call in calls if call.path not in refiners]
    seen: set[int] = set()
    for call in calls:
        if id(call.module) in seen:
            raise AnatomyError(
                f"{type(model).__name__} calls {call.path}.{call.position} more than once a step; not supported"
            )
        seen.add(id(call.module))
    if not calls:
        raise AnatomyError(f"{type(model).__name__}: no block of {', '.join(containers)} was called")
    returns = _streams(calls)
    blocks = [_block(index, call, returns[index]) for index, call in enumerate(calls)]
    blocks = [replace(block, norms=_norms(block, call, inputs)) for block, call in zip(blocks, calls, strict=True)]
    blocks, macs = _measure(model, blocks, inputs)
    latents = latents_of(inputs.args, inputs.kwargs)
    return Anatomy(
        model=type(model).__name__,
        blocks=tuple(blocks),
        segments=_segments(calls, blocks),
        macs=macs,
        latents=tuple(latents.shape[1:]),
    )


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention: one of diffusers' own classes, or one named so that holds a linear layer."""
    known = sys.modules.get("diffusers.hooks._common")
    if known is not None and isinstance(module, getattr(known, "_ATTENTION_CLASSES", ())):
        return True
    name = type(module).__name__
    return bool(ATTENTION.search(name)) and not NOT_A_BRANCH.search(name) and _count_matrices(module) > 0


def _count_matrices(module: nn.Module) -> int:
    return sum(isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in module.modules())


def _containers(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost lists all of whose elements hold an attention and are not one themselves."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and not inside
            and all(
                not isinstance(element, nn.ModuleList)
                and not is_attention(element)
                and any(is_attention(part) for part in element.modules())
                for element in module
            )
        ):
            found[path] = module
    return found


def _branches(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules of a block that may be a branch, with their path inside it."""
    for name, child in block.named_children():
        kind = type(child).__name__
        if is_attention(child):
            yield name, child
        elif NOT_A_BRANCH.search(kind):
            continue
        elif any(is_attention(part) for part in child.modules()):  # a wrapper round the branches
            for inner, module in _branches(child):
                yield f"{name}.{inner}", module
        elif _count_matrices(child) >= 2 or FEED_FORWARD.search(kind):
            yield name, child


def signature(module: nn.Module) -> inspect.Signature:
    """Return the signature of a module's forward as its class has it, whatever is wrapped round the instance's."""
    whole = inspect.signature(type(module).forward)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def _bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(signature(module).bind(*args, **kwargs).arguments)


def _watch(model: nn.Module, containers: Mapping[str, nn.ModuleList], inputs: Inputs) -> list[_Call]:
    """Call the model once and return the calls of its blocks, in order, with those of the branches inside them."""
    calls: list[_Call] = []
    open_block: list[_Call] = []

    def watch_block(path: str, position: int, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = _Call(path, position, module, _bind(module, args, kwargs), None, [])
            open_block.append(call)
            call.returned = forward(*args, **kwargs)
            open_block.pop()
            calls.append(call)
            return call.returned

        return run

    def watch_branch(name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            returned = forward(*args, **kwargs)
            if open_block:
                open_block[-1].inner.append(_Inner(name, module, _bind(module, args, kwargs), returned))
            return returned

        return run

    with Overrides() as overrides, torch.no_grad():
        for path, container in containers.items():
            for position, block in enumerate(container):
                overrides.set(block, watch_block(path, position, block, block.forward))
                for name, branch in _branches(block):
                    overrides.set(branch, watch_branch(name, branch, branch.forward))
        model(*inputs.args, **inputs.kwargs)
    return calls


def _refiners(model: nn.Module, containers: Mapping[str, nn.ModuleList], inputs: Inputs) -> set[str]:
    """Return the containers whose input does not change with latents and timestep: they refine text."""
    entering: list[dict[str, list[Tensor]]] = []

    def call(given: Inputs) -> None:
        seen: dict[str, list[Tensor]] = {}

        def watch(path: str, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                first = [v for v in _bind(block, args, kwargs).values() if isinstance(v, Tensor) and v.ndim >= 3]
                seen.setdefault(path, first[:1])
                return forward(*args, **kwargs)

            return run

        with Overrides() as overrides, torch.no_grad():
            for path, container in containers.items():
                overrides.set(container[0], watch(path, container[0], container[0].forward))
            model(*given.args, **given.kwargs)
        entering.append(seen)

    call(inputs)
    call(_moved(model, inputs))
    before, after = entering
    return {
        path
        for path, tensors in before.items()
        if all(torch.equal(a, b) for a, b in zip(tensors, after.get(path, []), strict=False))
    }


def _moved(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return the same arguments with other latents and another timestep."""
    latents = latents_of(inputs.args, inputs.kwargs)
    bound = _bind(model, inputs.args, inputs.kwargs)
    time: Any = bound.get("timestep")

    def moved(value: Any) -> Any:
        if value is latents:
            return latents * 0.5 + 0.25
        if value is time and isinstance(value, Tensor):
            return value * 0.5 if value.is_floating_point() else value // 2
        return value

    return Inputs(tuple(map(moved, inputs.args)), {name: moved(value) for name, value in inputs.kwargs.items()})


def _streams(calls: list[_Call]) -> list[str | tuple[str | None, ...]]:
    """Return, for each call, which argument each of its outputs belongs to.

    Output k belongs to argument a if the very same tensor arrives as a in the next block; blocks of one class share
    what any of them showed. A class that never showed it is matched by shape.
    """
    shown: dict[str, dict[int, str]] = {}
    for call, following in pairwise(calls):
        for k, output in enumerate(call.outputs):
            for argument, value in following.arguments.items():
                if isinstance(output, Tensor) and value is output and argument in call.arguments:
                    shown.setdefault(type(call.module).__name__, {})[k] = argument

    returns: list[str | tuple[str | None, ...]] = []
    for call in calls:
        known = shown.get(type(call.module).__name__, {})
        taken: set[str] = set()
        names: list[str | None] = []
        for k, output in enumerate(call.outputs):
            name: str | None = (
                known[k] if k in known else _same_shape(output, call.arguments, taken | set(known.values()))
            )
            fits = name is not None and isinstance(output, Tensor) and _shape(call.arguments.get(name)) == output.shape
            names.append(name if fits else None)
            taken.add(name or "")
        if not any(names):
            raise AnatomyError(
                f"{type(call.module).__name__} returns nothing of the shape of an argument; its streams are not known"
            )
        returns.append(tuple(names) if isinstance(call.returned, (tuple, list)) else names[0] or "")
    return returns


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _same_shape(output: Any, arguments: Mapping[str, Any], taken: set[str]) -> str | None:
    if not isinstance(output, Tensor):
        return None
    names = [name for name, value in arguments.items() if _shape(value) == output.shape and name not in taken]
    return next((name for name in ("hidden_states", "x") if name in names), names[0] if names else None)


def _block(index: int, call: _Call, returns: str | tuple[str | None, ...]) -> Block:
    sites: list[Site] = []
    streams = [call.arguments[name] for name in ([returns] if isinstance(returns, str) else returns) if name]
    widths = {tensor.shape[-1] for tensor in streams}
    seen: set[str] = set()
    for inner in call.inner:
        outputs = inner.returned if isinstance(inner.returned, (tuple, list)) else (inner.returned,)
        tensors = [out for out in outputs if isinstance(out, Tensor)]
        if not tensors or tensors[0].ndim < 3 or tensors[0].shape[-1] not in widths:
            continue
        if inner.name in seen:
            raise AnatomyError(
                f"{call.path}.{call.position} calls its {inner.name} more than once a step, which is not supported"
            )
        seen.add(inner.name)
        sites.append(Site(branch=_kind(inner, tensors), module=inner.name))
    if not sites:
        raise AnatomyError(f"{call.path}.{call.position}: no attention or feed-forward was called in this block")
    return Block(
        index=index,
        path=call.path,
        position=call.position,
        kind=type(call.module).__name__,
        returns=returns,
        sites=_named(sites),
    )


def _kind(inner: _Inner, outputs: list[Tensor]) -> str:
    if not is_attention(inner.module):
        return "mlp"
    if len(outputs) > 1:
        return "joint_attn"
    context = inner.arguments.get("encoder_hidden_states", inner.arguments.get("context"))
    return "cross_attn" if isinstance(context, Tensor) else "attn"


def _named(sites: list[Site]) -> tuple[Site, ...]:
    """Tell sites of one kind in one block apart by what their modules' names add: `mlp` and `mlp.context`."""
    named: list[Site] = []
    for site in sites:
        alike = [other for other in sites if other.branch == site.branch]
        branch = site.branch
        if len(alike) > 1:
            rest = KIND_WORDS.sub("", site.module.rpartition(".")[2]).strip("_")
            taken = {other.branch for other in named}
            branch = f"{branch}.{rest}" if rest else branch
            if branch in taken:
                branch = f"{site.branch}.{site.module.rpartition('.')[2]}"
        named.append(replace(site, branch=branch))
    return tuple(named)


def _norms(block: Block, call: _Call, inputs: Inputs) -> dict[str, tuple[str, ...]]:
    """Return the norms of a block that feed nothing but its branches, and which branches each of them feeds.

    With all branches reused a norm's output is replaced by NaN: if the block's output is the same bit for bit, the
    norm feeds nothing else. A branch that is then computed again, and shows the NaN, is one that it feeds.
    """
    kept = {inner.name: inner.returned for inner in call.inner}
    branch_paths = {site.module for site in block.sites}
    module = call.module
    streams = [call.arguments[name] for name in block.streams]
    candidates = [
        name
        for name, part in module.named_modules()
        if name
        and NORM.search(type(part).__name__)
        and not any(True for _ in part.children())
        and not any(name == path or name.startswith(f"{path}.") for path in branch_paths)
    ]

    def run(reused: set[str], poisoned: str | None) -> tuple[Any, bool]:
        """Return the block's output, and whether the poisoned norm was called once and gave the shape of a stream."""
        fits = [False]

        def poison(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            like = [s for s in streams if isinstance(out, Tensor) and out.shape == s.shape]
            passed = args[0] if args else next(iter(kwargs.values()), None)
            fits[0] = (
                bool(like) and isinstance(passed, Tensor) and passed.shape == out.shape and out.dtype == passed.dtype
            )
            return torch.full_like(out, torch.nan) if isinstance(out, Tensor) else out

        with Overrides() as overrides, torch.no_grad():
            for site in block.sites:
                if site.branch in reused:
                    overrides.set(module.get_submodule(site.module), partial(_give, kept[site.module]))
            if poisoned is not None:
                norm = module.get_submodule(poisoned)
                overrides.set(norm, partial(poison, norm.forward))
            return module(**_as_keywords(call)), fits[0]

    every = {site.branch for site in block.sites}
    norms: dict[str, tuple[str, ...]] = {}
    want, _ = run(every, None)
    for name in candidates:
        got, fits = run(every, name)
        if not fits or not _same(want, got):
            continue
        feeds = tuple(site.branch for site in block.sites if not _same(want, run(every - {site.branch}, name)[0]))
        if feeds:
            norms[name] = feeds

    # What the runtime will do: the norms pass one token on. It must change neither the output nor the input itself.
    before = [stream.clone() for stream in streams]
    with Overrides() as overrides, torch.no_grad():
        for site in block.sites:
            overrides.set(module.get_submodule(site.module), partial(_give, kept[site.module]))
        for name in norms:
            overrides.set(module.get_submodule(name), pass_on)
        got = module(**_as_keywords(call))
    if not _same(want, got) or not _same(before, streams):
        return {}
    return norms


def pass_on(*args: Any, **kwargs: Any) -> Any:
    """Stand in for a norm that feeds only reused branches: what it returns is not looked at.

    One token of its input, shown as often as there are tokens, takes no memory.
    """
    passed = args[0] if args else next(iter(kwargs.values()))
    return passed[:, :1].expand(passed.shape)


def _give(value: Any, *_args: Any, **_kwargs: Any) -> Any:
    return value


def _as_keywords(call: _Call) -> dict[str, Any]:
    keywords: dict[str, Any] = {}
    parameters = signature(call.module).parameters
    for name, value in call.arguments.items():
        if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            keywords.update(value)
        elif parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            if value:
                raise AnatomyError(
                    f"{call.path}.{call.position} is called with unnamed arguments, which is not supported"
                )
        else:
            keywords[name] = value
    return keywords


def _same(a: Any, b: Any) -> bool:
    one, two = (x if isinstance(x, (tuple, list)) else (x,) for x in (a, b))
    return len(one) == len(two) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y
        for x, y in zip(one, two, strict=True)
    )


def _segments(calls: list[_Call], blocks: list[Block]) -> tuple[tuple[int, int], ...]:
    """Return the runs of blocks between which nothing else touches the streams."""
    used_later = _used_later(calls)
    segments: list[tuple[int, int]] = []
    start = 0
    for index in range(1, len(calls)):
        before, here = calls[index - 1], calls[index]
        direct = before.path == here.path and index - 1 not in used_later
        returns = blocks[index - 1].returns
        names = (returns,) if isinstance(returns, str) else returns
        for output, name in zip(before.outputs, names, strict=True):
            direct = direct and name is not None and here.arguments.get(name) is output
        if not direct:
            segments.append((start, index))
            start = index
    segments.append((start, len(calls)))
    return tuple(segments)


def _used_later(calls: list[_Call]) -> set[int]:
    """Return the blocks one of whose outputs enters a block that is not the next one (long skip connections)."""
    made: dict[int, tuple[weakref.ref[Tensor], int]] = {}
    used: set[int] = set()
    for index, call in enumerate(calls):
        for value in call.arguments.values():
            if isinstance(value, Tensor) and id(value) in made:
                reference, maker = made[id(value)]
                if reference() is value and maker < index - 1:
                    used.add(maker)
        for output in call.outputs:
            if isinstance(output, Tensor):
                made[id(output)] = (weakref.ref(output), index)
    return used


def _measure(model: nn.Module, blocks: list[Block], inputs: Inputs) -> tuple[list[Block], int]:
    """Return the blocks with the multiply-accumulates of each and of its sites, and those of the whole call."""
    marked = {block.module: model.get_submodule(block.module) for block in blocks}
    for block in blocks:
        for site in block.sites:
            path = f"{block.module}.{site.module}"
            marked[path] = model.get_submodule(path)
    macs = count_macs(lambda: model(*inputs.args, **inputs.kwargs), marked)
    measured = [
        replace(
            block,
            macs=macs[block.module],
            sites=tuple(replace(site, macs=macs[f"{block.module}.{site.module}"]) for site in block.sites),
        )
        for block in blocks
    ]
    return measured, macs[TOTAL]
