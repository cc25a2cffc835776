"""Recorders: what is measured while the uncached pipeline runs. Scalars; activations are held for a few steps only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dicache.anatomy import Anatomy, StepClock
from dicache.anatomy.inputs import latents_of
from dicache.anatomy.overrides import Overrides
from dicache.profiler.guided import GuidedSteps, PassOutput
from dicache.profiler.profiles import Provenance, Run
from dicache.profiler.rings import Ring, wide
from dicache.profiler.storage import MAGNITUDES, SITE_STATISTICS, TEACACHE_SIGNALS, RunRecord
from dicache.runtime.generation import Call, Generation
from dicache.runtime.naming import PassNames
from dicache.runtime.streams import Streams, Tensors

Forward = Callable[..., Any]
Tensorlist = list[Tensor]


class Recorder:
    """Measures every call of a model in one generation after another, and changes nothing.

    Args:
        pipeline: Whose scheduler tells the steps.
        model: The pipeline's denoiser.
        anatomy: The model's.
        lags: How many steps back each branch's output is compared with.
        priors: Steps at which a site's outputs are handed out whole, by the site's key.
    """

    def __init__(
        self,
        pipeline: Any,
        model: nn.Module,
        anatomy: Anatomy,
        lags: int,
        priors: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.lags = lags
        self._anatomy = anatomy
        self._places = {key: place for place, key in enumerate(anatomy.sites)}
        self._wanted = [frozenset((priors or {}).get(key, ())) for key in anatomy.sites]
        self._generation: Generation | None = None
        self._guided: GuidedSteps | None = None
        self._passes: dict[str, _Pass] = {}
        self._running: _Pass | None = None  # that of the call that runs
        self._context: str | None = None
        self._names = PassNames(model, self._named)
        self._overrides = Overrides()
        self._overrides.set(model, self._model(model.forward))
        for block in anatomy.blocks:
            module = model.get_submodule(block.module)
            self._overrides.set(module, self._block(block.index, Streams(block, module, module.forward)))
            for site in block.sites:
                branch = model.get_submodule(f"{block.module}.{site.module}")
                self._overrides.set(branch, self._site(self._places[block.key(site)], branch.forward))
        first = anatomy.blocks[0]
        entrance = model.get_submodule(f"{first.module}.{first.sites[0].entrance}")
        self._overrides.set(entrance, self._entrance(entrance.forward))
        self._clock = StepClock(pipeline.scheduler, self._begin, self._step)

    def detach(self) -> None:
        """Give the model and the scheduler their own methods back."""
        self._overrides.restore()
        self._clock.detach()
        self._names.detach()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def contexts(self) -> tuple[str, ...]:
        """Names of the guidance passes of the latest generation, in the order in which they came."""
        return tuple(name for name, found in self._passes.items() if found.step >= 0)

    @property
    def parts(self) -> tuple[int, ...]:
        """How many samples each pass has in its batch: 2 where it holds the guided and the unguided half."""
        return tuple(self._passes[name].parts for name in self.contexts)

    @property
    def bytes(self) -> int:
        """Memory that is held on the model's device."""
        return sum(found.bytes for found in self._passes.values())

    @property
    def bytes_a_step(self) -> int:
        """Memory on the CPU for each step of a run, whole outputs for priors not counted."""
        return self._guided.bytes // max(1, self._generation.step) if self._guided and self._generation else 0

    def output_bytes(self, priors: Mapping[str, Sequence[int]]) -> int:
        """Return the bytes of these sites' outputs at these steps, in float32."""
        return sum(
            4 * len(steps) * found.site_size(self._places[key])
            for found in self._passes.values()
            for key, steps in priors.items()
        )

    def record(self, run: Run, provenance: Provenance) -> RunRecord:
        """Return the rows of the latest generation; NaN where a pass or a step was not seen."""
        assert self._generation is not None
        assert self._guided is not None
        steps, empty = self._generation.steps, _Pass(self._anatomy, self.lags)
        passes = [self._passes.get(name, empty) for name in provenance.contexts]
        records = [found.arrays(steps) for found in passes]
        arrays = {name: np.stack([record[name] for record in records]) for name in records[0]}
        parts = zip(provenance.contexts, provenance.parts, strict=True)
        columns = [(name, part) for name, count in parts for part in range(count)]
        outputs: dict[str, dict[int, np.ndarray]] = {}
        for key, place in self._places.items():
            for step in sorted(self._wanted[place]):
                whole = [found.outputs[place, step] for found in passes if (place, step) in found.outputs]
                if len(whole) == len(passes):
                    outputs.setdefault(key, {})[step] = torch.cat(whole).numpy()
        return RunRecord(run, arrays | self._guided.arrays(columns), outputs)

    def failure(self) -> str | None:
        """Return where the latest generation first met a NaN or an infinity, or None: `step 3 in 7.mlp`."""
        found = [place for record in self._passes.values() if (place := record.failure()) is not None]
        if not found:
            return None
        step, index = min(found)
        return f"step {step} in {self._anatomy.sites[index]}"

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def _begin(self, scheduler: Any) -> None:
        self._generation = Generation(len(scheduler.timesteps))
        self._generation.begin_step()
        kinds = [key.partition(".")[2] for key in self._anatomy.sites]
        self._guided = GuidedSteps(kinds, self._generation.steps)
        for found in self._passes.values():
            found.restart()

    def _step(self) -> None:
        if self._generation is None or self._guided is None or self._generation.finished:
            return
        step = self._generation.step
        passes = {name: found.given() for name, found in self._passes.items() if found.step == step}
        if passes:
            self._guided.add(step, passes, self._clock.model_output)
        self._generation.begin_step()

    def _model(self, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            generation = self._generation
            if generation is None or generation.finished:
                return forward(*args, **kwargs)
            name, _ = generation.lane(self._context, Call(args, kwargs))
            if name not in self._passes:
                self._passes[name] = _Pass(self._anatomy, self.lags)
            self._running = record = self._passes[name]
            record.begin(generation.step, len(latents_of(args, kwargs)))
            try:
                out = forward(*args, **kwargs)
                record.end(_tensors(out))
            finally:
                self._running = None
            return out

        return run

    def _block(self, index: int, streams: Streams) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            record = self._running
            if record is None:
                return streams.forward(*args, **kwargs)
            into = streams.read(args, kwargs)
            returned = streams.forward(*args, **kwargs)
            record.block(index, into, streams.unpack(returned))
            return returned

        return run

    def _entrance(self, forward: Forward) -> Forward:
        """Look at what enters the first branch: what TeaCache decides by."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._running is not None:
                self._running.modulated = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            return forward(*args, **kwargs)

        return run

    def _site(self, place: int, forward: Forward) -> Forward:
        wanted = self._wanted[place]

        def run(*args: Any, **kwargs: Any) -> Any:
            record = self._running
            if record is None:
                return forward(*args, **kwargs)
            out = forward(*args, **kwargs)
            tensors = [out] if isinstance(out, Tensor) else _tensors(out)
            record.site(place, tensors)
            if wanted and record.step in wanted:
                record.keep(place, tensors)
            return out

        return run


class _Pass:
    """The measurements of one guidance pass, on the model's device until they are asked for.

    The rings are made after the first step of a generation, which tells the sizes; that step's outputs are held whole.
    """

    def __init__(self, anatomy: Anatomy, lags: int) -> None:
        self.anatomy, self.lags = anatomy, lags
        self.parts = 1
        self.outputs: dict[tuple[int, int], Tensor] = {}  # whole, by site and step
        self.modulated: Tensor | None = None
        self._entered: Tensors = {}
        self._residual: Tensorlist = []
        self._body: Tensorlist = []
        self._first_sites: dict[int, Tensorlist] = {}
        self._first_deltas: dict[int, Tensorlist] = {}
        self._surviving = [anatomy.blocks[anatomy.segment(b.index)[1] - 1].streams for b in anatomy.blocks]
        self._sites: Ring | None = None
        self._before: list[Tensorlist] = []  # the four signals of the step before
        self._delta_of: dict[int, tuple[Ring, int]] = {}
        self._deltas: list[tuple[list[int], Ring]] = []
        self.restart()

    def restart(self) -> None:
        """Forget the generation before, but not the memory that was set up for it."""
        self.step, self._ready, self._compared = -1, False, False
        self._before = []
        self.outputs.clear()
        self._tables: dict[str, dict[int, Tensor]] = {"sites": {}, "change": {}, "size": {}, "magnitude": {}}
        self._grams: dict[int, list[Tensor]] = {}
        self._clear_step()

    @property
    def bytes(self) -> int:
        held = [tensor for signal in self._before for tensor in signal]
        return sum(ring.bytes for ring in self._rings()) + sum(tensor.nbytes for tensor in held)

    def site_size(self, place: int) -> int:
        """Return how many numbers a site gives."""
        return sum(self._sites.sizes[place]) if self._sites is not None else 0

    def begin(self, step: int, parts: int) -> None:
        """Begin a step. A pass that was left out for some steps is not compared across the gap."""
        self._compared = step == self.step + 1 and bool(self._before)
        self.step, self.parts = step, parts
        if self._ready:
            for ring in self._rings():
                ring.advance()
        self._clear_step()

    def site(self, place: int, out: Tensorlist) -> None:
        """Take what a site gave."""
        if self._ready and self._sites is not None:
            self._sites.write(place, out)
        else:
            self._first_sites[place] = out

    def keep(self, place: int, out: Tensorlist) -> None:
        """Keep what a site gave, whole, on the CPU: (parts, tokens of all tensors, channels)."""
        rows = [tensor.reshape(self.parts, -1, tensor.shape[-1]).float() for tensor in out]
        self.outputs[place, self.step] = torch.cat(rows, dim=1).cpu()

    def block(self, index: int, into: Tensors, out: Tensors) -> None:
        """Take what entered and what left a block."""
        start, stop = self.anatomy.segment(index)
        if index == start:
            self._entered = into
        names = self._surviving[index]
        after, before = [out[name] for name in names], [into[name] for name in names]
        if self._ready:
            ring, place = self._delta_of[index]
            ring.write_change(place, after, before)
        else:
            self._first_deltas[index] = [one - two for one, two in zip(after, before, strict=True)]
        if index == stop - 1:
            self._residual += [tensor - self._entered[name] for name, tensor in out.items()]
        if index == len(self.anatomy.blocks) - 1:
            self._body = list(out.values())

    def end(self, out: Tensorlist) -> None:
        """Measure the call that ends."""
        assert self.modulated is not None
        signals = [[self.modulated], self._residual, self._body, out]
        if not self._ready:
            self._set_up()
        assert self._sites is not None
        self._output = out[0]
        self._sketch = self._sites.sketch()
        self._tables["sites"][self.step] = self._sites.sums()
        if self._compared:
            pairs = zip(signals, self._before, strict=True)
            changes = [_mean([(x - y).abs_() for x, y in zip(now, before, strict=True)]) for now, before in pairs]
            self._tables["change"][self.step] = torch.stack(changes)
            self._tables["magnitude"][self.step] = _magnitude(signals[1], self._before[1])
        self._tables["size"][self.step] = torch.stack([_mean([x.abs() for x in signal]) for signal in signals])
        self._before = signals
        self._grams[self.step] = [ring.gram() for _, ring in self._deltas]
        self._entered, self._body, self.modulated = {}, [], None

    def given(self) -> PassOutput:
        """Return what the step's guidance is made of."""
        residual = [tensor.reshape(self.parts, -1) for tensor in self._residual]
        return PassOutput(self._output, residual, self._sketch)

    def failure(self) -> tuple[int, int] | None:
        """Return the first step and site whose output is not finite."""
        for step, sums in self._tables["sites"].items():
            bad = (~torch.isfinite(sums[:, 0])).nonzero()
            if len(bad):
                return step, int(bad[0])
        return None

    def arrays(self, steps: int) -> dict[str, np.ndarray]:
        """Return the measurements, step first; NaN where there is nothing to compare with."""
        sites, blocks, lags = len(self.anatomy.sites), len(self.anatomy.blocks), self.lags
        out = {f"sites/{name}": np.full((steps, sites, lags), np.nan) for name in SITE_STATISTICS}
        out |= {f"teacache/{name}": np.full((steps, 2), np.nan) for name in TEACACHE_SIGNALS}
        out["delta/gram"] = np.full((steps, 2 * blocks, 2 * blocks), np.nan)
        out["magnitude"] = np.full((steps, len(MAGNITUDES)), np.nan)
        if self._sites is None:
            return out | {"delta/cosine": _cosine(out["delta/gram"])}
        sums, changes, sizes, magnitudes = (
            dict(zip(table, torch.stack(list(table.values())).cpu().double().numpy(), strict=True)) if table else {}
            for table in self._tables.values()
        )
        counts = np.array([sum(sizes) for sizes in self._sites.sizes])[:, None]
        for step, since in self._steps_compared():
            seen, found = min(since, lags), sums[step]  # (sites, 2 lags + 2)
            out["sites/abs_l1"][step] = found[:, :1] / counts
            out["sites/norm2"][step] = found[:, 1:2]
            out["sites/dot"][step, :, :seen] = found[:, 2 : 2 + seen]
            out["sites/diff_l1"][step, :, :seen] = found[:, 2 + lags : 2 + lags + seen] / counts
            if since:
                for place, name in enumerate(TEACACHE_SIGNALS):
                    out[f"teacache/{name}"][step] = changes[step][place], sizes[step - 1][place]
                ratio, square, cosine = magnitudes[step]
                out["magnitude"][step] = ratio, np.sqrt(max(square - ratio**2, 0)), 1 - cosine
            for (places, _), gram in zip(self._deltas, self._grams[step], strict=True):
                _place_gram(out["delta/gram"][step], places, gram.cpu().double().numpy(), bool(since), self.anatomy)
        return out | {"delta/cosine": _cosine(out["delta/gram"])}

    def _steps_compared(self) -> Iterator[tuple[int, int]]:
        """Yield each step that was seen, and how many steps without a gap lie before it: none compares across one."""
        before, since = -2, 0
        for step in self._tables["sites"]:
            since = since + 1 if step == before + 1 else 0
            before = step
            yield step, since

    def _clear_step(self) -> None:
        self.modulated = None
        self._entered, self._residual, self._body = {}, [], []

    def _rings(self) -> Iterator[Ring]:
        if self._sites is not None:
            yield self._sites
        yield from (ring for _, ring in self._deltas)

    def _set_up(self) -> None:
        """Make the rings, or take those of the run before, and write the first step into them."""
        sites = [self._first_sites[place] for place in range(len(self.anatomy.sites))]
        deltas = [self._first_deltas[index] for index in range(len(self.anatomy.blocks))]
        if self._sites is None or not self._sites.fits(sites, self.parts):
            self._sites = Ring(sites, self.parts, self.lags + 1)
            by_size: dict[tuple[int, ...], list[int]] = {}
            for index, tensors in enumerate(deltas):
                by_size.setdefault(tuple(tensor.numel() for tensor in tensors), []).append(index)
            self._deltas = [(same, Ring([deltas[i] for i in same], 1, 2)) for same in by_size.values()]
            self._delta_of = {i: (ring, k) for same, ring in self._deltas for k, i in enumerate(same)}
        for ring in self._rings():
            ring.restart()
        for place, tensors in enumerate(sites):
            self._sites.write(place, tensors)
        for index, tensors in enumerate(deltas):
            ring, place = self._delta_of[index]
            ring.write(place, tensors)
        self._first_sites, self._first_deltas = {}, {}
        self._ready = True


def _mean(tensors: Tensorlist) -> Tensor:
    """Return the mean over all elements of all tensors."""
    if len(tensors) == 1:
        return tensors[0].mean(dtype=torch.float32)
    return torch.stack([x.sum(dtype=torch.float32) for x in tensors]).sum() / sum(x.numel() for x in tensors)


def _magnitude(now: Tensorlist, before: Tensorlist) -> Tensor:
    """Return the mean and the mean square, over tokens, of the ratio of the norms of two steps, and the mean of their
    cosine, (3,)."""
    x, y = (
        torch.cat([t.flatten(0, -2).float() for t in tensors])
        if len(tensors) > 1
        else tensors[0].flatten(0, -2).float()
        for tensors in (now, before)
    )
    one, two, cross = (x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1)
    ratio2 = (one / two).to(wide(x.device))
    return torch.stack([ratio2.sqrt(), ratio2, cross / (one * two).sqrt()]).mean(dim=1)


def _place_gram(table: np.ndarray, places: list[int], gram: np.ndarray, compared: bool, anatomy: Anatomy) -> None:
    """Write the products of blocks of equal size where they belong, for blocks of one segment.

    Args:
        table: (2 blocks, 2 blocks), written to: this step's deltas first, then those of the step before.
        places: The blocks.
        gram: Products of their deltas and of the changes of their deltas, (2 places, 2 places).
        compared: Whether there was a step before.
        anatomy: The model's.
    """
    half, blocks = len(places), len(anatomy.blocks)
    now, change = slice(0, half), slice(half, 2 * half)
    cross = gram[now, now] - gram[now, change]  # <now, before>
    before = gram[now, now] - gram[now, change] - gram[change, now] + gram[change, change]
    segments = np.array([anatomy.segment(place)[0] for place in places])
    same = segments[:, None] == segments[None, :]
    rows = np.array(places)
    quarters = [(0, 0, gram[now, now])]
    if compared:
        quarters += [(0, blocks, cross), (blocks, 0, cross.T), (blocks, blocks, before)]
    for down, right, values in quarters:
        table[np.ix_(rows + down, rows + right)] = np.where(same, values, np.nan)


def _cosine(gram: np.ndarray) -> np.ndarray:
    """Return the cosine of each block's delta with that of the step before, (steps, blocks), from the products."""
    blocks = gram.shape[-1] // 2
    square = np.diagonal(gram, axis1=-2, axis2=-1)
    cross = np.diagonal(gram[:, :blocks, blocks:], axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(cross / np.sqrt(square[:, :blocks] * square[:, blocks:]))


def _tensors(value: Any) -> Tensorlist:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):  # diffusers' outputs are dictionaries
        return [tensor for part in value.values() for tensor in _tensors(part)]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (tuple, list)) else []
