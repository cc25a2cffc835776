"""MagCache: skip the body while the calibrated ratios of its residual's magnitude stay close to 1."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dicache.calibrate.methods import Axis, Between, CalibrationError, body_plan, method
from dicache.calibrate.spaces import ProfileSpace
from dicache.profiler import Profile
from dicache.schedules import Schedule

THRESHOLDS = Between(0.005, 1.0, log=True)  # that a search tries; the published ones are 0.06 to 0.24
LONGEST_SKIP = 6
LONGEST_RETENTION = 0.4


@method("magcache")
@dataclass(frozen=True)
class MagCache:
    """Skip the body, and add its last delta, until the accumulated error of its magnitude exceeds a threshold.

    The ratios are the same for every prompt, so the rule is played through beforehand, for each guidance pass by its
    own ratios, and gives a plan.

    Attributes:
        threshold: Of the accumulated error |1 - product of ratios|, unitless: 0.12 by default in the released code,
            0.24 for FLUX, 0.06 in diffusers.
        max_skip: Most steps skipped in a row.
        retention: Share of the steps at the start that are always computed.
        never_skip: Other steps that are always computed; the released code for FLUX names step 11 of 28.

    References:
        MagCache, arXiv 2506.09045, algorithm 1; Zehong-Ma/MagCache.
    """

    threshold: float = 0.12
    max_skip: int = 2
    retention: float = 0.2
    never_skip: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise CalibrationError(f"magcache: the threshold must be a number of 0 or more, found {self.threshold}")
        if self.max_skip < 0:
            raise CalibrationError(f"magcache: at most 0 or more steps are skipped in a row, found {self.max_skip}")
        if not 0 <= self.retention <= 1:
            raise CalibrationError(
                f"magcache: the retention is a share of the steps from 0 to 1, found {self.retention}"
            )

    def calibrate(self, profile: Profile) -> Schedule:
        """Return the schedule that this profile gives.

        Raises:
            CalibrationError: If the profile has no run that did not fail.
        """
        magnitude = profile.arrays["magnitude"][..., 0]  # (runs, contexts, steps)
        if not len(magnitude):
            raise CalibrationError("magcache: the profile has no run that did not fail; profile again")
        wrong = [step for step in self.never_skip if not 0 <= step < profile.steps]
        if wrong:
            raise CalibrationError(f"magcache: there is no step {wrong[0]}; the steps are 0-{profile.steps - 1}")
        ratios = dict(zip(profile.provenance.contexts, magnitude.mean(axis=0), strict=True))
        letters = {context: self.simulate(found) for context, found in ratios.items()}
        return Schedule(
            method="magcache",
            settings=asdict(self),
            anatomy=profile.anatomy,
            target=profile.provenance.target,
            steps=profile.steps,
            plan=body_plan(letters),
            measured={
                **profile.origin,
                "ratios": {
                    name: [None if math.isnan(x) else round(float(x), 5) for x in found]
                    for name, found in ratios.items()
                },
            },
        )

    def simulate(self, ratios: Sequence[float] | np.ndarray) -> str:
        """Return a letter a step: `C` computed, `.` skipped.

        Args:
            ratios: Of each step, the mean over tokens of the residual's norm to that of the step before; of the first
                step, and of one that was not measured, nothing is known (NaN), and it is computed.
        """
        return simulate(ratios, self.threshold, self.max_skip, self.retention, self.never_skip)


def simulate(
    ratios: Sequence[float] | np.ndarray,
    threshold: float,
    max_skip: int,
    retention: float,
    never_skip: Collection[int] = (),
) -> str:
    letters = ""
    product, skipped, error = 1.0, 0, 0.0
    for step, ratio in enumerate(ratios):
        product, skipped = product * ratio, skipped + 1
        error += abs(1 - product)
        kept = step == 0 or step < retention * len(ratios) or step in never_skip
        # "At most" as for FLUX and in diffusers; the released code for Wan has "less than". False with NaN.
        if not kept and error <= threshold and skipped <= max_skip:
            letters += "."
            continue
        letters += "C"
        product, skipped, error = 1.0, 0, 0.0
    return letters


@dataclass(frozen=True)
class MagCacheSpace(ProfileSpace):
    """The threshold, how many steps are skipped in a row, and how many are computed at the start."""

    saving = ("max_skip", "-retention", "threshold")

    def free(self) -> Mapping[str, Axis]:
        return {
            "threshold": THRESHOLDS,
            "max_skip": range(1, min(LONGEST_SKIP, self.steps - 1) + 1),
            "retention": tuple(
                round(count / self.steps, 4) for count in range(1, int(LONGEST_RETENTION * self.steps) + 1)
            ),
        }
