"""DeepCache: at most steps run only the outermost part of a U-Net, and hold what the rest has made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dicache.anatomy import Anatomy
from dicache.calibrate.delta_cache import check_interval, enclosed_span
from dicache.calibrate.methods import Axis, CalibrationError, letters_of, method
from dicache.calibrate.spaces import PlanSpace
from dicache.schedules import Plan, Rule

POWER = 1.2  # default of the released code's function; tried before smaller ones
POWER_STEP = 0.02


@method("deepcache")
@dataclass(frozen=True)
class DeepCache:
    """Compute everything every `interval` steps; in between, only what lies outside of one skip connection.

    Branch b is the U-Net's skip connection b, 0 the outermost, from the output of its first convolution: what makes
    skip connections 0 to b runs, and what takes them. In the released code that is layer b % (n + 1) of block
    b // (n + 1) of a U-Net that has n residual blocks a stage down and a sampler behind them; with Stable Diffusion's
    n = 2, b % 3 and b // 3. Held is the feature map that enters the upper blocks behind the skipped ones.

    A step is one of the sampler's, never a timestep's value: solvers that repeat timesteps or take two evaluations
    to a step are counted right. Where a generation begins in the middle, as image-to-image does, its first step is
    computed as well.

    Attributes:
        interval: Steps from one full computation to the next; 1 computes everything.
        branch: The skip connection, from 0.
        center: None for even intervals. Else the paper's uneven ones: as many full steps as there would be even
            ones, close to one another around this step and farther apart away from it.
        power: With a center, how uneven; it is lowered by 0.02 until there are as many full steps as there are to be.

    References:
        DeepCache, arXiv 2312.00858, section 3.3; released code, horseee/DeepCache.
    """

    interval: int = 3
    branch: int = 0
    center: int | None = None
    power: float | None = None

    def __post_init__(self) -> None:
        check_interval("deepcache", self.interval)
        if self.branch < 0:
            raise CalibrationError(f"deepcache: the branch must be 0 (the outermost) or more, found {self.branch}")
        if self.power is not None and (self.center is None or not 1 < self.power < math.inf):
            raise CalibrationError(
                f"deepcache: a power must be above 1 and goes with a center, found {self.power:g} and center "
                f"{self.center}; {POWER} and a step such as 15 of 50 are usual"
            )

    def plan(self, anatomy: Anatomy, steps: int) -> Plan:
        blocks = enclosed_span("deepcache", anatomy, self.branch, delta=False)
        if self.interval > steps:
            raise CalibrationError(f"deepcache: the interval must be at most the {steps} steps, found {self.interval}")
        even = self.center is None or self.interval == 1
        full = range(0, steps, self.interval) if even else self._uneven(steps)
        letters = letters_of(step in full for step in range(steps))
        return Plan(steps, (Rule("skip", letters, blocks=blocks, predictor="feature"),) if "." in letters else ())

    def _uneven(self, steps: int) -> list[int]:
        """Return the steps that are computed in full, around a center.

        Points on a line from (-center)^(1/p) to (steps - center)^(1/p), raised to the power p again: the first root
        is a complex number, and as in the released code only the real part of what comes out counts.
        """
        center = self.center
        assert center is not None
        if not 0 <= center < steps:
            raise CalibrationError(
                f"deepcache: the center must be one of the steps 0 to {steps - 1}, found {center}; leave it out for "
                "even intervals"
            )
        many = math.ceil(steps / self.interval)
        power = POWER if self.power is None else self.power
        while power > 1:
            ends = complex(-center) ** (1 / power), (steps - center) ** (1 / power)
            points = np.real(np.linspace(*ends, many + 1) ** power).astype(np.int32)
            full = [0, *(int(point) + center for point in np.unique(points)[1:-1])]
            if len(full) == many:
                return full
            power -= POWER_STEP
        raise CalibrationError(
            f"deepcache: no power gives {many} full steps of {steps} around step {center}; take another interval, or a "
            "center that is nearer to the first step"
        )


@dataclass(frozen=True)
class DeepCacheSpace(PlanSpace):
    """The interval, and the skip connection whose inside is held."""

    saving = ("interval",)

    def free(self) -> Mapping[str, Axis]:
        return {"interval": self.intervals, "branch": range(max(1, len(self.anatomy.links)))}
