"""SmoothCache: reuse each kind of branch for as long as its measured change stays below a threshold."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from dicache.anatomy.parts import branch_of, kind_of_branch
from dicache.calibrate.methods import Axis, CalibrationError, method
from dicache.calibrate.spaces import ProfileSpace
from dicache.profiler import Profile
from dicache.schedules import Plan, Rule, Schedule

USUAL_ALPHA = 0.15  # of those published


@method("smoothcache")
@dataclass(frozen=True)
class SmoothCache:
    """Reuse a kind of branch for as many steps as its relative L1 error stays at most `alpha`.

    How far it looks ahead is how many steps back the profile compared with (`--lags`), 3 as in the released code.

    Attributes:
        alpha: Of the error, unitless; 0.08, 0.15, 0.18 and 0.35 were published.

    References:
        SmoothCache, arXiv 2411.10510, section 3; Roblox/SmoothCache.
    """

    alpha: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise CalibrationError(f"smoothcache: alpha must be a number of 0 or more, found {self.alpha}")

    def calibrate(self, profile: Profile) -> Schedule:
        """Return the schedule that this profile gives.

        Raises:
            CalibrationError: If the profile has no run that did not fail.
        """
        errors = branch_errors(profile)
        letters = {kind: scan(error, self.alpha) for kind, error in errors.items()}
        rules = tuple(Rule("reuse", row, branch=kind) for kind, row in letters.items() if "." in row)
        return Schedule(
            method="smoothcache",
            settings=asdict(self),
            anatomy=profile.anatomy,
            target=profile.provenance.target,
            steps=profile.steps,
            plan=Plan(profile.steps, rules),
            measured={
                **profile.origin,
                "lookahead": profile.provenance.lags,
                "smallest_error": {kind: float(np.nanmin(error)) for kind, error in errors.items()},
            },
        )


def branch_errors(profile: Profile) -> dict[str, np.ndarray]:
    """Return for each kind of branch E, (lags, steps): of what step i gives, as the output of step i + k.

    `E[k - 1, i] = |o_i - o_(i+k)|_1 / |o_(i+k)|_1`, the later output below: over all runs and guidance passes as if
    they were one batch, then the mean over all sites of the kind. NaN where there is no step i + k.

    Raises:
        CalibrationError: If the profile has no run that did not fail.
    """
    diff, size = profile.sites["diff_l1"], profile.sites["abs_l1"]  # (runs, contexts, steps, sites, lags)
    if not len(diff):
        raise CalibrationError("smoothcache: the profile has no run that did not fail; profile again")
    steps, lags = profile.steps, profile.provenance.lags
    kinds = np.array([kind_of_branch(branch_of(key)) for key in profile.anatomy.sites])
    errors = {kind: np.full((lags, steps), np.nan) for kind in dict.fromkeys(kinds.tolist())}
    for k in range(1, min(lags, steps - 1) + 1):
        changed, later = (np.nansum(x[:, :, k:, :, k - 1], axis=(0, 1)) for x in (diff, size))  # (steps - k, sites)
        with np.errstate(invalid="ignore", divide="ignore"):
            error = changed / later
        for kind, rows in errors.items():
            rows[k - 1, : steps - k] = error[:, kinds == kind].mean(axis=1)
    return errors


def scan(errors: np.ndarray, alpha: float) -> str:
    """Return a letter a step: `C` computed, `.` reused; the first and the last are always computed.

    From each computed step the farthest one whose error is at most `alpha` is reached in one go; the errors of those in
    between are not asked for.

    Args:
        errors: As from `branch_errors`, (lags, steps).
        alpha: The threshold.
    """
    steps = errors.shape[1]
    letters = ["."] * steps
    step = 0
    while step < steps:
        letters[step] = "C"
        within = np.flatnonzero(errors[:, step] <= alpha)  # NaN is not
        step += int(within[-1]) + 2 if len(within) else 1
    letters[-1] = "C"
    return "".join(letters)


@dataclass(frozen=True)
class SmoothCacheSpace(ProfileSpace):
    """The threshold alpha, among the errors that the profile has."""

    saving = ("alpha",)

    def free(self) -> Mapping[str, Axis]:
        errors = branch_errors(self.profile)
        return {"alpha": self.thresholds(np.concatenate([error.ravel() for error in errors.values()]))}
