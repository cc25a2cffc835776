"""What a profile says of its model before anything is calibrated."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

from dicache.calibrate.methods import CalibrationError
from dicache.calibrate.rescale import Judged, fit_rescale
from dicache.calibrate.teacache import published_fits
from dicache.profiler import Profile


def redundancy(profile: Profile) -> dict[str, float | None]:
    """Return how much a step is like the one before, by name; None where nothing is known.

    Means over runs, guidance passes, steps and blocks; correlations over runs, passes and steps.
    """
    found = {name: profile.similarity(name) for name in profile.branches} | {"block delta": profile.delta_cosine}
    means = {name: np.ma.masked_invalid(cosine).mean() for name, cosine in found.items()}
    segments = [profile.range_error(start, stop) for start, stop in profile.anatomy.segments]
    means["change"] = np.mean([np.ma.filled(np.ma.masked_invalid(change).mean(), np.nan) for change in segments])
    x, y = (profile.relative_l1(what).ravel() for what in ("input", "output"))
    known = np.isfinite(x) & np.isfinite(y)
    with np.errstate(invalid="ignore", divide="ignore"):
        means["correlation"] = np.corrcoef(x[known], y[known])[0, 1]
    means["rank correlation"] = spearmanr(x[known], y[known]).statistic
    known = {name: mean for name, mean in means.items() if mean is not np.ma.masked and np.isfinite(mean)}
    return {name: round(float(known[name]), 5) if name in known else None for name in means}


def teacache_fits(profile: Profile, names: Sequence[str] = ()) -> tuple[dict[str, float] | None, dict[str, Judged]]:
    """Return how well TeaCache's polynomials foretell the output's change: a fit of its own, and published ones.

    The former is None where the profile does not suffice for a fit.

    Args:
        profile: With the pairs.
        names: Of published ones; none takes those for the model's class.
    """
    published = published_fits(profile, names)
    try:
        fit = fit_rescale(profile.relative_l1("input"), profile.relative_l1("output"))
    except CalibrationError:
        return None, published
    return {"r2": round(fit.held_out_r2, 5), "rmse": round(fit.held_out_rmse, 5)}, published
