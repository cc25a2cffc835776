"""Forwards of one row, to be followed by a compiler: they read a tape and write on it, and change nothing else."""

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dicache.anatomy import Anatomy, Block
from dicache.anatomy.nested import each
from dicache.anatomy.parts import MADE
from dicache.anatomy.standins import pass_on, view_of_zero
from dicache.runtime.compiled.tracing import Trace
from dicache.runtime.executor import Forward, Installer, Program
from dicache.runtime.nested_ranges import Nested
from dicache.runtime.predictors import corrected
from dicache.runtime.streams import Streams, Tensors, add, delta, replace
from dicache.schedules import Range
from dicache.schedules.corrections import Form
from dicache.schedules.rows import Key


@dataclass(frozen=True)
class Kind:
    """What a row does, whatever the numbers: rows of one kind are one graph.

    Attributes:
        reuse, skip, keep, keep_delta, features: As of a `Row`.
        orders: For each site or range that is predicted at some step of the plan, how many differences of successive
            outputs are added to its last one. The weights are an input.
        corrected: Sites whose held output is corrected. What with is an input.
    """

    reuse: frozenset[str] = frozenset()
    skip: tuple[Range, ...] = ()
    keep: frozenset[str] = frozenset()
    keep_delta: tuple[Range, ...] = ()
    features: tuple[Range, ...] = ()
    orders: tuple[tuple[Key, int], ...] = ()
    corrected: frozenset[str] = frozenset()


class RowForwards:
    """Makes the forwards of rows.

    Args:
        model: The model.
        anatomy: Its anatomy.
        installer: Knows the modules' own forwards.
        sites: All that some row reuses or keeps.
        ranges: All that some row skips.
        watched: Modules besides, that some row looks at.
        form: Of the schedule's corrections, if it has some.

    Attributes:
        trace: Follows calls with them.
        streams: Of each block.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        installer: Installer,
        *,
        sites: Collection[str],
        ranges: Collection[Range],
        watched: Iterable[nn.Module] = (),
        form: Form | None = None,
    ) -> None:
        self._model = model
        self._anatomy = anatomy
        self._installer = installer
        self._form = form
        self.streams = {
            block.index: Streams(block, module, installer.original(module))
            for block in anatomy.blocks
            for module in (model.get_submodule(block.module),)
        }
        self.trace = Trace(installer, (*self._modules(sites, ranges), *watched))
        self._nested = Nested(model, anatomy, installer, self.streams, lambda: self.trace.tape.entries, self._keep_part)

    def _modules(self, sites: Collection[str], ranges: Collection[Range]) -> Iterator[nn.Module]:
        for block in self._anatomy.blocks:
            if any(start <= block.index < stop for start, stop in ranges):
                yield self.streams[block.index].module
            reused = {site.branch for site in block.sites if block.key(site) in sites}
            for site in block.sites:
                yield from (self.part(block, path) for path in site.modules if site.branch in reused)
            for path, feeds in block.norms.items():
                if reused.issuperset(feeds):
                    yield self._model.get_submodule(f"{block.module}.{path}")
        for part in ranges if self._anatomy.links else ():
            yield from (self._model.get_submodule(path) for path in self._anatomy.inside(*part))

    def part(self, block: Block, path: str) -> nn.Module:
        """Return a module of a block."""
        return self._installer.part(self._model, f"{block.module}.{path}")

    def program(self, kind: Kind) -> Program:
        """Return the forwards of a row."""
        program: Program = {}
        skipped = {index for start, stop in kind.skip for index in range(start, stop)}
        for block in self._anatomy.blocks:
            if block.index not in skipped:
                program |= self._of_block(kind, block)
        for part in kind.skip:
            program |= self._skip(kind, part)
        for part in kind.keep_delta:
            program |= self._keep_range(part, program, feature=part in kind.features)
        return program

    def _of_block(self, kind: Kind, block: Block) -> Program:
        program: Program = {}
        reused = {site.branch for site in block.sites if block.key(site) in kind.reuse}
        for site in block.sites:
            key, module = block.key(site), self.part(block, site.module)
            inner = {path: self.part(block, path) for path in site.inner}
            if site.branch in reused:
                program[module] = self._stand_in(kind, key)
                program |= {piece: self._give((key, path)) for path, piece in inner.items()}
            elif key in kind.keep:
                program[module] = self._keep(key, self._installer.original(module))
                for path, piece in inner.items():
                    program[piece] = self._keep_shape((key, path), self._installer.original(piece))
        for path, feeds in block.norms.items():
            if reused.issuperset(feeds):
                program[self._model.get_submodule(f"{block.module}.{path}")] = pass_on
        return program

    def _skip(self, kind: Kind, part: Range) -> Program:
        feature, stand_in = part in kind.features, self._stand_in(kind, part)
        if self._anatomy.links:
            return self._nested.skip(part, stand_in, feature=feature)
        first, *others = (self.streams[index] for index in range(*part))
        act = replace if feature else add

        def changed(*args: Any, **kwargs: Any) -> Any:
            self.trace.tape.ran.append(part)
            return first.pack(act(first.read(args, kwargs), stand_in()))

        return {first.module: changed} | {streams.module: through(streams) for streams in others}

    def _keep_range(self, part: Range, program: Program, *, feature: bool) -> Program:
        if self._anatomy.links:
            return self._nested.keep(part, program, 0, feature=feature)
        first, last = self.streams[part[0]], self.streams[part[1] - 1]
        made: Program = {last.module: self._exit(part, last, program.get(last.module, last.forward), feature)}
        if not feature:
            entered = made.get(first.module) or program.get(first.module, first.forward)
            made[first.module] = self._enter(part, first, entered)
        return made

    def _enter(self, part: Range, streams: Streams, forward: Forward) -> Forward:
        def enter(*args: Any, **kwargs: Any) -> Any:
            self.trace.tape.inputs[part] = streams.read(args, kwargs)
            return forward(*args, **kwargs)

        return enter

    def _exit(self, part: Range, streams: Streams, forward: Forward, feature: bool) -> Forward:
        def leave(*args: Any, **kwargs: Any) -> Any:
            returned = forward(*args, **kwargs)
            left, inputs = streams.unpack(returned), self.trace.tape.inputs
            if feature:
                self._keep_part(part, left, 0)
            elif part in inputs:  # else the call left out the block at which the range begins
                self._keep_part(part, delta(left, inputs[part]), 0)
            return returned

        return leave

    def _keep_part(self, part: Range, made: Tensors, _older: int) -> None:
        self.trace.tape.entries[part] = made

    def _keep(self, key: Hashable, forward: Forward) -> Forward:
        def keep(*args: Any, **kwargs: Any) -> Any:
            out = self.trace.tape.entries[key] = forward(*args, **kwargs)
            return out

        return keep

    def _keep_shape(self, key: Hashable, forward: Forward) -> Forward:
        def keep_shape(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            self.trace.tape.entries[key] = view_of_zero(out)
            return out

        return keep_shape

    def _stand_in(self, kind: Kind, key: Key) -> Forward:
        orders = dict(kind.orders)
        if key in orders:
            row, keys = list(orders).index(key), (key, *((key, age) for age in range(1, orders[key] + 1)))

            def foretell(*_args: Any, **_kwargs: Any) -> Any:
                tape = self.trace.tape
                assert tape.weights is not None
                return foretold([tape.read(kept) for kept in keys], tape.weights[row])

            return foretell
        if key in kind.corrected:
            assert isinstance(key, str)
            assert self._form is not None
            site, form = key, self._form

            def correct(*_args: Any, **_kwargs: Any) -> Any:
                return corrected(self.trace.tape.read(site), self.trace.tape.factors[site], form)

            return correct
        return self._give(key)

    def _give(self, key: Hashable) -> Forward:
        def give(*_args: Any, **_kwargs: Any) -> Any:
            return self.trace.tape.read(key)

        return give

    # What policies need besides

    def go_on_from(self, first: int, program: Program) -> Program:
        """Return a row's forwards for a call that goes on from a block, with the streams that entered it before."""
        streams = self.streams[first]
        forward = program.get(streams.module, streams.forward)

        def enter(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = streams.put(args, kwargs, self.trace.tape.given)
            return forward(*args, **kwargs)

        before = (self.streams[index] for index in range(first))
        return {**program, **{other.module: through(other) for other in before}, streams.module: enter}

    def up_to(self, first: int, seen: Literal["site", "block"]) -> Program:
        """Return the forwards of a call up to a block, which writes down what a policy decides by there.

        Args:
            first: The block.
            seen: What enters its first `site`, or what the blocks before it have added to the stream that goes on with
                the latents (`block`).
        """
        blocks, here = self._anatomy.blocks, self.streams[first]
        program: Program = {}
        if seen == "site":
            entrance = self.part(blocks[first], blocks[first].sites[0].entrance)
            program[entrance] = self._look(self._installer.original(entrance))
        else:
            program |= self._look_at_first(blocks[0], blocks[first - 1])
        for block in blocks[first + 1 :]:
            if not any(name is not None and name.startswith(MADE) for name in (*block.returns,)):
                program[self.streams[block.index].module] = through(self.streams[block.index])
        forward = here.forward if seen == "site" else through(here)

        def enter(*args: Any, **kwargs: Any) -> Any:
            self.trace.tape.cut = here.read(args, kwargs)
            return forward(*args, **kwargs)

        program[here.module] = enter
        return program

    def _look(self, forward: Forward) -> Forward:
        def look(*args: Any, **kwargs: Any) -> Any:
            self.trace.tape.seen = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            return forward(*args, **kwargs)

        return look

    def _look_at_first(self, head: Block, tail: Block) -> Program:
        start, stop = self.streams[head.index], self.streams[tail.index]

        def leave(*args: Any, **kwargs: Any) -> Any:
            tape = self.trace.tape
            returned = stop.forward(*args, **kwargs) if start is not stop else begin(*args, **kwargs)
            if tape.middle is not None:  # else the call left out the first block
                tape.seen = stop.unpack(returned)[tail.main_stream] - tape.middle
            return returned

        def begin(*args: Any, **kwargs: Any) -> Any:
            self.trace.tape.middle = start.read(args, kwargs)[head.main_stream]
            return start.forward(*args, **kwargs)

        return {start.module: begin, stop.module: leave}

    def watch(self, index: int, branch: str, program: Program) -> Program:
        """Return a row's forwards with a block watched: what it, or one of its branches, adds is written down."""
        block, streams = self._anatomy.blocks[index], self.streams[index]
        name, forward = block.main_stream, program.get(streams.module, streams.forward)
        made: Program = {}

        def run(*args: Any, **kwargs: Any) -> Any:
            tape = self.trace.tape
            returned = forward(*args, **kwargs)
            start = streams.read(args, kwargs)[name] if branch != "rest" else tape.middle
            stop = streams.unpack(returned)[name] if branch != "attn" else tape.middle
            assert start is not None
            assert stop is not None
            tape.added[index] = stop - start
            return returned

        made[streams.module] = run
        if branch != "block":
            middle = self.part(block, block.middle)
            inner = program.get(middle) or self._installer.original(middle)

            def inside(*args: Any, **kwargs: Any) -> Any:
                self.trace.tape.middle = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
                return inner(*args, **kwargs)

            made[middle] = inside
        return {**program, **made}


def through(streams: Streams) -> Forward:
    """Return the forward of a block that does not run."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return streams.pack(streams.read(args, kwargs))

    return run


def foretold(outputs: Sequence[Any], weights: Tensor) -> Any:
    """Return a prediction as `predictors.foretell` makes it, with weights that are not known to the compiler.

    Args:
        outputs: The last one first: tensors, or equally nested tuples, lists and dictionaries of them.
        weights: (width,), as `weights_of` gives them, in single precision or more.
    """

    def predicted(tensors: Sequence[Tensor]) -> Tensor:
        last, *older = tensors
        if not older:
            return (last * weights[:1]).to(last.dtype)
        # One number as a vector, not as a scalar, makes sums of half precision ones of single precision.
        total = last + weights[:1] * (last - older[0])
        for place, (newer, before) in enumerate(pairwise(older), start=1):
            total = total + weights[place : place + 1] * (newer - before)
        return (total + weights[len(older) : len(older) + 1] * last).to(last.dtype)

    return each(outputs, predicted)


def weights_of(
    orders: Sequence[tuple[Key, int]],
    predict: Mapping[Key, Sequence[float]],
    scale: Mapping[Key, float],
    like: Tensor,
) -> Tensor | None:
    """Return the weights of a row's predictions as one tensor; None without predictions.

    Args:
        orders: Of its kind.
        predict: Weights of the differences of successive outputs.
        scale: What the last output is multiplied with, where that is not 1.
        like: A parameter of the model.

    Returns:
        (keys, width): the weights of the differences, and how much of the last output is added; without differences,
        what it is multiplied with.
    """
    if not orders:
        return None
    width = 1 + max(order for _, order in orders)
    rows = []
    for key, order in orders:
        scaled = scale.get(key, 1.0)
        row = [*predict[key], scaled - 1] if order else [scaled]
        rows.append(row + [0.0] * (width - len(row)))
    dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
    return torch.tensor(rows, dtype=torch.float64).to(device=like.device, dtype=dtype)
