"""Measurements of a profile in the forms that other projects fit from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dicache.anatomy.parts import kind_of_branch
from dicache.calibrate.methods import CalibrationError
from dicache.calibrate.smoothcache import branch_errors
from dicache.formats.format import FormatError
from dicache.formats.sglang_rows import rows_of
from dicache.profiler import Profile


@dataclass(frozen=True)
class Measurement:
    """A form in which another project keeps measurements.

    Attributes:
        name: As `--to` has it.
        holds: What it says.
        source: The project and file that says what the form is.
        make: Returns it, of a profile and of what a change of the input is to foretell.
    """

    name: str
    holds: str
    source: str
    make: Callable[[Profile, str], Any]


def pairs(profile: Profile, fit_to: str) -> dict[str, Any]:
    """Return TeaCache's pairs: x and y are the relative L1 changes of the modulated input and of what it foretells.

    Returns:
        Lists of equal length: `x` and `y`, unitless, ready for `numpy.polyfit(x, y, 4)`, and of each pair its `run`,
        counted from 0, its guidance `pass` and the later `step`.
    """
    x, y = profile.relative_l1("input"), profile.relative_l1(fit_to)  # (runs, contexts, steps - 1)
    known = np.argwhere(np.isfinite(x) & np.isfinite(y))
    if not len(known):
        raise FormatError("the profile has no pair of a change of the input and one of the output; profile again")
    names = profile.provenance.contexts
    return {
        "x": [float(x[tuple(place)]) for place in known],
        "y": [float(y[tuple(place)]) for place in known],
        "run": known[:, 0].tolist(),
        "pass": [names[place] for place in known[:, 1]],
        "step": (known[:, 2] + 1).tolist(),
    }


def magnitude_ratios(profile: Profile, fit_to: str) -> list[float]:
    """Return MagCache's ratios, the mean over runs: of one guidance pass a list that begins with 1, of two by turns."""
    ratios = profile.arrays["magnitude"][..., 0]  # (runs, contexts, steps)
    if not len(ratios):
        raise FormatError("the profile has no run that did not fail; profile again")
    if ratios.shape[1] > 2:
        raise FormatError(f"MagCache knows one or two guidance passes, and the profile has {ratios.shape[1]}")
    mean = ratios.mean(axis=0)
    mean[:, 0] = 1.0
    if len(lacking := np.argwhere(~np.isfinite(mean))):
        raise FormatError(
            f"the profile has no ratio at step {lacking[0, 1]}, where another model runs or a guidance pass is left "
            "out; MagCache's form has one a step"
        )
    return [round(float(ratio), 5) for ratio in mean.T.ravel()]  # pass by pass at each step


def smoothcache_errors(profile: Profile, fit_to: str) -> dict[str, list[list[float]]]:
    """Return SmoothCache's errors: of each component a row a lag k, whose entry i is that of step i at step i + k."""
    try:
        errors = branch_errors(profile)
    except CalibrationError as error:
        raise FormatError(str(error)) from None
    modules = {kind_of_branch(site.branch): site.module for block in profile.anatomy.blocks for site in block.sites}
    return {
        modules[kind]: [[float(e) for e in row[: profile.steps - k]] for k, row in enumerate(rows, start=1)]
        for kind, rows in errors.items()
    }


MEASUREMENTS: Mapping[str, Measurement] = {
    each.name: each
    for each in (
        Measurement(
            "teacache-pairs",
            "x and y of all runs, passes and steps, for numpy.polyfit",
            "ali-vilab/TeaCache#2; vLLM-Omni's coefficient_estimator.py fits the same pairs",
            pairs,
        ),
        Measurement(
            "magcache",
            "a ratio a step, the mean over runs; two guidance passes by turns",
            "Zehong-Ma/MagCache: MagCache4Wan2.1/magcache_generate.py",
            magnitude_ratios,
        ),
        Measurement(
            "smoothcache-errors",
            "the errors of each component and lag, as its calibration averages them over blocks",
            "Roblox/SmoothCache at commit 54ebe11: SmoothCache/calibration/calibration_helper.py",
            smoothcache_errors,
        ),
        Measurement(
            "sglang-rows",
            "of each step how many samples, and the means of x and y",
            "sgl-project/sglang at commit 2dcb5ab: multimodal_gen/runtime/cache/teacache_calibrate.py",
            rows_of,
        ),
    )
}
