"""How a model is spread over several processes: its tokens by diffusers' context parallelism, or its weights in shards.

Tensor parallelism and FSDP2 keep each weight as a `DTensor`, of which a process holds a part.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dicache.anatomy.overrides import modules_of


class RanksError(RuntimeError):
    """The ranks of a process group cannot go on together."""


@contextmanager
def waiting(group: Any) -> Iterator[None]:
    """Say in one line that the other ranks of a process group did not come within its time.

    Raises:
        RanksError: If so.
    """
    try:
        yield
    except RuntimeError as error:
        rank, count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        raise RanksError(
            f"rank {rank} of {count} waited in vain for the others ({str(error).splitlines()[0]}): one of them has "
            "failed, or does not do the same. "
            "All ranks that a model is spread over must call dicache alike, and the model for the same steps of the "
            "same generations"
        ) from error


def groups_of(model: nn.Module, parts: Iterable[nn.Module] | None = None) -> tuple[Any, ...]:
    """Return the process groups of `torch.distributed` that a model is spread over; none if it is whole.

    Args:
        model: The model.
        parts: Its modules, where they are known.
    """
    meshes = dict.fromkeys(_meshes(modules_of(model) if parts is None else parts))
    found = [group for mesh in meshes for group in _groups(mesh)]
    tokens = group_of_tokens(model)
    return tuple(found) if tokens is None else (tokens, *found)


def group_of_tokens(model: nn.Module) -> Any | None:
    """Return the process group that diffusers has spread a model's tokens over, None if it has not."""
    spread = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(spread, "_flattened_mesh", None)
    return None if mesh is None else mesh.get_group()


def kind_of(module: nn.Module) -> str:
    """Return the name of a module's class; FSDP2 puts one of its own in its place."""
    bases = type(module).__bases__
    return (bases[-1] if bases[0].__name__ == "FSDPModule" else type(module)).__name__


def device_of(group: Any) -> str:
    """Return the kind of device whose tensors a process group exchanges."""
    return "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process may hold a part of a tensor only."""
    return hasattr(tensor, "device_mesh")


class Sharded:
    """Looks up values of sharded tensors, of all of them in one exchange between the processes.

    Args:
        model: That they are weights of.
    """

    def __init__(self, model: nn.Module) -> None:
        self._packed = _packed(model)
        self._found: list[Tensor] = []  # (2, values): each where it is held, else 0, and whether it is held
        self._mesh: Any = None

    def look_up(self, name: str, tensor: Any, places: Sequence[int]) -> None:
        """Add the values of a weight at some places, counted as if it were whole and flat."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if not tensor.ndim:
            tensor = tensor.reshape(1)
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local()
        index = np.stack(np.unravel_index(np.array(places), tuple(tensor.shape)))
        if name in self._packed:
            dimension, sizes, ranks = self._packed[name]
            index[dimension] = _dealt(index[dimension], np.array(sizes), ranks)
        index -= np.array(offset)[:, None]
        held = torch.from_numpy(((index >= 0) & (index < np.array(shape)[:, None])).all(axis=0))
        values = torch.zeros(len(places), dtype=torch.float64)
        values[held] = local[tuple(torch.from_numpy(index)[:, held])].cpu().double()
        self._found.append(torch.stack([values, held.double()]))
        self._mesh = tensor.device_mesh

    def values(self) -> list[Tensor]:
        """Return the values of each tensor in turn, in float64 on the CPU; the same on all processes."""
        if not self._found:
            return []
        both = torch.cat(self._found, dim=1).to(self._mesh.device_type)
        for group in _groups(self._mesh):
            with waiting(group):
                torch.distributed.all_reduce(both, group=group)
        values, holders = both.cpu()
        return list((values / holders).split([found.shape[1] for found in self._found]))


def _meshes(parts: Iterable[Any]) -> Iterator[Any]:
    """Yield the meshes that weights are in shards on; FSDP2 may have whole ones in their place for a time."""
    for part in parts:
        for weight in part._parameters.values():
            if weight is not None and is_sharded(weight):
                yield weight.device_mesh
        if hasattr(part, "_get_fsdp_state"):
            state = part._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            yield from (weight.sharded_param.device_mesh for group in groups if group for weight in group.fsdp_params)


def _packed(model: nn.Module) -> dict[str, tuple[int, list[int], int]]:
    """Return which weights diffusers has dealt out in pieces: the dimension, the pieces' sizes, and to how many."""
    spread = getattr(getattr(model, "_parallel_config", None), "tensor_parallel_config", None)
    if spread is None:
        return {}
    from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs

    ranks = spread._tp_degree
    specs = resolve_tp_shard_specs(model, model._tp_plan, ranks).items()
    return {name: (spec.dim, spec.block_sizes, ranks) for name, spec in specs if len(spec.block_sizes or ()) > 1}


def _dealt(places: np.ndarray, sizes: np.ndarray, ranks: int) -> np.ndarray:
    """Return where places of a dimension lie, once each of its pieces was dealt out to the ranks in equal parts."""
    ends = np.cumsum(sizes)
    piece = np.searchsorted(ends, places, side="right")
    rank, within = np.divmod(places - (ends - sizes)[piece], sizes[piece] // ranks)
    moved: np.ndarray = rank * (ends[-1] // ranks) + (ends - sizes)[piece] // ranks + within
    return moved


def _groups(mesh: Any) -> tuple[Any, ...]:
    return tuple(mesh.get_group(dimension) for dimension in range(mesh.ndim))
