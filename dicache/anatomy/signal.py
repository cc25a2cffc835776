"""Distances between steps and between frames, as the profiler measures and the runtime decides by them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch import float32 as accumulate_in

from dicache.anatomy.parts import AnatomyError


def l1_change(now: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean |now - before| and mean |before|, scalars in float32, over all elements, the batch included.

    Their quotient is TeaCache's relative L1 distance; both are kept so that its readers can average as they need.
    """
    return (now - before).abs().mean(dtype=accumulate_in), before.abs().mean(dtype=accumulate_in)


def frames_of(model: nn.Module, latents: Sequence[int]) -> int:
    """Return how many frames the tokens of a video are of; 0 for anything else.

    Args:
        model: Its configuration says which axis has the channels, and how many frames a patch spans.
        latents: Shape of the latents; a video's are (batch, channels, frames, height, width) or (batch, frames,
            channels, height, width).
    """
    if len(latents) != 5:
        return 0
    config: Any = getattr(model, "config", {})
    frames_first = latents[2] == config.get("in_channels") != latents[1]
    patch = config.get("patch_size")
    span = config.get("patch_size_t") or (patch[0] if isinstance(patch, (tuple, list)) and len(patch) == 3 else 1)
    return int(latents[1 if frames_first else 2]) // int(span)


def motion_of(change: Tensor, frames: int, batch: int) -> tuple[Tensor, Tensor]:
    """Return how much what a block adds differs from frame to frame: two scalars in float32.

    They are the sums of |x[f + 1] - x[f]| and of |x[f + 1]| + |x[f]| over all frames f; their quotient is AdaCache's
    motion, from 0 to 1.

    Args:
        change: Tokens, (rows, length, channels): with a row a sample its frames one after another, with a row a frame
            its places, or with a row a place its frames.
        frames: How many there are.
        batch: Samples.

    Raises:
        AnatomyError: If which tokens are of which frame cannot be told.

    References:
        AdaCache, arXiv 2411.02397, equation 4; AdaCache-DiT/AdaCache.
    """
    x = by_frame(change, frames, batch)
    after, before = x[:, 1:], x[:, :-1]
    apart = (after - before).abs().sum(dtype=accumulate_in)
    return apart, after.abs().sum(dtype=accumulate_in) + before.abs().sum(dtype=accumulate_in)


def by_frame(change: Tensor, frames: int, batch: int) -> Tensor:
    """Return tokens with an axis of frames as the second; see `motion_of`."""
    shape = tuple(change.shape)
    if len(shape) == 3 and frames > 1:
        rows, length = shape[:2]
        found: list[Tensor] = []
        if rows == batch and length % frames == 0:
            found.append(change.unflatten(1, (frames, -1)))  # (batch, frames, places, channels)
        if rows == batch * frames:
            found.append(change.unflatten(0, (batch, frames)))  # (batch, frames, places, channels)
        if length == frames and rows % batch == 0 and rows > batch:
            found.append(change)  # (batch * places, frames, channels)
        if len(found) == 1:
            return found[0]
    raise AnatomyError(
        f"which of the tokens {shape} are of which of {frames} frames of {batch} samples cannot be told; leave motion "
        "out (--no-motion), or take another size where the numbers of frames and of places in a frame are not the same"
    )
