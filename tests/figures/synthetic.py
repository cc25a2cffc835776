"""Profiles and schedules made up of known numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dicache.anatomy import Anatomy, Block, Site
from dicache.profiler import Profile, Provenance, Run
from dicache.schedules import Plan, Rule, Schedule, Target, TeaCachePolicy


def anatomy(blocks: int, branches: Sequence[str] = ("attn", "mlp"), macs: int = 100) -> Anatomy:
    """Blocks whose branches share `macs` equally; the model has nothing else."""
    made = tuple(
        Block(
            index=i,
            path="transformer_blocks",
            position=i,
            kind="BasicTransformerBlock",
            returns="hidden_states",
            sites=tuple(Site(branch=branch, module=branch, macs=macs // len(branches)) for branch in branches),
            macs=macs,
        )
        for i in range(blocks)
    )
    return Anatomy(model="DiTTransformer2DModel", blocks=made, segments=((0, blocks),), macs=macs * blocks)


def profile(
    delta: np.ndarray,
    similarity: np.ndarray | None = None,
    changes: Mapping[str, np.ndarray] | None = None,
    branches: Sequence[str] = ("attn", "mlp"),
) -> Profile:
    """Return the profile that has these numbers.

    Args:
        delta: Cosine of each block's delta with the step before, (r, c, s, b).
        similarity: Cosine of each branch's output with that of each lag before, (r, c, s, b, branches, lags); where
            there is no such step it is ignored. All 1 and one lag if left out.
        changes: Relative L1 change of each of `teacache`'s signals, (r, c, s - 1).
        branches: Of each block.
    """
    runs, contexts, steps, blocks = delta.shape
    if similarity is None:
        similarity = np.ones((*delta.shape, len(branches), 1))
    lags = similarity.shape[-1]
    dot = 4.0 * similarity.reshape(runs, contexts, steps, blocks * len(branches), lags)
    for lag in range(1, lags + 1):
        dot[:, :, :lag, :, lag - 1] = np.nan
    arrays = {"delta/cosine": delta, "sites/dot": dot}
    arrays |= {f"sites/{name}": np.full_like(dot, 4.0) for name in ("diff_l1", "abs_l1", "norm2")}
    for name, change in (changes or {}).items():
        arrays[f"teacache/{name}"] = np.full((runs, contexts, steps, 2), np.nan)
        arrays[f"teacache/{name}"][:, :, 1:] = np.stack([change * 2.0, np.full_like(change, 2.0)], axis=-1)
    provenance = Provenance(
        model="digits",
        anatomy=anatomy(blocks, branches),
        target=Target(scheduler="DDIMScheduler", num_inference_steps=steps),
        settings={},
        versions={},
        lags=lags,
        contexts=("cond", "uncond")[:contexts],
        parts=(1,) * contexts,
    )
    return Profile(provenance, tuple(Run(str(i), i) for i in range(runs)), arrays)


def planned(method: str, blocks: int, *rules: Rule) -> Schedule:
    """Return a schedule of these rules."""
    steps = len(rules[0].steps)
    return Schedule(method, {}, anatomy(blocks), Target(), steps, plan=Plan(steps, rules))


def teacache(
    steps: int,
    coefficients: tuple[float, ...],
    input_range: tuple[float, float],
    measured: Mapping[str, Any] | None = None,
) -> Schedule:
    """Return a schedule of TeaCache with two blocks."""
    policy = TeaCachePolicy(threshold=0.15, coefficients=coefficients, input_range=input_range)
    return Schedule("teacache", {}, anatomy(2), Target(), steps, policy=policy, measured=measured or {})
