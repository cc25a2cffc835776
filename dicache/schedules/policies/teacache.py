"""TeaCache's policy: the changes that the modulated input foretells, added up to a threshold."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dicache.anatomy.parts import Anatomy
from dicache.schedules.policies.policy import Memory, Policy

Negative = Literal["clamp", "abs", "reference"]


@dataclass
class Sum(Memory):
    """What TeaCache remembers.

    Attributes:
        accumulated: The changes foretold since the body was last computed.
    """

    accumulated: float = 0.0


@dataclass(frozen=True)
class TeaCachePolicy(Policy):
    """Reuse the body's delta until the changes predicted since it was taken add up to the threshold.

    At each step the relative L1 change x of the timestep-modulated input is rescaled by a polynomial p to the change
    it foretells, and added up. Below the threshold the body is skipped; at or above it the body is computed and
    the sum starts again at zero.

    Attributes:
        threshold: Unitless; 0 computes everything, unless what is negative lowers the sum.
        coefficients: Of p, highest power first.
        input_range: Smallest and largest x that p was fitted on; outside it a fitted polynomial is meaningless and
            often negative.
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
    negative: Negative = "clamp"
    name = "teacache"
    optional = frozenset({"negative"})

    def __post_init__(self) -> None:
        numbers = (self.threshold, *self.coefficients, *self.input_range)
        self.check_finite("threshold, coefficients and input_range", numbers)
        if self.threshold < 0:
            raise self.error(f"the threshold must be 0 or more, found {self.threshold}")
        if not self.coefficients:
            raise self.error("the polynomial has no coefficients")
        if len(self.input_range) != 2 or self.input_range[0] > self.input_range[1]:
            raise self.error(f"input_range must be a smallest and a largest value, found {self.input_range}")
        super().__post_init__()
        if self.negative not in get_args(Negative):
            raise self.error(f"negative must be one of {', '.join(get_args(Negative))}, found {self.negative!r}")

    @property
    def limit(self) -> str:
        return f"threshold {self.threshold:.4g}"

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

    def remember(self) -> Sum:
        return Sum()

    def decide(self, step: int, steps: int, x: float | None, memory: Sum) -> bool:
        """Return whether to compute this step, and note the new sum.

        Args:
            step: Index of the step.
            steps: Number of steps of the generation.
            x: Relative L1 change of the modulated input since the step before; None if there was none.
            memory: Of the guidance pass.
        """
        if x is None or self.forced(step, steps):
            memory.distance, memory.accumulated = None, 0.0
            return True
        memory.distance = memory.accumulated = memory.accumulated + self.rescale(x)
        # Written so that a NaN computes; a sum of minus infinity would never compute again.
        if -math.inf < memory.accumulated < self.threshold:
            return False
        memory.accumulated = 0.0
        return True

    def skipped(self, anatomy: Anatomy) -> tuple[int, int]:
        return 0, len(anatomy.blocks)

    def macs_saved(self, anatomy: Anatomy) -> int:
        """Return the multiply-accumulates that a skip by a decision in the body's first branch does not do.

        The first block has run its modulation by then, all else of the body has not.
        """
        first = anatomy.blocks[0]
        return sum(block.macs for block in anatomy.blocks) - first.macs + sum(site.macs for site in first.sites)
