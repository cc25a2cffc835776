"""The ranks that make each run together, because the model is spread over them: what they measured is put together."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed, nn

from dicache.anatomy.spread import device_of, group_of_tokens, groups_of, waiting
from dicache.profiler.profiles import ProfileError

T = TypeVar("T")


class Together:
    """The ranks that a model is spread over, or this process alone.

    Where diffusers has spread the tokens, each rank measures its own, and sums are taken over all. Where the weights
    are in shards, every rank has all activations, and measures the same.

    Args:
        model: The model.

    Raises:
        ProfileError: If the ranks may have different numbers of tokens, whose means have no equal weights.

    Attributes:
        tokens: How many ranks share the tokens.
        leads: Whether this is the rank that writes.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._groups = () if model is None else groups_of(model)
        self._group = None if model is None else group_of_tokens(model)
        self.tokens = 1 if self._group is None else distributed.get_world_size(self._group)
        self.leads = all(distributed.get_rank(group) == 0 for group in self._groups)
        spread = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
        if getattr(spread, "ulysses_anything", False) or getattr(spread, "ring_anything", False):
            raise ProfileError(
                "the tokens are spread over the ranks in unequal parts (ulysses_anything or ring_anything), which "
                "cannot be measured; profile the model whole, or with equal parts: the schedule may be replayed so"
            )

    def ask(self, find: Callable[[], T]) -> T:
        """Return what the rank that writes has found; where it fails, all do.

        Raises:
            ProfileError: Of `find`; on the other ranks whatever it has raised.
        """
        if not self._groups:
            return find()
        told: list[Any] = [None, None]
        failed: Exception | None = None
        if self.leads:
            try:
                told[0] = find()
            except Exception as error:
                failed, told[1] = error, str(error) or type(error).__name__
        for group in self._groups:
            with waiting(group):
                distributed.broadcast_object_list(told, distributed.get_global_rank(group, 0), group=group)
        if failed is not None:
            raise failed
        if told[1] is not None:
            raise ProfileError(told[1])
        found: T = told[0]
        return found

    def sums(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the sums over the ranks that share the tokens, of float64 arrays of the same shapes on all."""
        if self._group is None or not arrays:
            return list(arrays)
        whole = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
        there = whole.to(device_of(self._group))
        with waiting(self._group):
            distributed.all_reduce(there, group=self._group)
        parts = np.split(there.cpu().numpy(), np.cumsum([array.size for array in arrays])[:-1])
        return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def means(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the means over the ranks that share the tokens, as `sums`."""
        return [array / self.tokens for array in self.sums(arrays)]


ALONE = Together()
