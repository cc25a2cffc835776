"""The processes that a model is spread over: what is measured is averaged, so that all decide alike."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from dicache.anatomy.spread import RanksError, device_of, waiting


class Ranks:
    """The ranks of process groups, or this process alone.

    Args:
        groups: Of `torch.distributed`, each a dimension of the ranks; its time-out is how long one rank waits for the
            others. None for a model that is whole in this process.

    Attributes:
        groups: As they were given; may be changed between generations.
        of_model: Whether the model itself exchanges something in them. One that fails has then nobody to tell: the
            others wait in the model, and what they wait for must not be answered by something else.
    """

    def __init__(self, groups: Sequence[Any] = ()) -> None:
        self.groups, self.of_model = tuple(groups), False
        self._device: torch.device | None = None  # where what was measured lies, once something was

    def quotients(self, sums: Tensor) -> list[float]:
        """Return each row's first number divided by its second, each summed over the ranks first.

        It is the one place where the host waits for the device, once a call.

        Args:
            sums: (n, 2), float32; n is the same on all ranks.

        Raises:
            RanksError: If another rank has failed in this step, or does not come within the time.
        """
        if not self.groups:
            alone: list[float] = (sums[:, 0] / sums[:, 1]).tolist()
            return alone
        self._device = sums.device
        both = self._reduce(torch.cat([sums.new_zeros(1), sums.flatten()]))
        sums = both[1:].view_as(sums)
        failed, *found = torch.cat([both[:1], sums[:, 0] / sums[:, 1]]).tolist()
        if math.isnan(failed):
            raise RanksError("another rank has failed in this step; see its own error")
        return found

    def give_up(self, count: int) -> None:
        """Let the other ranks, which wait for `count` numbers of this one, fail as well."""
        if self.groups and not self.of_model:
            device = device_of(self.groups[0]) if self._device is None else self._device
            self._reduce(torch.full((1 + count,), torch.nan, dtype=torch.float32, device=device))

    def _reduce(self, numbers: Tensor) -> Tensor:
        for group in self.groups:
            with waiting(group):
                distributed.all_reduce(numbers, group=group)
        return numbers
