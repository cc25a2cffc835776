"""cache-dit's named masks: runs of computed and of cached steps, fitted to a number of steps.

References:
    vipshop/cache-dit 1.5.3, `caching/cache_interface.py`, `steps_mask`.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from dicache.formats.format import FormatError

PRESETS = ("slow", "medium", "fast", "ultra")
USUAL = 28  # steps that the tables are for
Runs = tuple[Sequence[int], Sequence[int]]  # of computed and, after each, of cached steps

TABLES: Mapping[int, Mapping[str, Runs]] = {  # by the number of steps from which on they hold
    4: dict.fromkeys(PRESETS, ((2, 1), (1,))),
    6: dict.fromkeys(PRESETS, ((3, 1), (2,))),
    8: {
        "slow": ((5, 1, 1), (1,)),
        "medium": ((4, 1, 1), (1, 1)),
        "fast": ((3, 1, 1), (1, 2)),
        "ultra": ((2, 1, 1), (2, 2)),
    },
    9: {
        "slow": ((5, 2, 1), (1,)),
        "medium": ((5, 1, 1), (1, 1)),
        "fast": ((4, 1, 1), (1, 2)),
        "ultra": ((3, 1, 1), (2, 2)),
    },
    10: {
        "slow": ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
        "medium": ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
        "fast": ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
        "ultra": ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
    },
    16: {
        "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
        "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
        "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
        "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
    },
}


def preset(name: str, steps: int) -> list[int]:
    """Return the mask of a preset, 1 where a step is computed.

    Raises:
        FormatError: If cache-dit has none for this number of steps.
    """
    if steps < 8 and steps not in (4, 6):
        raise FormatError(f"cache-dit has no preset {name} for {steps} steps, but for 4, 6, and 8 or more")
    computed, cached = (list(runs) for runs in TABLES[max(least for least in TABLES if least <= steps)][name])
    if steps > USUAL:
        _stretch(computed, cached, steps)
    _cut(computed, cached, steps)
    mask: list[int] = []
    for run, rest in zip_longest(computed, cached, fillvalue=0):
        mask += [1] * run + [0] * rest
    mask[-1] = 1  # the last step is never cached
    return mask


def _stretch(computed: list[int], cached: list[int], steps: int) -> None:
    """Lengthen the runs in turn, in proportion to what they were, until they are as many steps or more."""
    usual = list(computed), list(cached)
    pairs = min(len(computed), len(cached))
    while True:
        for place in range(pairs):
            for runs, were in zip((computed, cached), usual, strict=True):
                runs[place] += max(int(were[place] * steps / USUAL * 0.5), 1)
                if sum(computed) + sum(cached) >= steps:
                    return
        computed[-1] += 1
        if sum(computed) + sum(cached) >= steps:
            return


def _cut(computed: list[int], cached: list[int], steps: int) -> None:
    """Shorten the last runs in turn, cached first, until they are as many steps."""
    while sum(computed) + sum(cached) > steps:
        for runs in (cached, computed):
            if runs and sum(computed) + sum(cached) > steps:
                runs[-1] -= 1
                if not runs[-1]:
                    runs.pop()
