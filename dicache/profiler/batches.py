"""Several runs in one batch of a model: each has a `Pass` of its own, which is given the samples of this run."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dicache.profiler.passes import Pass, Tensorlist
from dicache.profiler.profiles import ProfileError
from dicache.runtime.streams import Tensors


class Batch:
    """The passes that one call of a model is of.

    The batch has its samples in halves, such as the guided and the unguided one, and in each half a sample a run.

    Args:
        passes: One a run.
        samples: In the batch.
        device: Where all is measured; blocks of the model may lie on others.

    Raises:
        ProfileError: If they are no multiple of the runs.
    """

    def __init__(self, passes: Sequence[Pass], samples: int, device: torch.device) -> None:
        if samples % len(passes):
            raise ProfileError(
                f"the model was called with a batch of {samples} for {len(passes)} runs, and which sample is of which "
                "run is not known; take --batch 1"
            )
        self.passes, self._samples, self._device = passes, samples, device

    def begin(self, step: int) -> None:
        """Begin a step."""
        for each in self.passes:
            each.begin(step, self._samples // len(self.passes))

    def time(self, name: str, signal: Tensor) -> None:
        """Take what the model makes of its timestep, which may be one for all."""
        for each, own in zip(self.passes, self.split(signal), strict=True):
            each.time[name] = own

    def entered(self, modulated: Tensor) -> None:
        """Take what enters the first branch."""
        for each, own in zip(self.passes, self.split(modulated), strict=True):
            each.modulated = own

    def middle(self, index: int, stream: Tensor) -> None:
        """Take the stream as a block's attention left it."""
        for each, own in zip(self.passes, self.split(stream), strict=True):
            each.middle(index, own)

    def site(self, place: int, out: Tensorlist) -> None:
        """Take what a site gave."""
        for each, own in zip(self.passes, self.split_all(out), strict=True):
            each.site(place, own)

    def block(self, index: int, into: Tensors, out: Tensors) -> None:
        """Take what entered and what left a block."""
        taken, given = self.split_all(list(into.values())), self.split_all(list(out.values()))
        for each, one, two in zip(self.passes, taken, given, strict=True):
            each.block(index, dict(zip(into, one, strict=True)), dict(zip(out, two, strict=True)))

    def end(self, out: Tensorlist) -> None:
        """Measure the call that ends."""
        for each, own in zip(self.passes, self.split_all(out), strict=True):
            each.end(own)

    def split_all(self, tensors: Tensorlist) -> list[Tensorlist]:
        """Return the samples of each run, of each tensor."""
        if len(self.passes) == 1:
            return [[self._measured(tensor) for tensor in tensors]]
        return [list(own) for own in zip(*map(self.split, tensors), strict=True)]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return the samples of each run: views, but where a sample is several rows in each of two halves.

        Raises:
            ProfileError: If a tensor has no row for each sample.
        """
        tensor, runs = self._measured(tensor), len(self.passes)
        if runs == 1:
            return [tensor]
        rows = tensor.shape[0] if tensor.ndim else 1
        if rows == 1:  # the same for all samples
            return [tensor] * runs
        if rows % self._samples:
            raise ProfileError(
                f"a tensor of shape {tuple(tensor.shape)} has no row for each of {self._samples} samples, so that what "
                "is of which run is not known; take --batch 1"
            )
        by_run = tensor.unflatten(0, (self._samples // runs, runs, rows // self._samples))
        return [own.flatten(0, 1) for own in by_run.unbind(1)]

    def _measured(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.device == self._device else tensor.to(self._device)
