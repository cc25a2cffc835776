"""What is kept, stored in main memory or in fewer bits until it is read."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dicache.anatomy.nested import each, tensors_of
from dicache.anatomy.standins import view_of_zero

DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


class Stored(NamedTuple):
    """An output as it is stored.

    Attributes:
        form: Tensors of its shapes, types and devices that take no memory, nested as it is.
        parts: What is stored of each of its tensors, in order.
        scales: What each is multiplied by when it is read, of the same number of axes, the last one 1; None by nothing.
    """

    form: Any
    parts: Sequence[Tensor]
    scales: Sequence[Tensor | None]


class Store:
    """Puts outputs away, and gives them back as they were but for the rounding of a smaller dtype.

    A dtype of a smaller range than the tensor's own holds it in shares of the largest number of each token, so that
    nothing overflows. From a CUDA device copies run beside the model: out as soon as a tensor is made, and in while
    what was read before it is at work.

    Args:
        dtype: Of the numbers that have more bits; None for their own.
        on_cpu: Whether tensors lie in main memory, and not where they are made.

    Raises:
        ValueError: If the dtype is none that can hold outputs.
    """

    def __init__(self, dtype: torch.dtype | None, *, on_cpu: bool = False) -> None:
        if dtype is not None and dtype not in DTYPES:
            known = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
            raise ValueError(f"store_dtype must be one of {known}, found {dtype}")
        self._dtype = dtype
        self._on_cpu = on_cpu
        self._copying: dict[torch.device, torch.cuda.Stream] = {}  # of a device all copies, one after the other
        self._due: deque[Stored] = deque()  # what the running call is still to read, the next one first
        self._coming: dict[int, tuple[list[Tensor], torch.cuda.Event]] = {}  # by identity of what is stored

    def put(self, value: Any) -> Stored:
        """Store an output: a tensor, or several in tuples, lists and dictionaries."""
        parts, scales = [], []
        for tensor in tensors_of(value):
            part, scale = self._shrunk(tensor)
            parts.append(self._out(part))
            scales.append(scale)
        return Stored(each([value], lambda tensors: view_of_zero(tensors[0])), parts, scales)

    def get(self, entry: Any) -> Any:
        """Return what was put there; an entry that was not put by this passes."""
        if not isinstance(entry, Stored):
            return entry
        if self._due and self._due[0] is entry:
            self._due.popleft()
        parts = iter(self._here(entry))
        scales = iter(entry.scales)
        self._fetch_next()

        def grown(tensors: Sequence[Tensor]) -> Tensor:
            (form,), part, scale = tensors, next(parts), next(scales)
            part = part.to(form.dtype)
            return part if scale is None else part.mul_(scale)

        return each([entry.form], grown)

    def begin(self, entries: Iterable[Any]) -> None:
        """Say what a call will read, in its order."""
        self._due = deque(entry for entry in entries if isinstance(entry, Stored))
        self._fetch_next()

    def leave(self) -> None:
        """Forget the call that ran, also when it failed."""
        self._due.clear()
        self._coming.clear()

    def _shrunk(self, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._dtype is None or not tensor.is_floating_point() or tensor.itemsize <= self._dtype.itemsize:
            return tensor, None
        most, own = torch.finfo(self._dtype).max, torch.finfo(tensor.dtype)
        if own.max <= most or not tensor.ndim:
            return tensor.to(self._dtype), None
        scale = tensor.abs().amax(dim=-1, keepdim=True).div_(most).clamp_(min=own.tiny)
        return (tensor / scale).to(self._dtype), scale

    def _out(self, tensor: Tensor) -> Tensor:
        if not self._on_cpu or tensor.device.type != "cuda":
            return tensor.cpu() if self._on_cpu else tensor
        copying = self._beside(tensor.device)
        copying.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(copying):
            there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            there.copy_(tensor, non_blocking=True)
        tensor.record_stream(copying)  # so that its memory is not given away before it is copied
        return there

    def _here(self, entry: Stored) -> Sequence[Tensor]:
        """Return what is stored, on the device where it is read."""
        at = _device(entry)
        if at is None or at.type != "cuda" or not self._on_cpu:
            return [part.to(at) for part in entry.parts]
        coming = self._coming.pop(id(entry)) if id(entry) in self._coming else self._fetched(entry, at)
        parts, copied = coming
        reading = torch.cuda.current_stream(at)
        reading.wait_event(copied)
        for part in parts:
            part.record_stream(reading)
        return parts

    def _fetch_next(self) -> None:
        """Begin to copy in what is read next, where that goes on beside the model's work."""
        entry = self._due[0] if self._due and self._on_cpu else None
        if entry is not None and id(entry) not in self._coming:
            at = _device(entry)
            if at is not None and at.type == "cuda":
                self._coming[id(entry)] = self._fetched(entry, at)

    def _fetched(self, entry: Stored, at: torch.device) -> tuple[list[Tensor], "torch.cuda.Event"]:
        """Return what is stored as it will be on a CUDA device, and when; after all copies that began before."""
        copying = self._beside(at)
        with torch.cuda.stream(copying):
            parts = [part.to(at, non_blocking=True) for part in entry.parts]
        return parts, copying.record_event()

    def _beside(self, device: torch.device) -> "torch.cuda.Stream":
        """Return the stream that copies to and from a device; a model may lie on several."""
        if device not in self._copying:
            self._copying[device] = torch.cuda.Stream(device)
        return self._copying[device]


def _device(entry: Stored) -> torch.device | None:
    """Return where an output is read; None if there is no tensor in it."""
    return next((form.device for form in tensors_of(entry.form)), None)
