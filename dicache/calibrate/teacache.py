"""TeaCache: fit how much the model's output will change from how much its modulated input has."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from dicache.calibrate.methods import Axis, Between, CalibrationError, body_plan, method
from dicache.calibrate.rescale import fit_rescale
from dicache.calibrate.simulating import find_limit, macs_fraction, simulate
from dicache.profiler import Profile
from dicache.schedules import Schedule, TeaCachePolicy
from dicache.schedules.policies import Negative

FitTo = Literal["residual", "body", "output"]
Foretell = Literal["input", "steps"]
USUAL_SPEEDUP = 1.8
HIGHEST_DEGREE = 8  # beyond it a fit to noise is all that is gained
DEGREES = range(1, 7)  # that a search tries; a published attempt with six gave absurd coefficients, so no higher


@method("teacache")
@dataclass(frozen=True)
class TeaCache:
    """Skip the body until the foretold change of the output adds up to a threshold.

    Attributes:
        threshold: Of the accumulated relative L1 change; None finds it for `target_speedup`.
        target_speedup: How many times fewer multiply-accumulates, on the average of the profile's own runs.
        degree: Of the polynomial.
        fit_to: What is foretold: the model's `output`, as the paper has it, the `body`'s output or its `residual`.
        foretell: From the modulated `input`, at run time, as the paper has it; or from the `steps` alone, by the median
            change that the profile's runs had at each step. That needs no polynomial and no decision at run time: it
            gives a plan.
        negative: What a negative value of the polynomial adds to the sum; see the policy.

    References:
        TeaCache, arXiv 2411.19108, section 3.3.
    """

    threshold: float | None = None
    target_speedup: float | None = None
    degree: int = 4
    fit_to: FitTo = "output"
    foretell: Foretell = "input"
    negative: Negative = "clamp"

    def __post_init__(self) -> None:
        given = [value for value in (self.threshold, self.target_speedup) if value is not None]
        if len(given) != 1:
            raise CalibrationError("teacache: give either a threshold (such as 0.1) or a target speed-up (such as 1.8)")
        if not np.isfinite(given[0]) or given[0] < 0:
            raise CalibrationError(f"teacache: the threshold must be a number of 0 or more, found {given[0]}")
        if self.target_speedup is not None and self.target_speedup < 1:
            raise CalibrationError(f"teacache: the target speed-up must be 1 or more, found {self.target_speedup}")
        if not 1 <= self.degree <= HIGHEST_DEGREE:
            raise CalibrationError(
                f"teacache: the degree must be 1 to {HIGHEST_DEGREE}, found {self.degree}; 4 is usual"
            )
        if self.fit_to not in get_args(FitTo):
            raise CalibrationError(
                f"teacache: the fit is to one of {', '.join(get_args(FitTo))}, found {self.fit_to!r}"
            )
        if self.foretell not in get_args(Foretell):
            raise CalibrationError(f"teacache: it is foretold from input or steps, found {self.foretell!r}")
        if self.negative not in get_args(Negative):
            raise CalibrationError(
                f"teacache: negative is one of {', '.join(get_args(Negative))}, found {self.negative!r}"
            )

    def calibrate(self, profile: Profile) -> Schedule:
        """Return the schedule that this profile gives.

        Raises:
            CalibrationError: If the profile has too few runs, or the target speed-up cannot be reached.
        """
        x, y = profile.relative_l1("input"), profile.relative_l1(self.fit_to)  # (runs, contexts, steps - 1)
        rescale = fit_rescale(x, y, degree=self.degree, negative=self.negative)
        coefficients, input_range, signal = rescale.coefficients, rescale.input_range, x
        if self.foretell == "steps":  # the change itself is known, so it is taken as it is
            signal = np.nanmedian(y, axis=(0, 1), keepdims=True)
            coefficients, input_range = (1.0, 0.0), (0.0, float(signal.max()))
        policy = TeaCachePolicy(self.threshold or 0.0, coefficients, input_range, negative=self.negative)
        if self.target_speedup is not None:
            policy = replace(policy, threshold=_find_threshold(policy, signal, profile, self.target_speedup))
        computed = simulate(policy, signal)  # (runs, contexts, steps)
        often = computed.mean(axis=(0, 1))
        return Schedule(
            method="teacache",
            settings=asdict(self),
            anatomy=profile.anatomy,
            target=profile.provenance.target,
            steps=profile.steps,
            plan=body_plan({"*": "".join("C" if c else "." for c in computed[0, 0])})
            if self.foretell == "steps"
            else None,
            policy=None if self.foretell == "steps" else policy,
            measured={
                "model": profile.provenance.model,
                "runs": sum(run.ok for run in profile.runs),
                "guidance": profile.provenance.settings.get("guidance"),
                "fit": rescale.to_json(),
                "threshold": policy.threshold,
                "computed_steps": round(float(often.sum()), 2),
                "expected_steps": "".join("C" if share >= 0.5 else "." for share in often),
                "macs_fraction": round(macs_fraction(policy, profile.anatomy, float(often.mean())), 4),
            },
        )


def _find_threshold(policy: TeaCachePolicy, x: np.ndarray, profile: Profile, target_speedup: float) -> float:
    """Return the smallest threshold with which the simulated rule reaches a speed-up in multiply-accumulates."""
    foretold = np.vectorize(policy.rescale)(np.nan_to_num(x, nan=0.0))
    highest = float(np.maximum(foretold, 0).sum(axis=-1).max()) * 1.001 + 1e-9  # no sum of changes reaches it

    def speedup(threshold: float) -> float:
        tried = replace(policy, threshold=threshold)
        return 1 / macs_fraction(tried, profile.anatomy, float(simulate(tried, x).mean()))

    return find_limit(policy.name, profile.steps, speedup, highest, target_speedup)


@dataclass(frozen=True)
class TeaCacheSpace:
    """What a search varies: how much to skip, and what foretells when.

    A threshold means something else for every fit, so it is not drawn itself: the share of the multiply-accumulates is
    that it is to take on the profile's runs, and the threshold is found for that.

    Attributes:
        profile: What is fitted.
        settings: Where what is not varied comes from.
        fixed: Names of settings that are not varied.
        max_macs: The share that is aimed at; others are drawn from around it. None draws from all that can be reached.
    """

    profile: Profile
    settings: TeaCache
    fixed: Collection[str] = ()
    max_macs: float | None = None

    @cached_property
    def axes(self) -> Mapping[str, Axis]:
        policy = TeaCachePolicy(0.0, (1.0, 0.0), (0.0, 1.0), negative=self.settings.negative)
        least = macs_fraction(policy, self.profile.anatomy, 2 / self.profile.steps)  # all but its two forced steps
        low, high = least, 1.0
        if self.max_macs is not None:  # the profile's runs foresee the cost of others to some hundredths
            low, high = max(least, 0.8 * self.max_macs), min(1.0, 1.2 * self.max_macs)
        if low >= high:
            raise CalibrationError(
                f"teacache: a share of {self.max_macs or 1:.3f} of the MACs cannot be reached in "
                f"{self.profile.steps} steps; with all but the first and last step skipped it is {least:.3f}"
            )
        axes: dict[str, Axis] = {
            "macs": Between(low, high),
            "foretell": get_args(Foretell),
            "fit_to": get_args(FitTo),
            "degree": DEGREES,
        }
        return {name: axis for name, axis in axes.items() if name not in self.fixed}

    @property
    def identity(self) -> Mapping[str, Any]:
        measured = [self.profile.relative_l1(name) for name in ("input", *get_args(FitTo))]
        settings = {**asdict(self.settings), "threshold": None, "target_speedup": None}  # what is searched for
        profile = hashlib.sha256(np.stack(measured).tobytes()).hexdigest()[:16]
        return {"method": "teacache", "settings": settings, "profile": profile}

    def plain(self, max_macs: float | None) -> Mapping[str, Any]:
        settings = {"macs": 1 / USUAL_SPEEDUP if max_macs is None else max_macs, **asdict(self.settings)}
        return {name: settings[name] for name in self.axes}

    def schedule(self, parameters: Mapping[str, Any]) -> Schedule:
        settings = {name: value for name, value in parameters.items() if name != "macs"}
        return replace(self.settings, threshold=None, target_speedup=1 / parameters["macs"], **settings).calibrate(
            self.profile
        )
