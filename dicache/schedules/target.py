"""What a schedule was made for."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


class ScheduleError(ValueError):
    """A schedule file is broken, or does not fit what it is used for."""


@dataclass(frozen=True)
class Target:
    """What a schedule was made for. A field that is None is not bound.

    Attributes:
        weights: Fingerprint of the model's weights.
        dtype: Of the weights: `float32`.
        latents: Shape of the model's latents without the batch.
        scheduler: Class name.
        num_inference_steps: As the user asks for them.
        timesteps: Of each step, in the scheduler's own unit; there are more than inference steps with some solvers.
        noise_levels: Logarithm of the noise-to-signal ratio at each step; the axis for other step counts.
        guidance: Scale that the pipeline is called with.
    """

    weights: str | None = None
    dtype: str | None = None
    latents: tuple[int, ...] | None = None
    scheduler: str | None = None
    num_inference_steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    noise_levels: tuple[float, ...] | None = None
    guidance: float | None = None

    def unbound(self) -> tuple[str, ...]:
        """Names of the fields that say nothing."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is None)

    def differences(self, **found: Any) -> list[str]:
        """Return one sentence for each given field that is bound and differs.

        A field that is given as None is not known, and not compared. Numbers may differ by rounding: timesteps and
        noise levels by one part in a thousand.
        """
        said = []
        for name, value in found.items():
            want = getattr(self, name)
            if want is None or value is None or want == value:
                continue
            if name in ("timesteps", "noise_levels"):
                if len(want) != len(value):
                    said.append(f"{len(want)} steps, found {len(value)}")
                elif not np.allclose(want, value, rtol=1e-3, atol=1e-3):
                    step = int(np.argmax(~np.isclose(want, value, rtol=1e-3, atol=1e-3)))
                    said.append(f"{name[:-1].replace('_', ' ')} {want[step]:g} at step {step}, found {value[step]:g}")
            elif name == "guidance":
                said.append(f"guidance {want:g}, found {value:g}")
            else:
                said.append(f"{name.replace('_', ' ')} {want}, found {value}")
        return said

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}

    @classmethod
    def from_json(cls, content: Any) -> "Target":
        known = {f.name for f in fields(cls)}
        if not isinstance(content, Mapping):
            raise ScheduleError(f"made_for must be an object, found {content!r}")
        if unknown := sorted(set(content) - known):
            raise ScheduleError(f"made_for: unknown key {unknown[0]!r}; the keys are {', '.join(sorted(known))}")
        for name, value in content.items():
            if not _can_be(name, value):
                raise ScheduleError(f"made_for: {name} cannot be {value!r}")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        return cls(**values)


def _can_be(name: str, value: Any) -> bool:
    """Whether a field of a target may have a value; `type` and not `isinstance`, as true and false are no numbers."""
    if name in ("weights", "dtype", "scheduler"):
        return isinstance(value, str)
    if name == "num_inference_steps":
        return type(value) is int and value >= 1
    if name == "guidance":
        return type(value) in (int, float)
    if name == "latents":
        return isinstance(value, list) and all(type(n) is int and n >= 1 for n in value)
    return isinstance(value, list) and all(type(n) in (int, float) for n in value)
