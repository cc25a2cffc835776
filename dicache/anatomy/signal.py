"""Distances between consecutive steps, as the profiler measures and the runtime decides by them."""

from torch import Tensor
from torch import float32 as accumulate_in


def l1_change(now: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean |now - before| and mean |before|, scalars in float32, over all elements, the batch included.

    Their quotient is TeaCache's relative L1 distance; both are kept so that its readers can average as they need.
    """
    return (now - before).abs().mean(dtype=accumulate_in), before.abs().mean(dtype=accumulate_in)
