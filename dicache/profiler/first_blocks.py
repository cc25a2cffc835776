"""How far the first blocks' residual has come since each of the latest steps, which FirstBlockCache decides by."""

from collections import deque

import torch
from torch import Tensor
from torch import float32 as accumulate_in

MOST_LAGS = 16  # after which a simulation computes; a third of 50 steps in a row, beyond what anybody should skip
CHUNK = 4_000_000  # numbers that are compared at once


class History:
    """The latest residuals of a row of blocks, none of them copied.

    Args:
        depth: How many steps are kept.
    """

    def __init__(self, depth: int) -> None:
        self._before: deque[Tensor] = deque(maxlen=depth)  # the step before first

    @property
    def bytes(self) -> int:
        """Memory that it takes when as many steps are kept as may be, that of a comparison included."""
        if not self._before:
            return 0
        tensor = self._before[0]
        together = min(self.depth, _together(tensor))
        return tensor.nbytes * (self.depth + together)

    @property
    def depth(self) -> int:
        """How many steps are kept."""
        return self._before.maxlen or 0

    def clear(self) -> None:
        """Forget the steps before."""
        self._before.clear()

    def compare(self, residual: Tensor) -> Tensor:
        """Keep a residual, and return its mean size and its mean changes.

        Args:
            residual: Of this step; not written to afterwards.

        Returns:
            (1 + kept steps,) in float32: mean |h_i|, then mean |h_i - h_(i-k)| with k = 1 first, over all elements.
        """
        found = [residual.abs().mean(dtype=accumulate_in)[None]]
        before, together = list(self._before), _together(residual)
        for start in range(0, len(before), together):
            changes = torch.stack(before[start : start + together]).sub_(residual).abs_()
            found.append(changes.flatten(1).mean(1, dtype=accumulate_in))
        self._before.appendleft(residual)
        return torch.cat(found)


def _together(tensor: Tensor) -> int:
    """Return how many tensors of a size are compared at once: many operations on small ones take longer."""
    return max(1, CHUNK // tensor.numel())
