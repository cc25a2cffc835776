"""What one block adds to the stream, over the latest steps: what AdaCache decides by."""

import numpy as np
import torch
from torch import Tensor

from dicache.anatomy import AnatomyError
from dicache.anatomy.signal import motion_of
from dicache.profiler.profiles import RESIDUALS
from dicache.profiler.rings import CHUNK, wide


class Residuals:
    """Measures what one block adds to the stream, in one guidance pass.

    Args:
        lags: How many steps back it is compared with.
        frames: Of a video; 0 otherwise.
    """

    def __init__(self, lags: int, frames: int) -> None:
        self._lags, self._frames = lags, frames
        self._buffer: Tensor | None = None  # (lags + 1, 1 or 2, elements)
        self.restart()

    def restart(self) -> None:
        """Forget the run before, but not the memory that was set up for it."""
        self._slot = self._lags
        self._rows: dict[int, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Memory that is held on the model's device, with what a comparison takes."""
        if self._buffer is None:
            return 0
        lags, parts, size = self._buffer.shape
        return self._buffer.nbytes + 4 * parts * max(size, min(CHUNK, lags * size))

    def add(self, step: int, entered: Tensor, middle: Tensor | None, left: Tensor, batch: int) -> None:
        """Take the stream as it entered the block, as the attention left it where that can be seen, and as it left."""
        parts = [left - entered] if middle is None else [middle - entered, left - middle]
        whole = parts if middle is None else [*parts, left - entered]
        if self._buffer is None or self._buffer.shape[1:] != (len(parts), entered.numel()):
            shape = (self._lags + 1, len(parts), entered.numel())
            self._buffer = torch.zeros(shape, dtype=parts[0].dtype, device=entered.device)
        self._slot = (self._slot + 1) % (self._lags + 1)
        now = self._buffer[self._slot]
        for row, part in zip(now, parts, strict=True):
            row.copy_(part.reshape(-1))
        columns = [self._between_steps(now), self._between_frames(whole, batch)[:, None]]
        self._rows[step] = torch.cat([column.to(wide(now.device)) for column in columns], dim=1)

    def _between_steps(self, now: Tensor) -> Tensor:
        """Return, for each residual, the sums of |x|, |x - x of 1 step before|, ..., (1 or 3, lags + 1)."""
        assert self._buffer is not None
        depth, parts, size = self._buffer.shape
        span = max(1, CHUNK // (parts * size))
        found = []
        for start in range(0, depth, span):
            change = now.float() - self._buffer[start : start + span].float()  # (span, 1 or 2, elements)
            both = [change.sum(1, keepdim=True).abs_().sum(-1)] if parts > 1 else []
            found.append(torch.cat([change.abs_().sum(-1), *both], dim=1))
        sums = [now.float().abs().sum(-1)] + ([now.float().sum(0, keepdim=True).abs_().sum(-1)] if parts > 1 else [])
        order = [(self._slot - lag) % depth for lag in range(1, depth)]
        return torch.cat([torch.cat(sums)[:, None], torch.cat(found)[order].T], dim=1)

    def _between_frames(self, whole: list[Tensor], batch: int) -> Tensor:
        unknown = torch.full((len(whole),), torch.nan, device=whole[0].device)
        if self._frames < 2:
            return unknown
        try:
            pairs = [motion_of(each, self._frames, batch) for each in whole]
            return torch.stack([apart / size for apart, size in pairs])
        except AnatomyError:  # they cannot be told apart
            return unknown

    def arrays(self, seen: dict[int, int], steps: int) -> dict[str, np.ndarray]:
        """Return the measurements, step first; NaN where there is nothing to compare with.

        Args:
            seen: For each step that was seen, how many steps without a gap lie before it.
            steps: Of the run.
        """
        places = [RESIDUALS.index("block")] if self._buffer is None or self._buffer.shape[1] == 1 else [0, 1, 2]
        out = {
            "abs_l1": np.full((steps, len(RESIDUALS)), np.nan),
            "diff_l1": np.full((steps, len(RESIDUALS), self._lags), np.nan),
            "between_frames": np.full((steps, len(RESIDUALS)), np.nan),
        }
        if self._buffer is None:
            return out
        size = self._buffer.shape[2]
        for step, row in self._rows.items():
            found, back = row.cpu().numpy(), min(seen[step], self._lags)
            out["abs_l1"][step, places] = found[:, 0] / size
            out["diff_l1"][step, places, :back] = found[:, 1 : 1 + back] / size
            out["between_frames"][step, places] = found[:, -1]
        return out
