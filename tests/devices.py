"""Two devices that are none: tensors that lie in main memory, say that they lie elsewhere, and meet only their like.

They are what a second accelerator is to PyTorch, but for its speed: a backend of its own, `fake:0` and `fake:1`, whose
operations refuse tensors of several devices. It is there for the whole process from when it is begun, so that tests
begin it in one of their own.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

ATEN = torch.ops.aten
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
_REGISTERED: list[torch.library.Library] = []  # for as long as the process runs


class FakeTensor(Tensor):
    """A tensor on a fake device, and where it really is."""

    held: Tensor
    place: int

    @staticmethod
    def __new__(cls, real: Tensor, place: int) -> "FakeTensor":
        made: FakeTensor = Tensor._make_wrapper_subclass(
            cls, real.shape, real.stride(), real.storage_offset(), dtype=real.dtype, device=torch.device("fake", place)
        )
        made.held, made.place = real.detach(), place
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.held!r} on fake:{self.place}"

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(operation, *args, **(kwargs or {}))


def begin() -> None:
    """Make the devices known to PyTorch."""
    backend_registration._setup_privateuseone_for_python_backend("fake")
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run, "PrivateUse1")
    _REGISTERED.append(library)
    resizing = torch.library.Library("aten", "IMPL")  # what PyTorch makes by resizing an empty tensor
    for operation in (ATEN.arange.default, ATEN.arange.start, ATEN.arange.start_step, ATEN.linspace.default):
        resizing.impl(operation, partial(_run, operation), "PrivateUse1")
    _REGISTERED.append(resizing)


def _run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation in main memory, and say of what it makes that it lies where its arguments do."""
    tensors: list[Tensor] = []

    def held(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(held, value))
        if isinstance(value, Tensor):
            tensors.append(value)
        return value.held if isinstance(value, FakeTensor) else value

    given, named = [held(value) for value in args], {name: held(value) for name, value in kwargs.items()}
    places = {tensor.place for tensor in tensors if isinstance(tensor, FakeTensor)}
    if operation.overloadpacket not in (ATEN._to_copy, ATEN.copy_) and (
        len(places) > 1 or (places and any(not isinstance(tensor, FakeTensor) and tensor.ndim for tensor in tensors))
    ):
        raise RuntimeError(f"{operation} of tensors on {', '.join(str(tensor.device) for tensor in tensors)}")
    place = next(iter(places), None)
    if (asked := kwargs.get("device")) is not None:
        device = torch.device(asked)
        place = (device.index or 0) if device.type == "fake" else None
        named["device"] = "cpu"
    out = operation(*given, **named)
    for value, argument in zip(args, operation._schema.arguments, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value
    return out if place is None else _placed(out, place)


def _placed(made: Any, place: int) -> Any:
    if isinstance(made, (list, tuple)):
        return type(made)(_placed(part, place) for part in made)
    return FakeTensor(made, place) if isinstance(made, Tensor) else made
