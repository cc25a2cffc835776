"""The latest few values of a tensor that changes from step to step, and how far each is from the newest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dicache.profiler.rings import together, wide

Change = tuple[Tensor, Tensor]  # what is kept is the first minus the second


class Latest:
    """Keeps the latest few values of one change, or of two that follow one another, and compares the newest with them.

    Args:
        lags: How many steps back it is compared with.
    """

    def __init__(self, lags: int) -> None:
        self.lags = lags
        self._buffer: Tensor | None = None  # (lags + 1, 1 or 2, elements)
        self.clear()

    def clear(self) -> None:
        """Forget the steps before, but not the memory that was set up for them."""
        self._slot, self._kept = -1, 0  # of the slots before it, that many were written

    @property
    def bytes(self) -> int:
        """Memory that is held on the model's device."""
        return 0 if self._buffer is None else self._buffer.nbytes + self._scratch.nbytes

    @property
    def size(self) -> int:
        """How many numbers a change has."""
        return 0 if self._buffer is None else self._buffer.shape[2]

    @property
    def parts(self) -> int:
        """How many changes are kept."""
        return 0 if self._buffer is None else self._buffer.shape[1]

    def compare(self, changes: Sequence[Change]) -> Tensor:
        """Keep the changes of a step, and return their sizes and how far they are from those of the steps before.

        Returns:
            (rows, 1 + steps before) in float64: sums of |x|, |x - x of 1 step before|, ... A row for each change and,
            of two, one for their sum.
        """
        buffer = self._fitting(changes)
        self._slot = (self._slot + 1) % len(buffer)
        now = buffer[self._slot]
        for row, (after, before) in zip(now, changes, strict=True):
            torch.sub(after.reshape(-1), before.reshape(-1), out=row)
        slots = [(self._slot - lag) % len(buffer) for lag in range(1, self._kept + 1)]
        self._kept = min(self._kept + 1, self.lags)
        [size] = self._sums(now[None], None)
        apart = self._sums(buffer[: max(slots, default=-1) + 1], now)
        return torch.stack([size, *(apart[slot] for slot in slots)], dim=1)  # a list as an index would be waited for

    def _sums(self, steps: Tensor, now: Tensor | None) -> Tensor:
        """Return the sums of |step - now| of some steps, or of |step|, (steps, rows) in float64."""
        count, parts, size = steps.shape
        rows = 2 * parts - 1
        length = min(size, self._scratch.numel() // rows)
        at_once = self._scratch.numel() // (rows * length)
        total = torch.zeros(count, rows, dtype=wide(steps.device), device=steps.device)
        for first in range(0, count, at_once):
            for start in range(0, size, length):
                piece = steps[first : first + at_once, :, start : start + length].float()
                shape = (len(piece), rows, piece.shape[2])
                apart = self._scratch[: shape[0] * shape[1] * shape[2]].view(shape)
                if now is None:
                    apart[:, :parts] = piece
                else:
                    torch.sub(piece, now[:, start : start + length].float(), out=apart[:, :parts])
                if parts > 1:
                    torch.add(apart[:, 0], apart[:, 1], out=apart[:, 2])
                total[first : first + at_once] += apart.abs_().sum(-1)
        return total

    def _fitting(self, changes: Sequence[Change]) -> Tensor:
        """Return the memory for these changes, made anew where they have another shape."""
        after, _ = changes[0]
        shape = (self.lags + 1, len(changes), after.numel())
        if self._buffer is None or self._buffer.shape != shape or self._buffer.dtype != after.dtype:
            self.clear()
            self._buffer = torch.zeros(shape, dtype=after.dtype, device=after.device)
            numbers = min((2 * len(changes) - 1) * self._buffer[:, 0].numel(), together(after.device))
            self._scratch = torch.empty(max(2 * len(changes) - 1, numbers), device=after.device)
        return self._buffer
