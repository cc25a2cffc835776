"""Tensors inside tuples, lists, dictionaries and the outputs of models."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def each(values: Sequence[Any], act: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """Return what a function makes of the tensors at each place of equally nested values; other things pass."""
    first = values[0]
    if isinstance(first, Tensor):
        return act(values)
    if is_dataclass(first) and not isinstance(first, type):  # what models of diffusers return
        names = [field.name for field in fields(first) if field.init]
        return replace(first, **{name: each([getattr(value, name) for value in values], act) for name in names})
    if isinstance(first, Mapping):
        return {key: each([value[key] for value in values], act) for key in first}
    if isinstance(first, (tuple, list)):
        made = [each(parts, act) for parts in zip(*values, strict=True)]
        return type(first)(*made) if hasattr(first, "_fields") else type(first)(made)
    return first


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Go through the tensors in a nested value, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_of(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name, None) if field.init else None)
