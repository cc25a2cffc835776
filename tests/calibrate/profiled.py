"""Profiles made of numbers that a test chooses."""

from collections.abc import Mapping

import numpy as np

from dicache.anatomy import Anatomy
from dicache.profiler import Profile, Provenance, Run
from dicache.schedules import Target


def profile(
    anatomy: Anatomy,
    arrays: Mapping[str, np.ndarray],
    *,
    steps: int,
    lags: int = 1,
    contexts: tuple[str, ...] = ("0",),
    parts: tuple[int, ...] = (2,),
    target: Target | None = None,
) -> Profile:
    """Return a profile of as many runs as the arrays have rows."""
    times = tuple(float(steps - i) for i in range(steps))
    target = target or Target(dtype="float32", num_inference_steps=steps, timesteps=times)
    provenance = Provenance("toy", anatomy, target, {"guidance": 4.0}, {}, lags, contexts, parts)
    runs = len(next(iter(arrays.values())))
    return Profile(provenance, tuple(Run(str(i), i) for i in range(runs)), arrays)
