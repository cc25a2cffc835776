"""Measure what a model makes of its timesteps alone, without its blocks."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dicache.anatomy import Anatomy, StepClock
from dicache.anatomy.inputs import capture_inputs, latents_of
from dicache.anatomy.overrides import Overrides, forward_of
from dicache.anatomy.signal import l1_change
from dicache.anatomy.time_embedding import BlocksEntered, find_time_embedding, watch_reading
from dicache.runtime.apply import denoiser


class _LastStepDone(BaseException):  # past the pipeline's own `except Exception`
    pass


def measure_time(pipeline: Any, anatomy: Anatomy, run: Callable[[], Any]) -> dict[str, np.ndarray]:
    """Return the relative L1 change of the time embedding, and of its projection, from each step to the next.

    The pipeline runs, so that the timesteps are those that it gives its model; the blocks run in the first step only,
    and the pipeline is interrupted after the last. What it makes of the images on the way is of no use, and does not
    change its timesteps.

    Args:
        pipeline: A diffusers pipeline.
        anatomy: Of its denoiser.
        run: Calls the pipeline.

    Returns:
        For `time` and `time_projected`, where the model has them, an array of shape (steps - 1,), unitless; NaN where
        the model is not called at a step or the one before. Both are left out of a model that embeds its timestep
        inside the blocks, or with something else.
    """
    model = denoiser(pipeline)
    readings = find_time_embedding(model, capture_inputs(model, run), anatomy)
    if not readings:
        return {}
    latest: dict[str, Tensor] = {}
    steps: list[dict[str, Tensor]] = []  # of a generation
    outputs: dict[torch.Size, Any] = {}  # of the first calls, by the shape of the latents
    forward, block = model.forward, model.get_submodule(anatomy.blocks[0].module)
    into_block, whole = forward_of(block), True

    def enter(*args: Any, **kwargs: Any) -> Any:
        if not whole:
            raise BlocksEntered
        return into_block(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal whole
        shape = latents_of(args, kwargs).shape
        whole = shape not in outputs
        with suppress(BlocksEntered):
            outputs[shape] = forward(*args, **kwargs)
        return outputs[shape]

    def end_step() -> None:
        steps.append(dict(latest))
        latest.clear()
        if len(steps) == len(pipeline.scheduler.timesteps):
            raise _LastStepDone

    clock = StepClock(pipeline.scheduler, lambda scheduler: steps.clear(), end_step)
    try:
        with Overrides() as overrides, suppress(_LastStepDone):
            overrides.set(model, call)
            overrides.set(block, enter)
            for name, reading in readings.items():
                watch_reading(overrides, model, reading, partial(latest.__setitem__, name))
            run()
    finally:
        clock.detach()
    return {name: np.array([_change(*pair, name) for pair in pairwise(steps)]) for name in readings}


def _change(before: Mapping[str, Tensor], now: Mapping[str, Tensor], name: str) -> float:
    if name not in before or name not in now:  # the model was not called at that step
        return math.nan
    change, size = l1_change(now[name], before[name])
    return float(change / size)
