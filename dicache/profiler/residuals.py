"""What one block adds to the stream, over the latest steps: what AdaCache decides by."""

import numpy as np
import torch
from torch import Tensor

from dicache.anatomy import AnatomyError
from dicache.anatomy.signal import motion_of
from dicache.profiler.latest import Change, Latest
from dicache.profiler.profiles import RESIDUALS
from dicache.profiler.rings import fetched
from dicache.profiler.together import ALONE, Together


class Residuals:
    """Measures what one block adds to the stream, in one guidance pass.

    Args:
        lags: How many steps back it is compared with.
        frames: Of a video; 0 otherwise.
        together: The ranks that the model is spread over; between frames whose tokens they share nothing is measured.
    """

    def __init__(self, lags: int, frames: int, together: Together = ALONE) -> None:
        self._lags, self._frames, self._ranks = lags, frames if together.tokens == 1 else 0, together
        self._latest = Latest(lags)
        self.restart()

    def restart(self) -> None:
        """Forget the run before, but not the memory that was set up for it."""
        self._latest.clear()
        self._rows: dict[int, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Memory that is held on the model's device."""
        return self._latest.bytes

    def add(self, step: int, entered: Tensor, middle: Tensor | None, left: Tensor, batch: int) -> None:
        """Take the stream as it entered the block, as the attention left it where that can be seen, and as it left."""
        changes = [(left, entered)] if middle is None else [(middle, entered), (left, middle)]
        whole = changes if middle is None else [*changes, (left, entered)]
        sums = self._latest.compare(changes)
        self._rows[step] = torch.cat([self._between_frames(whole, batch)[:, None].to(sums.dtype), sums], dim=1)

    def _between_frames(self, whole: list[Change], batch: int) -> Tensor:
        unknown = torch.full((len(whole),), torch.nan, device=whole[0][0].device)
        if self._frames < 2:
            return unknown
        try:
            pairs = [motion_of(after - before, self._frames, batch) for after, before in whole]
            return torch.stack([apart / size for apart, size in pairs])
        except AnatomyError:  # they cannot be told apart
            return unknown

    def arrays(self, seen: dict[int, int], steps: int) -> dict[str, np.ndarray]:
        """Return the measurements, step first; NaN where there is nothing to compare with.

        Args:
            seen: For each step that was seen, how many steps without a gap lie before it.
            steps: Of the run.
        """
        places = [0, 1, 2] if self._latest.parts == 2 else [RESIDUALS.index("block")]
        out = {
            "abs_l1": np.full((steps, len(RESIDUALS)), np.nan),
            "diff_l1": np.full((steps, len(RESIDUALS), self._lags), np.nan),
            "between_frames": np.full((steps, len(RESIDUALS)), np.nan),
        }
        for step, found in zip(self._rows, self._ranks.means(fetched(list(self._rows.values()))), strict=True):
            back = min(seen[step], self._lags)
            out["between_frames"][step, places] = found[:, 0]
            out["abs_l1"][step, places] = found[:, 1] / self._latest.size
            out["diff_l1"][step, places, :back] = found[:, 2 : 2 + back] / self._latest.size
        return out
