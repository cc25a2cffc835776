"""Profiles made of numbers that a test chooses."""

from collections.abc import Mapping
from typing import Any

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
    first_blocks: tuple[int, ...] = (),
    first_block_lags: int = 0,
) -> Profile:
    """Return a profile of as many runs as the arrays have rows."""
    times = tuple(float(steps - i) for i in range(steps))
    target = target or Target(dtype="float32", num_inference_steps=steps, timesteps=times)
    first: dict[str, Any] = {"first_blocks": first_blocks, "first_block_lags": first_block_lags}
    provenance = Provenance("toy", anatomy, target, {"guidance": 4.0}, {}, lags, contexts, parts, **first)
    runs = len(next(iter(arrays.values())))
    return Profile(provenance, tuple(Run(str(i), i) for i in range(runs)), arrays)
