"""Policies: rules that choose the row at run time, from a signal of the generation itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dicache.schedules.plan import PlanError

Negative = Literal["clamp", "abs", "reference"]


@dataclass(frozen=True)
class TeaCachePolicy:
    """Reuse the body's delta until the changes predicted since it was taken add up to the threshold.

    At each step the relative L1 change x of the timestep-modulated input is rescaled by a polynomial p to the change
    it foretells, and added up. Below the threshold the body is skipped; at or above it the body is computed and
    the sum starts again at zero.

    Attributes:
        threshold: Unitless; 0 computes everything, unless what is negative lowers the sum.
        coefficients: Of p, highest power first.
        input_range: Smallest and largest x that p was fitted on; outside it a fitted polynomial is meaningless and
            often negative.
        first_steps: How many steps at the start are always computed.
        last_steps: How many steps at the end are always computed.
        negative: What a negative p(x) adds. `clamp` holds x in the range and adds nothing; `abs` holds x in the range
            and adds the magnitude, as ComfyUI-TeaCache and vLLM-Omni do. `reference` takes p(x) as it is, wherever x
            lies, as the authors' code does: what is negative lowers the sum, so that skipping may not stop before the
            last steps.

    References:
        TeaCache, arXiv 2411.19108, section 3.3.
    """

    threshold: float
    coefficients: tuple[float, ...]
    input_range: tuple[float, float]
    first_steps: int = 1
    last_steps: int = 1
    negative: Negative = "clamp"
    name: str = field(default="teacache", init=False)

    def __post_init__(self) -> None:
        numbers = (self.threshold, *self.coefficients, *self.input_range)
        if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
            raise PlanError(
                f"teacache: threshold, coefficients and input_range must be finite numbers, found {numbers}"
            )
        if self.threshold < 0:
            raise PlanError(f"teacache: the threshold must be 0 or more, found {self.threshold}")
        if not self.coefficients:
            raise PlanError("teacache: the polynomial has no coefficients")
        if len(self.input_range) != 2 or self.input_range[0] > self.input_range[1]:
            raise PlanError(f"teacache: input_range must be a smallest and a largest value, found {self.input_range}")
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in (self.first_steps, self.last_steps)):
            raise PlanError(
                f"teacache: first_steps and last_steps must be whole numbers, "
                f"found {self.first_steps!r} and {self.last_steps!r}"
            )
        if self.first_steps < 1 or self.last_steps < 0:
            raise PlanError(
                f"teacache: first_steps must be 1 or more and last_steps 0 or more, "
                f"found {self.first_steps} and {self.last_steps}"
            )
        if self.negative not in get_args(Negative):
            raise PlanError(
                f"teacache: negative must be one of {', '.join(get_args(Negative))}, found {self.negative!r}"
            )

    def rescale(self, x: float) -> float:
        """Return what a change x adds to the sum."""
        if self.negative != "reference":
            low, high = self.input_range
            x = min(max(x, low), high)
        value = 0.0
        for coefficient in self.coefficients:
            value = value * x + coefficient
        if self.negative == "clamp":
            return max(value, 0.0)
        return abs(value) if self.negative == "abs" else value

    def decide(self, step: int, steps: int, x: float | None, accumulated: float) -> tuple[bool, float]:
        """Return whether to compute this step, and the new sum.

        Args:
            step: Index of the step.
            steps: Number of steps of the generation.
            x: Relative L1 change of the modulated input since the step before; None if there was none.
            accumulated: The sum after the step before.
        """
        if x is None or step < self.first_steps or step >= steps - self.last_steps:
            return True, 0.0
        accumulated += self.rescale(x)
        # Written so that a NaN computes; a sum of minus infinity would never compute again.
        return (False, accumulated) if -math.inf < accumulated < self.threshold else (True, 0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "threshold": self.threshold,
            "coefficients": list(self.coefficients),
            "input_range": list(self.input_range),
            "first_steps": self.first_steps,
            "last_steps": self.last_steps,
            "negative": self.negative,
        }


def read_policy(content: Mapping[str, Any]) -> TeaCachePolicy:
    """Read a policy.

    Raises:
        PlanError: If its name or a key is unknown or missing, or a value is not of its kind.
    """
    required = {"name", "threshold", "coefficients", "input_range", "first_steps", "last_steps"}
    keys = required | {"negative"}
    if not isinstance(content, Mapping) or content.get("name") != "teacache":
        raise PlanError(f"unknown policy {content!r}; known: teacache")
    if wrong := sorted((required - set(content)) | (set(content) - keys)):
        raise PlanError(f"policy teacache: unknown or missing key {wrong[0]!r}; the keys are {', '.join(sorted(keys))}")
    try:
        return TeaCachePolicy(
            threshold=content["threshold"],
            coefficients=tuple(content["coefficients"]),
            input_range=tuple(content["input_range"]),
            first_steps=content["first_steps"],
            last_steps=content["last_steps"],
            negative=content.get("negative", "clamp"),
        )
    except (TypeError, IndexError) as error:
        raise PlanError(f"policy teacache cannot be read: {error}") from None
