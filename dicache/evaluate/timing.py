"""Wall time of variants side by side: one generation of each in turn, again and again."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

Variant = Callable[[], AbstractContextManager[Callable[[], object]]]


def interleaved(variants: Mapping[str, Variant], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each call of each variant.

    Every round runs all variants, each time beginning with another one, so that a busy machine slows all of them.

    Args:
        variants: Name -> a context that makes ready, untimed, and gives the function to time.
        repeats: Rounds, after one that is not counted.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-1, repeats):
        for place in range(len(names)):
            name = names[(repeat + place) % len(names)]
            with variants[name]() as run:
                _synchronise()
                start = time.perf_counter()
                run()
                _synchronise()
                if repeat >= 0:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def speedup(baseline: Sequence[float], variant: Sequence[float]) -> float:
    """Return the median over rounds of baseline time / variant time."""
    return float(np.median(np.asarray(baseline) / np.asarray(variant)))


def _synchronise() -> None:
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.synchronize(device)
