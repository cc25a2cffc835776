"""Mean outputs of all runs, on disk, to which the outputs of the run that goes on are added as they come."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Prior:
    """The mean outputs of one site.

    Attributes:
        steps: Of which there are means, rising.
        counts: How many runs each mean is of, (parts, steps); counted up.
        means: (parts, steps, tokens, channels) in float32; written to, and the numbers of a file as a rule.
    """

    steps: tuple[int, ...]
    counts: np.ndarray
    means: Tensor


@dataclass
class Priors:
    """Takes the outputs of one run into the means; none of them is held.

    Attributes:
        sites: By key.
    """

    sites: Mapping[str, Prior]
    _arriving: list[tuple[Tensor, int, Tensor]] = field(default_factory=list)
    _devices: set[torch.device] = field(default_factory=set)  # that they come from

    def add(self, key: str, step: int, first: int, output: Tensor) -> None:
        """Take what a site gave.

        Args:
            key: The site's.
            step: Of the run.
            first: Place of its first part among the parts of all passes.
            output: (parts, tokens, channels); not written to afterwards.
        """
        prior = self.sites[key]
        place, parts = prior.steps.index(step), slice(first, first + len(output))
        prior.counts[parts, place] += 1
        arriving = prior.means[parts, place], int(prior.counts[first, place])
        if output.device.type == "cpu":
            _take(*arriving, output)
        else:
            self._devices.add(output.device)
            self._arriving.append((*arriving, output.float().to("cpu", non_blocking=True)))

    def flush(self) -> None:
        """Wait for the outputs that are on their way from the devices, and take them."""
        for device in self._devices if self._arriving else ():
            getattr(torch, device.type).synchronize(device)
        for means, count, output in self._arriving:
            _take(means, count, output)
        self._arriving.clear()


def _take(means: Tensor, count: int, output: Tensor) -> None:
    """Take an output into the means of so many runs, this one included."""
    if count == 1:
        means.copy_(output)
    else:
        means.lerp_(output.float(), 1 / count)
