"""The time embedding: what a model makes of its timestep, and of nothing else, before its first block."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dicache.anatomy.inputs import Inputs, is_time
from dicache.anatomy.overrides import Overrides, forward_of
from dicache.anatomy.parts import Anatomy
from dicache.anatomy.watching import by_name, signature

TIME, PROJECTED = "time", "time_projected"
EMBEDS_TIME = re.compile("time(step)?s?embed", re.IGNORECASE)  # class names; `Timesteps` alone only makes waves

Take = Callable[[Tensor], None]


@dataclass(frozen=True)
class Reading:
    """Where a tensor is read.

    Attributes:
        module: Path inside the model.
        argument: Of its forward; None reads what it returns.
    """

    module: str
    argument: str | None = None


def find_time_embedding(model: nn.Module, inputs: Inputs, anatomy: Anatomy) -> dict[str, Reading]:
    """Return where the time embedding and its projection are read, by `time` and `time_projected`.

    The part of the model before its first block is called three times: as given, with other latents and texts, and at
    another timestep. The time embedding is the output of the first module of that name which only the timestep changes,
    or, where something constant is added to it on the way to the first block, what enters that. The projection is the
    output of the first linear layer, not inside such a module, that makes several times as many channels, and which
    only the timestep changes: the shifts, scales and gates that all blocks share, where a model has them.

    Args:
        model: In evaluation mode.
        inputs: Arguments of one call.
        anatomy: The model's.

    Returns:
        One or both, or none where the model has no such thing or embeds its timestep inside the blocks.
    """
    seen, others, later = (
        _head(model, given, anatomy)
        for given in (inputs, _moved(model, inputs, time=False), _moved(model, inputs, time=True))
    )
    shared = seen.keys() & others.keys() & later.keys()
    alone = [
        reading
        for reading, value in seen.items()
        if reading in shared and torch.equal(value, others[reading]) and not torch.equal(value, later[reading])
    ]
    returned = [reading for reading in alone if reading.argument is None]
    time = next((r for r in returned if _embeds_time(model.get_submodule(r.module))), None)
    if time is None:
        return {}
    like = seen[time]
    entering = [r for r in alone if r.argument is not None and seen[r].shape == like.shape]
    found = {TIME: next((r for r in entering if not torch.equal(seen[r], like)), time)}
    for reading in returned:
        linear = isinstance(model.get_submodule(reading.module), nn.Linear)
        inside = reading.module.startswith(f"{time.module}.")
        channels = seen[reading].shape[-1]
        if linear and not inside and channels > like.shape[-1] and channels % like.shape[-1] == 0:
            return found | {PROJECTED: reading}
    return found


def watch_reading(overrides: Overrides, model: nn.Module, reading: Reading, take: Take) -> None:
    """Hand a tensor to `take` whenever the model makes it."""
    module = model.get_submodule(reading.module)
    forward = forward_of(module)

    def run(*args: Any, **kwargs: Any) -> Any:
        if reading.argument is not None:
            take(by_name(module, args, kwargs)[reading.argument])
        returned = forward(*args, **kwargs)
        if reading.argument is None:
            take(returned)
        return returned

    overrides.set(module, run)


class BlocksEntered(BaseException):  # past a model's own `except Exception`
    """What runs before the blocks has run."""


def _head(model: nn.Module, inputs: Inputs, anatomy: Anatomy) -> dict[Reading, Tensor]:
    """Call what runs before the first block; return what its modules returned, in order, and what enters the block."""
    path = anatomy.blocks[0].module
    first = model.get_submodule(path)
    seen: dict[Reading, Tensor] = {}

    def enter(*args: Any, **kwargs: Any) -> None:
        given = by_name(first, args, kwargs)
        seen.update({Reading(path, name): value for name, value in given.items() if isinstance(value, Tensor)})
        raise BlocksEntered

    def see(reading: Reading) -> Take:
        def take(returned: Any) -> None:
            if isinstance(returned, Tensor):
                seen.setdefault(reading, returned)

        return take

    with Overrides() as overrides, torch.no_grad(), suppress(BlocksEntered):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or _embeds_time(module):
                watch_reading(overrides, model, Reading(name), see(Reading(name)))
        overrides.set(first, enter)
        model(*inputs.args, **inputs.kwargs)
    return seen


def _embeds_time(module: nn.Module) -> bool:
    return EMBEDS_TIME.search(type(module).__name__) is not None


def _moved(model: nn.Module, inputs: Inputs, *, time: bool) -> Inputs:
    """Return the arguments with another timestep, or else with another value of all that has several axes."""

    def moved(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: moved(key, part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [moved(name, part) for part in value]
        if not isinstance(value, Tensor) or is_time(name) != time:
            return value
        if time:
            return value * 0.5 if value.is_floating_point() else value // 2
        # A number for each sample, such as the scale of guidance, is the same in every run, whatever the prompt.
        return value * 0.5 + 0.25 if value.is_floating_point() and value.ndim > 1 else value

    names = list(signature(model).parameters)
    args = tuple(moved(name, value) for name, value in zip(names, inputs.args, strict=False))
    return Inputs(args, {name: moved(name, value) for name, value in inputs.kwargs.items()})
