"""TeaCache's polynomial: fitted to a profile, and judged on runs that the fit did not see."""

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dicache.calibrate.methods import CalibrationError
from dicache.schedules import TeaCachePolicy
from dicache.schedules.policies import Negative

FOLDS = 4


@dataclass(frozen=True)
class Rescale:
    """The polynomial that foretells the change of the output, and how well it does.

    Attributes:
        coefficients: Highest power first.
        input_range: Smallest and largest x it was fitted on.
        pairs: How many pairs of x and y.
        held_out_r2: Share of the variance of y explained on runs that the fit did not see; below 0 the mean of y
            foretells better.
        held_out_rmse: Root mean square error of y on them.
        per_step_r2: What the median y of each step, over the other runs, explains of the same variance.
        per_step_rmse: Its root mean square error.
        held_out_outside_share: Share of the held-out x that lie outside the range of the fit to the other runs.
        held_out_negative_share: Share of them at which that fit is negative.
        held_out_falling_share: Share of them at which a larger change of the input foretells a smaller one of the
            output.
        negative_share: Share of the fitted range in which the polynomial is negative.
        falling_share: Share of it in which it falls.
    """

    coefficients: tuple[float, ...]
    input_range: tuple[float, float]
    pairs: int
    held_out_r2: float
    held_out_rmse: float
    per_step_r2: float
    per_step_rmse: float
    held_out_outside_share: float
    held_out_negative_share: float
    held_out_falling_share: float
    negative_share: float
    falling_share: float

    def to_json(self) -> dict[str, Any]:
        """Return what is known of the fit, without the polynomial itself."""
        content: dict[str, Any] = {
            name: round(value, 5) if isinstance(value, float) else value for name, value in asdict(self).items()
        }
        del content["coefficients"]
        return {**content, "input_range": list(self.input_range)}


@dataclass(frozen=True)
class Judged:
    """How well a polynomial that was fitted to something else foretells some pairs.

    Attributes:
        pairs: How many pairs of x and y.
        r2: Share of the variance of y explained; below 0 the mean of y foretells better.
        rmse: Root mean square error of y.
        outside_share: Share of x outside the range in which x is held.
        negative_share: Share of them at which the polynomial is negative.
        falling_share: Share of them at which a larger change of the input foretells a smaller one of the output.
    """

    pairs: int
    r2: float
    rmse: float
    outside_share: float
    negative_share: float
    falling_share: float

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, rounded."""
        return {name: round(value, 5) if isinstance(value, float) else value for name, value in asdict(self).items()}


def judge(policy: TeaCachePolicy, x: np.ndarray, y: np.ndarray) -> Judged:
    """Return how well a policy's polynomial foretells y from x, as the policy uses it.

    Args:
        policy: With the polynomial, the range that x is held in, and what becomes of negative values.
        x: Relative L1 change of the signal since the step before, unitless, of any shape; NaN where there is none.
        y: The same of the output.

    Raises:
        CalibrationError: If there is no pair.
    """
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        raise CalibrationError("teacache: found no pair of a change of the signal and one of the output")
    x, y = x[known], y[known]
    foretold, outside, negative, falling = _applied(policy, x)
    if policy.negative != "reference":  # where x is held, a larger one foretells the same
        falling = falling & ~outside
    error = foretold - y
    return Judged(
        pairs=len(x),
        r2=float(1 - (error**2).sum() / _variation(y)),
        rmse=float(np.sqrt((error**2).mean())),
        outside_share=float(outside.mean()),
        negative_share=float(negative.mean()),
        falling_share=float(falling.mean()),
    )


def fit_rescale(x: np.ndarray, y: np.ndarray, *, degree: int = 4, negative: Negative = "clamp") -> Rescale:
    """Fit the polynomial that foretells how much the output changes from how much the input did.

    All pairs of all runs are fitted at once. Its quality is measured on runs that were left out, as in `held_out`.

    Args:
        x: Relative L1 change of the modulated input since the step before, unitless, shape (runs, contexts, steps - 1).
        y: The same of the output.
        degree: Degree of the polynomial.
        negative: What the policy makes of a negative value; it is judged as it will be used.

    Raises:
        CalibrationError: If there are fewer than two runs or fewer pairs than coefficients, or x hardly varies.

    References:
        TeaCache, arXiv 2411.19108, section 3.3.
    """
    runs = len(x)
    if runs < 2:
        raise CalibrationError(
            f"teacache: found {runs} run in the profile, needed two or more to judge the fit on others"
        )
    known = np.isfinite(x) & np.isfinite(y)
    pairs = int(known.sum())
    if pairs <= degree + 1:
        raise CalibrationError(
            f"teacache: found {pairs} pairs, needed more than the {degree + 1} coefficients; profile more runs or steps"
        )
    if np.ptp(x[known]) < 1e-9:
        raise CalibrationError("teacache: the modulated input changes by the same amount at every step; nothing to fit")
    left_out = held_out(x, y, degree=degree, negative=negative)
    foretold, by_step = left_out.foretold, left_out.by_step
    error, step_error = foretold[known] - y[known], by_step[known] - y[known]
    variation = _variation(y[known])
    coefficients = _polynomial(x[known], y[known], degree)
    grid = np.polyval(coefficients, np.linspace(x[known].min(), x[known].max(), 1000))
    return Rescale(
        coefficients=tuple(float(c) for c in coefficients),
        input_range=(float(x[known].min()), float(x[known].max())),
        pairs=pairs,
        held_out_r2=float(1 - (error**2).sum() / variation),
        held_out_rmse=float(np.sqrt((error**2).mean())),
        per_step_r2=float(1 - np.nansum(step_error**2) / variation),
        per_step_rmse=float(np.sqrt(np.nanmean(step_error**2))),
        held_out_outside_share=float(left_out.outside[known].mean()),
        held_out_negative_share=float(left_out.negative[known].mean()),
        held_out_falling_share=float(left_out.falling[known].mean()),
        negative_share=float((grid < 0).mean()),
        falling_share=float((np.diff(grid) < 0).mean()),
    )


@dataclass(frozen=True)
class HeldOut:
    """What fits to the other runs foretell of each run; all arrays are of the shape of y.

    Attributes:
        foretold: By the polynomial.
        by_step: By the median y of the step.
        outside: Whether x lies outside the range of the fit.
        negative: Whether the polynomial is negative there.
        falling: Whether a larger x foretells a smaller y there.
    """

    foretold: np.ndarray
    by_step: np.ndarray
    outside: np.ndarray
    negative: np.ndarray
    falling: np.ndarray


def held_out(x: np.ndarray, y: np.ndarray, *, degree: int = 4, negative: Negative = "clamp") -> HeldOut:
    """Return what is foretold of runs that a fit did not see.

    The runs are dealt into four parts, and each part is foretold by a fit to the others.

    Args:
        x: As `fit_rescale` takes it.
        y: Likewise.
        degree: Of the polynomial.
        negative: What the policy makes of a negative value.

    Raises:
        CalibrationError: If the other runs have fewer pairs than the polynomial has coefficients.
    """
    known = np.isfinite(x) & np.isfinite(y)
    runs = len(x)
    folds = min(FOLDS, runs)
    foretold, by_step = np.full_like(y, np.nan), np.full_like(y, np.nan)
    outside, below, falling = (np.zeros(x.shape, dtype=bool) for _ in range(3))
    for fold in range(folds):
        left_out = np.arange(runs) % folds == fold
        seen = known & ~left_out[:, None, None]
        if seen.sum() <= degree:
            raise CalibrationError(
                f"teacache: found {seen.sum()} pairs in the runs that a fit is not judged on, needed at least the "
                f"{degree + 1} coefficients; profile more runs or steps"
            )
        part = _polynomial(x[seen], y[seen], degree)
        low, high = float(x[seen].min()), float(x[seen].max())
        policy = TeaCachePolicy(0.0, tuple(part.tolist()), (low, high), negative=negative)
        foretold[left_out], outside[left_out], below[left_out], falling[left_out] = _applied(policy, x[left_out])
        with warnings.catch_warnings():  # of steps that no run knows
            warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
            by_step[left_out] = np.nanmedian(np.where(known, y, np.nan)[~left_out], axis=0)
    return HeldOut(foretold, by_step, outside, below, falling)


def rescaled(policy: TeaCachePolicy, x: np.ndarray) -> np.ndarray:
    """Return what changes x add to the policy's sum: its `rescale`, of many."""
    if policy.negative != "reference":
        x = np.clip(x, *policy.input_range)
    value = np.zeros(x.shape)
    for coefficient in policy.coefficients:
        value = value * x + coefficient
    if policy.negative == "clamp":
        return np.maximum(value, 0.0)
    return np.abs(value) if policy.negative == "abs" else value


def _applied(policy: TeaCachePolicy, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what a policy foretells at x; where x lies outside its range; where p is negative, and where it falls."""
    low, high = policy.input_range
    at = x if policy.negative == "reference" else np.clip(x, low, high)
    foretold = rescaled(policy, x)
    slope = np.polyval(np.polyder(policy.coefficients), at)
    return foretold, (x < low) | (x > high), np.polyval(policy.coefficients, at) < 0, slope < 0


def _variation(y: np.ndarray) -> float:
    """Return the sum of squares about the mean; a y that never varies has none to explain."""
    return float(max(((y - y.mean()) ** 2).sum(), 1e-24))


def _polynomial(x: np.ndarray, y: np.ndarray, degree: int) -> np.ndarray:
    """Return the least-squares polynomial, highest power first; fitted on x scaled to [-1, 1], where it is stable."""
    coefficients: np.ndarray = np.polynomial.Polynomial.fit(x, y, degree).convert().coef[::-1]
    return np.pad(coefficients, (degree + 1 - len(coefficients), 0))
