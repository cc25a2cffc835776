"""Recorders: what is measured while the uncached pipeline runs. Scalars only; no activation outlives its use."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dicache.anatomy import Anatomy, StepClock
from dicache.anatomy.inputs import latents_of
from dicache.anatomy.overrides import Overrides
from dicache.anatomy.signal import l1_change
from dicache.profiler.storage import DATASETS, SITE_STATISTICS, TEACACHE_SIGNALS
from dicache.runtime.generation import Call, Generation
from dicache.runtime.naming import PassNames
from dicache.runtime.streams import Streams, Tensors, delta

Forward = Callable[..., Any]
Tensorlist = list[Tensor]


class Recorder:
    """Measures every call of a model in one generation after another, and changes nothing.

    Args:
        pipeline: Whose scheduler tells the steps.
        model: The pipeline's denoiser.
        anatomy: The model's.
        lags: How many steps back each branch's output is compared with.
    """

    def __init__(self, pipeline: Any, model: nn.Module, anatomy: Anatomy, lags: int) -> None:
        self._anatomy = anatomy
        self._lags = lags
        self._places = {key: place for place, key in enumerate(anatomy.sites)}
        self._generation: Generation | None = None
        self._records: dict[str, _Record] = {}
        self._record: _Record | None = None  # of the call that is running
        self._pass: str | None = None
        self._names = PassNames(model, self._named)
        self._overrides = Overrides()
        self._overrides.set(model, self._model(model.forward))
        for block in anatomy.blocks:
            module = model.get_submodule(block.module)
            self._overrides.set(module, self._block(block.index, Streams(block, module, module.forward)))
            for site in block.sites:
                branch = model.get_submodule(f"{block.module}.{site.module}")
                self._overrides.set(branch, self._site(self._places[block.key(site)], branch.forward))
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
        return tuple(self._records)

    def arrays(self, contexts: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return the datasets of the latest generation, contexts first; NaN where a pass or a step was not seen."""
        assert self._generation is not None
        empty = _Record(self._anatomy, self._generation.steps, self._lags, torch.device("cpu"))
        records = [self._records.get(name, empty) for name in contexts]
        return {name: np.stack([record.array(name) for record in records]) for name in DATASETS}

    def failure(self) -> str | None:
        """Return where the latest generation first met a NaN or an infinity, or None: `step 3 in 7.mlp`."""
        found = []
        for record in self._records.values():
            size = record.values["sites/abs_l1"][:, :, 0].cpu()  # (steps, sites)
            bad = (~torch.isfinite(size)).nonzero()
            if len(bad):
                step, place = bad[0].tolist()
                found.append((step, place))
        if not found:
            return None
        step, place = min(found)
        return f"step {step} in {self._anatomy.sites[place]}"

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        before, self._pass = self._pass, name
        try:
            yield
        finally:
            self._pass = before

    def _begin(self, scheduler: Any) -> None:
        self._generation = Generation(len(scheduler.timesteps))
        self._generation.begin_step()
        self._records = {}

    def _step(self) -> None:
        if self._generation is not None:
            self._generation.begin_step()

    def _model(self, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            generation = self._generation
            if generation is None or generation.finished:
                return forward(*args, **kwargs)
            latents = latents_of(args, kwargs)
            name, _ = generation.lane(self._pass, Call(args, kwargs))
            if name not in self._records:
                self._records[name] = _Record(self._anatomy, generation.steps, self._lags, latents.device)
            self._record = record = self._records[name]
            record.begin(generation.step)
            try:
                out = forward(*args, **kwargs)
                record.end(out)
            finally:
                self._record = None
            return out

        return run

    def _block(self, index: int, streams: Streams) -> Forward:
        start, stop = self._anatomy.segment(index)
        is_last = index == len(self._anatomy.blocks) - 1

        def run(*args: Any, **kwargs: Any) -> Any:
            record = self._record
            if record is None:
                return streams.forward(*args, **kwargs)
            into = streams.read(args, kwargs)
            if index == start:
                record.segment_input = into
            returned = streams.forward(*args, **kwargs)
            out = streams.unpack(returned)
            record.block(index, delta(out, into))
            if index == stop - 1:
                record.residual.extend(delta(out, record.segment_input).values())
            if is_last:
                record.body = list(out.values())
            return returned

        return run

    def _site(self, place: int, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            record = self._record
            if record is None:
                return forward(*args, **kwargs)
            if place == 0:
                record.modulated = [next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))]
            out = forward(*args, **kwargs)
            record.site(place, _tensors(out))
            return out

        return run


class _Record:
    """The measurements of one guidance pass of one generation, on the model's device until they are asked for."""

    def __init__(self, anatomy: Anatomy, steps: int, lags: int, device: torch.device) -> None:
        sites, blocks = len(anatomy.sites), len(anatomy.blocks)
        shapes: dict[str, tuple[int, ...]] = {f"sites/{name}": (steps, sites, lags) for name in SITE_STATISTICS}
        shapes |= {"delta/cosine": (steps, blocks)}
        shapes |= {f"teacache/{name}": (steps, 2) for name in TEACACHE_SIGNALS}
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.values = {name: torch.full(shape, torch.nan, dtype=wide, device=device) for name, shape in shapes.items()}
        self.wide = wide
        self.step = -1
        self.lags = lags
        self.outputs: dict[int, list[Tensorlist]] = {}  # of each site, latest first
        self.deltas: dict[int, tuple[Tensorlist, Tensor]] = {}
        self.segment_input: Tensors = {}
        self.residual: Tensorlist = []
        self.body: Tensorlist = []
        self.modulated: Tensorlist = []
        self.before: dict[str, Tensorlist] = {}

    def array(self, name: str) -> np.ndarray:
        return self.values[name].cpu().double().numpy()

    def begin(self, step: int) -> None:
        """Begin a step. A pass that was left out for some steps is not compared across the gap."""
        if step != self.step + 1:
            self.outputs.clear()
            self.deltas.clear()
            self.before.clear()
        self.step = step

    def site(self, place: int, out: Tensorlist) -> None:
        """Compare a site's output with those of the steps before."""
        count = sum(x.numel() for x in out)
        write = {name: self.values[f"sites/{name}"][self.step, place] for name in SITE_STATISTICS}
        write["abs_l1"][:] = self._sum([x.abs() for x in out]) / count
        write["norm2"][:] = self._dot(out, out)
        history = self.outputs.setdefault(place, [])
        for lag, before in enumerate(history):
            write["diff_l1"][lag] = self._sum([(x - y).abs() for x, y in zip(out, before, strict=True)]) / count
            write["dot"][lag] = self._dot(out, before)
        history.insert(0, out)
        del history[self.lags :]

    def block(self, index: int, change: Tensors) -> None:
        """Compare a block's delta, all streams together, with that of the step before."""
        now = list(change.values())
        norm2 = self._dot(now, now)
        if index in self.deltas:
            before, before2 = self.deltas[index]
            self.values["delta/cosine"][self.step, index] = self._dot(now, before) / (norm2 * before2).sqrt()
        self.deltas[index] = now, norm2

    def end(self, out: Any) -> None:
        """Compare the four signals of the whole call with those of the call before."""
        signals = {"input": self.modulated, "residual": self.residual, "body": self.body, "output": _tensors(out)}
        for name, now in signals.items():
            before = self.before.get(name)
            if before is not None:
                write = self.values[f"teacache/{name}"][self.step]
                pairs = [l1_change(x, y) for x, y in zip(now, before, strict=True)]
                share = [x.numel() / sum(y.numel() for y in now) for x in now]
                for place in range(2):
                    write[place] = sum(pair[place] * part for pair, part in zip(pairs, share, strict=True))
            self.before[name] = list(now)
        self.residual, self.body, self.modulated = [], [], []

    def _sum(self, parts: Tensorlist) -> Tensor:
        return torch.stack([part.sum(dtype=self.wide) for part in parts]).sum()

    def _dot(self, one: Tensorlist, two: Tensorlist) -> Tensor:
        # A product of two halves would overflow or round before it is summed.
        return self._sum([x.float() * y.float() for x, y in zip(one, two, strict=True)])


def _tensors(value: Any) -> Tensorlist:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):  # diffusers' outputs are dictionaries
        return [tensor for part in value.values() for tensor in _tensors(part)]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (tuple, list)) else []
