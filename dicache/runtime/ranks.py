"""The processes that a model is spread over: what is measured is averaged, so that all decide alike."""

import math
from typing import Any

import torch
from torch import Tensor, distributed, nn


class RanksError(RuntimeError):
    """The ranks of a process group cannot decide together."""


class Ranks:
    """The ranks of a process group, or this process alone.

    Args:
        group: Of `torch.distributed`; its time-out is how long one rank waits for the others. None for a model that is
            whole in this process.
        device: Of the model.
    """

    def __init__(self, group: Any | None = None, device: torch.device | str = "cpu") -> None:
        self._group = group
        self._device = device

    def quotients(self, sums: Tensor) -> list[float]:
        """Return each row's first number divided by its second, each summed over the ranks first.

        It is the one place where the host waits for the device, once a call.

        Args:
            sums: (n, 2), float32; n is the same on all ranks.

        Raises:
            RanksError: If another rank has failed in this step, or does not come within the time.
        """
        if self._group is None:
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
        if self._group is not None:
            self._reduce(torch.full((1 + count,), torch.nan, dtype=torch.float32, device=self._device))

    def _reduce(self, numbers: Tensor) -> Tensor:
        try:
            distributed.all_reduce(numbers, group=self._group)
        except RuntimeError as error:
            rank, count = distributed.get_rank(self._group), distributed.get_world_size(self._group)
            raise RanksError(
                f"rank {rank} of {count} waited in vain for the others to decide on this step: one of them has failed, "
                "or does not run the same steps. All ranks of the group given to apply() must call the model for the "
                "same generations"
            ) from error
        return numbers


def group_of(model: nn.Module) -> Any | None:
    """Return the process group that diffusers has spread a model's tokens over, None if it has not."""
    spread = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(spread, "_flattened_mesh", None)
    return None if mesh is None else mesh.get_group()
