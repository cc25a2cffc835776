"""Where a pipeline is put, in which precision, and whether it has the memory for it."""

from typing import Any

import torch

from dicache.anatomy.memory import host_memory
from dicache.models.names import ModelError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARE_OF_MEMORY = 0.8  # that weights may take of a GPU; the rest is for activations


def device_of(name: str | None) -> torch.device:
    """Return the device of a name, or a GPU if there is one, else the CPU.

    Raises:
        ModelError: If there is no such device on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"unknown device {name!r}; needed cpu, cuda, cuda:1, mps or alike") from None
    if device.type == "cpu":
        return device
    backend: Any = getattr(torch, device.type, None)
    count = backend.device_count() if hasattr(backend, "is_available") and backend.is_available() else 0
    if (device.index or 0) >= count:
        built = device.type != "cuda" or torch.version.cuda or torch.version.hip
        found = f"finds {count or 'none'} on this machine" if built else "is built without CUDA"
        raise ModelError(f"no device {name!r}: PyTorch {torch.__version__} {found}; leave --device out, or pass cpu")
    return device


def dtype_of(name: str | None, device: torch.device, usual: str) -> torch.dtype:
    """Return the precision of a name, or the model's usual one; on a CPU, whose half precision is slow, float32.

    Raises:
        ModelError: If it is none that models are run in.
    """
    name = name or ("float32" if device.type == "cpu" else usual)
    if name not in DTYPES:
        raise ModelError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def check_memory(name: str, parameters: int, dtype: torch.dtype) -> None:
    """Refuse weights that do not fit into the memory of the host, before the system ends the process for it.

    Raises:
        ModelError: If they do not, saying in which precision they would.
    """
    free = host_memory()
    needed = parameters * dtype.itemsize
    if needed <= free:
        return
    half = parameters * torch.bfloat16.itemsize
    hint = f"pass --dtype bfloat16 ({_gigabytes(half)})" if half < min(needed, free) else "use a machine with more"
    raise ModelError(
        f"{name}: its weights take {_gigabytes(needed)} in {str(dtype).removeprefix('torch.')}, but "
        f"{_gigabytes(free)} of memory are free; {hint}, or a GPU"
    )


def placed(pipeline: Any, device: torch.device) -> Any:
    """Put a pipeline on a device; a GPU that it does not fit on takes one part at a time, or one layer."""
    if device.type != "cuda":
        return pipeline.to(device)
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    sizes = [sum(p.numel() * p.element_size() for p in module.parameters()) for module in modules]
    free, _ = torch.cuda.mem_get_info(device)
    room = SHARE_OF_MEMORY * free
    if sum(sizes) <= room:
        return pipeline.to(device)
    if max(sizes) <= room:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
    return pipeline


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
