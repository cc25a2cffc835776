"""What a profile's file holds: the names and shapes of its datasets."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dicache.anatomy.parts import branch_of
from dicache.profiler.profiles import RATES, RESIDUALS, Provenance, Run

SITE_STATISTICS = ("diff_l1", "abs_l1", "dot", "norm2")
TEACACHE_SIGNALS = ("input", "residual", "body", "output")
MAGNITUDES = ("ratio", "ratio_deviation", "cosine_distance")


@dataclass(frozen=True)
class RunRecord:
    """The rows of one run.

    Attributes:
        run: Which.
        arrays: Every dataset without its runs axis.
    """

    run: Run
    arrays: Mapping[str, np.ndarray]


def shapes(provenance: Provenance) -> dict[str, tuple[int, ...]]:
    """Return the shape of each dataset of a profile, without its runs axis."""
    anatomy, steps = provenance.anatomy, len(provenance.target.timesteps or ())
    contexts, blocks, sites = len(provenance.contexts), len(anatomy.blocks), len(anatomy.sites)
    branches = len({branch_of(key) for key in anatomy.sites})
    decisions = (contexts, steps, len(provenance.decision_blocks), len(RESIDUALS))
    motion = {"diff_l1": (*decisions, RATES), "abs_l1": decisions, "between_frames": decisions}
    return {
        **{f"sites/{name}": (contexts, steps, sites, provenance.lags) for name in SITE_STATISTICS},
        "delta/gram": (contexts, steps, 2 * blocks, 2 * blocks),
        "delta/cosine": (contexts, steps, blocks),
        **{f"teacache/{name}": (contexts, steps, 2) for name in (*TEACACHE_SIGNALS, *provenance.time_signals)},
        "magnitude": (contexts, steps, len(MAGNITUDES)),
        **_first_block_shapes(provenance, contexts, steps),
        "body/weights": (steps, sum(provenance.parts)),
        "body/gram": (steps, steps),
        "body/output": (steps, steps),
        "body/branches": (branches, steps, steps),
        **({f"motion/{name}": shape for name, shape in motion.items()} if provenance.decision_blocks else {}),
    }


def _first_block_shapes(provenance: Provenance, contexts: int, steps: int) -> dict[str, tuple[int, ...]]:
    counts = len(provenance.first_blocks)
    if not counts:
        return {}
    size = (contexts, steps, counts)
    return {"first_block/size": size, "first_block/change": (*size, provenance.first_block_lags)}
