"""The same few runs of a pipeline again and again, with schedules that begin alike: what is known is not computed."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dicache.anatomy import StepClock
from dicache.anatomy.nested import each
from dicache.models.sampling import Sampling, sample
from dicache.runtime import apply
from dicache.runtime.apply import denoiser
from dicache.schedules import Schedule

BATCH = 8
Outputs = dict[int, list[Any]]  # the model's, by step: one for each call


@dataclass(frozen=True)
class Made:
    """What some runs gave.

    Attributes:
        images: In [0, 1], shape (n, h, w, 3), or (n, frames, h, w, 3).
        spent: What was computed for it, as a number of uncached images.
        outputs: The model's outputs of each batch of runs, if they were recorded.
    """

    images: np.ndarray
    spent: float
    outputs: Sequence[Outputs] = field(default=(), repr=False)


@dataclass(frozen=True)
class Beginning:
    """Steps of a rerun that need not be computed, because another run did the same until then.

    Attributes:
        made: The other run, of the same conditions and seeds, recorded.
        steps: At which its outputs of the model are taken.
    """

    made: Made
    steps: Collection[int]


class Reruns:
    """Some conditions and seeds of a pipeline that are run with one schedule after another.

    Args:
        pipeline: A diffusers pipeline.
        conditions: Prompts or classes, one an image.
        seeds: One for each condition.
        sampling: How the pipeline is called.

    Attributes:
        uncached: What the pipeline makes of them without a schedule.
        spent: What was computed so far, as a number of uncached images.
    """

    def __init__(self, pipeline: Any, conditions: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> None:
        self._pipeline = pipeline
        self._model = denoiser(pipeline)
        self._conditions, self._seeds = conditions, seeds
        self._sampling = sampling.resolved(pipeline)
        self.spent = 0.0
        self.uncached = self._run(None, None, recorded=True)
        self._calls = sum(map(len, self.uncached.outputs[0].values()))  # of the model in a generation

    def __len__(self) -> int:
        return len(self._conditions)

    def __call__(self, schedule: Schedule, beginning: Beginning | None = None, *, recorded: bool = False) -> Made:
        """Run with a schedule.

        Args:
            schedule: Adaptive ones see one image at a time, as a user's single image would.
            beginning: What is known of it. Steps whose outputs stand in for later ones must not be among it: there
                nothing is kept.
            recorded: Whether the model's outputs are held, so that other runs can begin as this one does.

        Raises:
            ScheduleError: If the schedule does not fit the pipeline as it is called.
        """
        if beginning is not None and not beginning.made.outputs:
            raise ValueError("a run can begin as another did only if that was recorded; make it with recorded=True")
        return self._run(schedule, beginning, recorded)

    def _run(self, schedule: Schedule | None, beginning: Beginning | None, recorded: bool) -> Made:
        size = 1 if schedule is not None and schedule.adaptive else BATCH
        images, outputs, spent = [], [], 0.0
        for number, start in enumerate(range(0, len(self), size)):
            batch = slice(start, min(start + size, len(self)))
            share = 1.0
            with self._recorded(recorded) as made:
                if schedule is None:
                    images.append(self._sample(batch))
                else:
                    with apply(self._pipeline, schedule) as cache:
                        if beginning is not None:
                            cache.known = _in_turn(beginning.made.outputs[number], beginning.steps)
                        images.append(self._sample(batch))
                        share = cache.stats.macs / self._calls
            if recorded:
                outputs.append(made)
            spent += share * (batch.stop - batch.start)
        self.spent += spent
        return Made(np.concatenate(images), spent, outputs)

    def _sample(self, batch: slice) -> np.ndarray:
        images: np.ndarray = sample(self._pipeline, self._conditions[batch], self._seeds[batch], self._sampling)
        return images

    @contextmanager
    def _recorded(self, recorded: bool) -> Iterator[Outputs]:
        """Give what the model returns while the context is open, if it is to be recorded."""
        outputs: Outputs = {}
        step = 0
        if not recorded:
            yield outputs
            return

        def began(_: Any) -> None:
            nonlocal step
            step = 0
            outputs.clear()

        def ended() -> None:
            nonlocal step
            step += 1

        def returned(_module: Any, _args: Any, output: Any) -> None:
            outputs.setdefault(step, []).append(_copy(output))

        clock = StepClock(self._pipeline.scheduler, began, ended)
        hook = self._model.register_forward_hook(returned)
        try:
            yield outputs
        finally:
            hook.remove()
            clock.detach()


def _in_turn(outputs: Outputs, steps: Collection[int]) -> Callable[[int], Any]:
    """Return what gives the outputs of some steps, call by call."""
    waiting = {step: iter(outputs[step]) for step in steps}
    return lambda step: _copy(next(waiting[step])) if step in waiting else None


def _copy(output: Any) -> Any:
    """Return an output that pipelines may write into."""
    return each([output], lambda tensors: tensors[0].clone())
