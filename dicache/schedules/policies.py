"""Policies: rules that choose the row at run time, from a signal of the generation itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dicache.schedules.plan import PlanError


@dataclass(frozen=True)
class TeaCachePolicy:
    """Reuse the body's delta until the changes predicted since it was taken add up to the threshold.

    At each step the relative L1 change x of the timestep-modulated input is rescaled by a polynomial p to the change
    it foretells, and added up. Below the threshold the body is skipped; at or above it the body is computed and
    the sum starts again at zero.

    Attributes:
        threshold: Unitless; 0 computes everything.
        coefficients: Of p, highest power first.
        input_range: Smallest and largest x that p was fitted on. x is clamped to it and p(x) to zero from below:
            outside its range a fitted polynomial is meaningless and often negative, which would never stop skipping.
        first_steps: How many steps at the start are always computed.
        last_steps: How many steps at the end are always computed.

    References:
        TeaCache, arXiv 2411.19108, section 3.3.
    """

    threshold: float
    coefficients: tuple[float, ...]
    input_range: tuple[float, float]
    first_steps: int = 1
    last_steps: int = 1
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

    def rescale(self, x: float) -> float:
        """Return p(x) with x clamped to the fitted range and the result to zero."""
        low, high = self.input_range
        x = min(max(x, low), high)
        value = 0.0
        for coefficient in self.coefficients:
            value = value * x + coefficient
        return max(value, 0.0)

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
        # Written so that a NaN computes.
        return (False, accumulated) if accumulated < self.threshold else (True, 0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "threshold": self.threshold,
            "coefficients": list(self.coefficients),
            "input_range": list(self.input_range),
            "first_steps": self.first_steps,
            "last_steps": self.last_steps,
        }


def read_policy(content: Mapping[str, Any]) -> TeaCachePolicy:
    """Read a policy.

    Raises:
        PlanError: If its name or a key is unknown or missing, or a value is not of its kind.
    """
    keys = {"name", "threshold", "coefficients", "input_range", "first_steps", "last_steps"}
    if not isinstance(content, Mapping) or content.get("name") != "teacache":
        raise PlanError(f"unknown policy {content!r}; known: teacache")
    if wrong := sorted(keys ^ set(content)):
        raise PlanError(f"policy teacache: unknown or missing key {wrong[0]!r}; the keys are {', '.join(sorted(keys))}")
    try:
        return TeaCachePolicy(
            threshold=content["threshold"],
            coefficients=tuple(content["coefficients"]),
            input_range=tuple(content["input_range"]),
            first_steps=content["first_steps"],
            last_steps=content["last_steps"],
        )
    except (TypeError, IndexError) as error:
        raise PlanError(f"policy teacache cannot be read: {error}") from None
