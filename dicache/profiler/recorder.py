"""Recorders: what is measured while the uncached pipeline runs. Scalars; activations are held for a few steps only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor, nn

from dicache.anatomy import Anatomy, StepClock
from dicache.anatomy.inputs import latents_of
from dicache.anatomy.nested import tensors_of
from dicache.anatomy.overrides import Overrides, forward_of
from dicache.anatomy.parts import branch_of
from dicache.anatomy.signal import frames_of
from dicache.anatomy.time_embedding import Reading, watch_reading
from dicache.anatomy.watching import parameters_of
from dicache.profiler.batches import Batch
from dicache.profiler.guided import GuidedSteps
from dicache.profiler.passes import Pass
from dicache.profiler.priors import Priors
from dicache.profiler.profiles import Provenance, Run
from dicache.profiler.storage import PriorShape, RunRecord
from dicache.profiler.together import ALONE, Together
from dicache.runtime.generation import Call, Generation
from dicache.runtime.naming import PassNames
from dicache.runtime.streams import Streams

Forward = Callable[..., Any]


class Recorder:
    """Measures every call of a model in one generation after another, and changes nothing.

    Args:
        pipeline: Whose scheduler tells the steps.
        model: The pipeline's denoiser.
        anatomy: The model's.
        lags: How many steps back each branch's output is compared with.
        priors: Steps at which a site's outputs are added to the means of all runs, by the site's key.
        time: Where the time embedding and its projection are read, by the name of the signal.
        first_blocks: How many of the first blocks, rising, to compare the residual of.
        first_block_lags: How many steps back.
        decision_blocks: Blocks of which what they add to the stream is measured for AdaCache.
        together: The ranks that the model is spread over.

    Attributes:
        runs: How many are in a batch of the next generation, each a sample, or one in each half; set beforehand.
    """

    def __init__(
        self,
        pipeline: Any,
        model: nn.Module,
        anatomy: Anatomy,
        lags: int,
        priors: Mapping[str, Sequence[int]] | None = None,
        time: Mapping[str, Reading] | None = None,
        first_blocks: Sequence[int] = (),
        first_block_lags: int = 0,
        decision_blocks: Sequence[int] = (),
        together: Together = ALONE,
    ) -> None:
        self._ranks = together
        self.lags, self.first_blocks, self.first_block_lags = lags, tuple(first_blocks), first_block_lags
        self.time_signals = tuple(time or ())
        self.decision_blocks = tuple(decision_blocks)
        self._denoiser = model
        self._parameters = parameters_of(model)
        self._anatomy = anatomy
        self._places = {key: place for place, key in enumerate(anatomy.sites)}
        self._wanted = {key: tuple(sorted(steps)) for key, steps in (priors or {}).items() if steps}
        self._priors: Priors | None = None
        self._first_parts: dict[str, int] = {}
        self._generation: Generation | None = None
        self.runs = 1  # in a batch of the next generation
        self._guided: list[GuidedSteps] = []  # by run
        self._passes: dict[str, list[Pass]] = {}  # by name of the guidance pass, and by run
        self._running: Batch | None = None  # of the call that runs
        self._name = ""  # of its guidance pass
        self._context: str | None = None
        self._names = PassNames(model, self._named)
        self._overrides = Overrides()
        self._overrides.set(model, self._model(model.forward))
        for block in anatomy.blocks:
            module = model.get_submodule(block.module)
            self._overrides.set(module, self._block(block.index, Streams(block, module, forward_of(module))))
            for site in block.sites:
                branch = self._overrides.part(model, f"{block.module}.{site.module}")
                self._overrides.set(branch, self._site(block.key(site), forward_of(branch)))
        for index in self.decision_blocks:
            if anatomy.blocks[index].middle:
                module = self._overrides.part(model, f"{anatomy.blocks[index].module}.{anatomy.blocks[index].middle}")
                # It may be a branch as well, which is watched already.
                self._overrides.set(module, self._middle(index, forward_of(module)))
        first = anatomy.blocks[0]
        entrance = self._overrides.part(model, f"{first.module}.{first.sites[0].entrance}")
        self._overrides.set(entrance, self._entrance(forward_of(entrance)))
        for name, reading in (time or {}).items():
            watch_reading(self._overrides, model, reading, partial(self._time, name))
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
        return tuple(name for name, (first, *_) in self._passes.items() if first.step >= 0)

    @property
    def parts(self) -> tuple[int, ...]:
        """How many samples of a run each pass has in its batch: 2 where it holds the guided and the unguided half."""
        return tuple(self._passes[name][0].parts for name in self.contexts)

    @property
    def bytes(self) -> int:
        """Memory that is held on the model's device."""
        return sum(found.bytes for passes in self._passes.values() for found in passes)

    @property
    def bytes_a_step(self) -> int:
        """Memory on the CPU for each step of a generation."""
        steps = max(1, self._generation.step) if self._generation else 1
        return sum(guided.bytes for guided in self._guided) // steps

    @property
    def priors(self) -> dict[str, PriorShape]:
        """The steps at which a site's outputs are wanted, and their shape: (parts of all passes, tokens, channels)."""
        shapes = next((first.site_shapes for first, *_ in self._passes.values() if first.site_shapes), [])
        return {key: (steps, (sum(self.parts), *shapes[self._places[key]])) for key, steps in self._wanted.items()}

    def outputs(self, place: int = 0) -> Tensor:
        """Return what the scheduler was given for a run in each step in which the model was called, (steps, ...)."""
        return self._guided[place].outputs

    def add_to(self, priors: Priors | None, provenance: Provenance) -> None:
        """Add the outputs of the next generation to these means, or to none."""
        self._priors = priors
        firsts = [0, *accumulate(provenance.parts)]
        self._first_parts = dict(zip(provenance.contexts, firsts, strict=False))

    def record(self, run: Run, provenance: Provenance, place: int = 0) -> RunRecord:
        """Return the rows of a run of the latest generation; NaN where a pass or a step was not seen.

        Args:
            run: Which.
            provenance: Of the profile.
            place: Of the run in the batch.
        """
        assert self._generation is not None
        steps, empty = self._generation.steps, [self._new_pass()] * self.runs
        passes = [self._passes.get(name, empty)[place] for name in provenance.contexts]
        records = [found.arrays(steps) for found in passes]
        arrays = {name: np.stack([record[name] for record in records]) for name in records[0]}
        parts = zip(provenance.contexts, provenance.parts, strict=True)
        columns = [(name, part) for name, count in parts for part in range(count)]
        return RunRecord(run, arrays | self._guided[place].arrays(columns))

    def failure(self, place: int = 0) -> str | None:
        """Return where a run of the latest generation first met a NaN or an infinity, or None: `step 3 in 7.mlp`."""
        passes = [passes[place] for passes in self._passes.values() if place < len(passes)]
        found = [first for each in passes if (first := each.failure()) is not None]
        if not found:
            return None
        step, index = min(found)
        return f"step {step} in {self._anatomy.sites[index]}"

    def _new_pass(self, frames: int = 0) -> Pass:
        first_blocks = (self.first_blocks, self.first_block_lags)
        return Pass(
            self._anatomy, self.lags, self.time_signals, *first_blocks, self.decision_blocks, frames, self._ranks
        )

    def _time(self, name: str, embedding: Tensor) -> None:
        if self._running is not None:
            self._running.time(name, embedding)

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
        kinds = [branch_of(key) for key in self._anatomy.sites]
        self._guided = [GuidedSteps(kinds, self._generation.steps, self._ranks) for _ in range(self.runs)]
        for passes in self._passes.values():
            for each in passes:
                each.restart()

    def _step(self) -> None:
        if self._generation is None or self._generation.finished:
            return
        step = self._generation.step
        for run, guided in enumerate(self._guided):
            passes = {name: found[run].given() for name, found in self._passes.items() if found[0].step == step}
            if passes:
                guided.add(step, passes, self._clock.model_output[run])
        if self._priors is not None:
            self._priors.flush()
        self._generation.begin_step()

    def _model(self, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            generation = self._generation
            if generation is None or generation.finished:
                return forward(*args, **kwargs)
            name, _ = generation.lane(self._context, Call(args, kwargs, self._parameters))
            latents = latents_of(args, kwargs)
            passes = self._passes.setdefault(name, [])
            while len(passes) < self.runs:
                passes.append(self._new_pass(frames_of(self._denoiser, latents.shape)))
            self._running, self._name = Batch(passes[: self.runs], len(latents), latents.device), name
            self._overrides.rewind()
            self._running.begin(generation.step)
            try:
                out = forward(*args, **kwargs)
                self._running.end(list(tensors_of(out)))
            finally:
                self._running = None
            return out

        return run

    def _block(self, index: int, streams: Streams) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            running = self._running
            if running is None:
                return streams.forward(*args, **kwargs)
            into = streams.read(args, kwargs)
            returned = streams.forward(*args, **kwargs)
            running.block(index, into, streams.unpack(returned))
            return returned

        return run

    def _entrance(self, forward: Forward) -> Forward:
        """Look at what enters the first branch: what TeaCache decides by."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._running is not None:
                self._running.entered(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)))
            return forward(*args, **kwargs)

        return run

    def _middle(self, index: int, forward: Forward) -> Forward:
        """Look at the stream inside a block."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._running is not None:
                self._running.middle(index, next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)))
            return forward(*args, **kwargs)

        return run

    def _site(self, key: str, forward: Forward) -> Forward:
        place, wanted = self._places[key], frozenset(self._wanted.get(key, ()))

        def run(*args: Any, **kwargs: Any) -> Any:
            running = self._running
            if running is None:
                return forward(*args, **kwargs)
            out = forward(*args, **kwargs)
            tensors = list(tensors_of(out))
            running.site(place, tensors)
            first, step = self._first_parts.get(self._name), running.passes[0].step
            if self._priors is not None and first is not None and step in wanted:
                for each, own in zip(running.passes, running.split_all(tensors), strict=True):
                    self._priors.add(key, step, first, each.together(own))
            return out

        return run
