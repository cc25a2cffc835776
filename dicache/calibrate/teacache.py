"""TeaCache: fit how much the model's output will change from how much its modulated input has."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from dicache.anatomy import Anatomy
from dicache.calibrate.methods import Axis, CalibrationError, body_plan, letters_of, method
from dicache.calibrate.rescale import Judged, fit_rescale, judge, rescaled
from dicache.calibrate.simulating import called_steps, find_limit, macs_fraction, simulate
from dicache.calibrate.spaces import AimedSpace
from dicache.calibrate.teacache_published import IN_WORDS, SIGNALS, Signal, published, published_for, quoted_in_words
from dicache.profiler import Profile
from dicache.schedules import Schedule, Target, TeaCachePolicy
from dicache.schedules.policies import Negative

FitTo = Literal["residual", "body", "output"]
Foretell = Literal["input", "steps"]
USUAL_SPEEDUP = 1.8
HIGHEST_DEGREE = 8  # beyond it a fit to noise is all that is gained
ROUNDING = 1e-3  # relative to the largest change, by which what timesteps alone make may differ between runs
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
        signal: Whose change foretells that of the output: the `modulated` input of the first block; the `time`
            embedding; or `time-projected`, the projection of it that the blocks share. The latter two see nothing but
            the timestep, so that what they decide is known beforehand: they give a plan.
        first_steps: How many steps at the start are always computed.
        last_steps: How many at the end.
        published: Name of a published polynomial, which is taken in the place of a fit.
        input_range: Where x is held, if not in the range of the fit or where the published polynomial makes sense.

    References:
        TeaCache, arXiv 2411.19108, section 3.3.
    """

    threshold: float | None = None
    target_speedup: float | None = None
    degree: int = 4
    fit_to: FitTo = "output"
    foretell: Foretell = "input"
    negative: Negative = "clamp"
    signal: Signal = "modulated"
    first_steps: int = 1
    last_steps: int = 1
    published: str | None = None
    input_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.threshold, self.target_speedup) if value is not None]
        if len(given) != 1:
            raise CalibrationError("teacache: give either a threshold (such as 0.1) or a target speed-up (such as 1.8)")
        if not np.isfinite(given[0]) or given[0] < 0:
            name = "threshold" if self.target_speedup is None else "target speed-up"
            raise CalibrationError(f"teacache: the {name} must be a number of 0 or more, found {given[0]}")
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
        if self.signal not in get_args(Signal):
            raise CalibrationError(
                f"teacache: the signal is one of {', '.join(get_args(Signal))}, found {self.signal!r}"
            )
        if self.first_steps < 1 or self.last_steps < 0:
            raise CalibrationError(
                "teacache: at least the first step is computed, and no fewer than 0 of the last; found "
                f"{self.first_steps} and {self.last_steps}"
            )
        if self.input_range is not None and not 0 <= self.input_range[0] < self.input_range[1] < np.inf:
            raise CalibrationError(
                f"teacache: the range of x is from 0 or more to something larger, found {self.input_range}"
            )
        needless = (self.published, self.input_range, None if self.signal == "modulated" else self.signal)
        if self.foretell == "steps" and any(given is not None for given in needless):
            raise CalibrationError(
                "teacache: foretold from the steps alone it needs no signal and no polynomial, nor a range of x; leave "
                "them out"
            )
        if self.published is not None and published(self.published).signal != self.signal:
            needed = published(self.published).signal
            raise CalibrationError(
                f"teacache: the polynomial of {self.published} is of the signal {needed}, and means nothing for "
                f"another; found {self.signal}"
            )

    def calibrate(self, profile: Profile) -> Schedule:
        """Return the schedule that this profile gives.

        Raises:
            CalibrationError: If the profile has too few runs, or the target speed-up cannot be reached.
        """
        x, y = changes(profile, self.signal), profile.relative_l1(self.fit_to)  # (runs, contexts, steps - 1)
        found: dict[str, Any]
        if self.published is None:
            fit = fit_rescale(x, y, degree=self.degree, negative=self.negative)
            policy, found = self._policy(fit.coefficients, fit.input_range), {"fit": fit.to_json()}
        else:
            policy, found = self._published_policy()
            found["published"]["on_profile"] = judge(policy, x, y).to_json()
        if self.foretell == "steps":  # the change itself is known, so it is taken as it is
            x = median_of_runs(y)
            policy = replace(policy, coefficients=(1.0, 0.0), input_range=(0.0, float(np.nanmax(x))))
        elif self.signal != "modulated":
            x = of_timesteps(x)
        known = {
            **profile.origin,
        }
        return self._schedule(policy, x, profile.anatomy, profile.provenance.target, known | found)

    def without_profile(
        self, model: str, anatomy: Anatomy, target: Target, steps: int, x: np.ndarray | None = None
    ) -> Schedule:
        """Return the schedule of a published polynomial, for a model that was not measured.

        Args:
            model: Its name.
            anatomy: Of it.
            target: What the schedule is bound to.
            steps: As the step clock counts them.
            x: Relative L1 change of the signal from each step to the next, shape (steps - 1,), of a signal that sees
                nothing but the timestep.

        Raises:
            CalibrationError: If no polynomial is named, the signal is needed and not given, or the target speed-up
                cannot be reached or, of the modulated input, not be foreseen.
        """
        if self.published is None:
            raise CalibrationError("teacache: a fit needs a profile; name a published polynomial, or give a profile")
        policy, found = self._published_policy()
        if self.signal != "modulated":
            if x is None:
                raise CalibrationError(
                    f"teacache: the polynomial of {self.published} is of the {IN_WORDS[self.signal]}, which takes the "
                    "model's weights to compute; give a --model with weights, or a --profile"
                )
            return self._schedule(policy, x[None, None], anatomy, target, {"model": model, **found})
        if self.target_speedup is not None:
            raise CalibrationError(
                "teacache: what a threshold saves with the modulated input is only known from a profile; give one, or "
                f"a --threshold. {quoted_in_words(found['published'])}"
            )
        measured = {"model": model, **found, "threshold": policy.threshold}
        return Schedule("teacache", self._settings(), anatomy, target, steps, policy=policy, measured=measured)

    def _policy(self, coefficients: tuple[float, ...], input_range: tuple[float, float]) -> TeaCachePolicy:
        return TeaCachePolicy(
            self.threshold or 0.0,
            coefficients,
            self.input_range or input_range,
            self.negative,
            first_steps=self.first_steps,
            last_steps=self.last_steps,
        )

    def _published_policy(self) -> tuple[TeaCachePolicy, dict[str, Any]]:
        """Return the policy, and what is known of its polynomial."""
        assert self.published is not None
        known = published(self.published)
        policy = self._policy(known.coefficients, known.held_range)
        kind = "given" if self.input_range is not None else "sensible" if known.input_range is None else "fitted"
        return policy, {"published": {**known.to_json(), "range": list(policy.input_range), "range_is": kind}}

    def _settings(self) -> dict[str, Any]:
        unused = ("degree", "foretell") if self.published is not None else ("published",)
        return {name: value for name, value in asdict(self).items() if name not in unused}

    def _schedule(
        self, policy: TeaCachePolicy, x: np.ndarray, anatomy: Anatomy, target: Target, known: Mapping[str, Any]
    ) -> Schedule:
        """Return what the policy decides on changes x, shape (runs, contexts, steps - 1): a plan, if it is known."""
        decided = self.foretell == "steps" or self.signal != "modulated"
        if self.target_speedup is not None:
            threshold = _find_threshold(policy, x, anatomy, self.target_speedup, beforehand=decided)
            policy = replace(policy, threshold=threshold)
        computed = simulate(policy, x)  # (runs, contexts, steps)
        often = computed.mean(axis=(0, 1))
        called = called_steps(x)
        share = float(often[called].mean())
        plan = body_plan({"*": letters_of(computed[0, 0])})
        return Schedule(
            method="teacache",
            settings=self._settings(),
            anatomy=anatomy,
            target=target,
            steps=computed.shape[-1],
            plan=plan if decided else None,
            policy=None if decided else policy,
            measured={
                **known,
                "threshold": policy.threshold,
                "computed_steps": round(float(often[called].sum()), 2),
                "expected_steps": letters_of(often >= 0.5),
                "macs_fraction": round(macs_fraction(policy, anatomy, share, beforehand=decided), 4),
            },
        )


def changes(profile: Profile, signal: Signal) -> np.ndarray:
    """Return the relative L1 change of a signal in a profile, shape (runs, contexts, steps - 1).

    Raises:
        CalibrationError: If the profile does not have it.
    """
    if signal != "modulated" and SIGNALS[signal] not in profile.provenance.time_signals:
        raise CalibrationError(
            f"teacache: the profile has no {IN_WORDS[signal]}: it is an older one, or the model makes none before its "
            "blocks of the timestep alone; profile again, or take --signal modulated"
        )
    return profile.relative_l1(SIGNALS[signal])


def published_fits(profile: Profile, names: Sequence[str] = (), fit_to: FitTo = "output") -> dict[str, Judged]:
    """Return how well published polynomials foretell a profile's own pairs, by name.

    Args:
        profile: With the pairs.
        names: Of the polynomials; none takes those for the model's class whose signal the profile has.
        fit_to: What is foretold.

    Raises:
        CalibrationError: If a name is not known, or the profile does not have its signal.
    """
    known = [published(name) for name in names]
    if not names:
        measured = {"input", *profile.provenance.time_signals}
        known = [each for each in published_for(profile.anatomy.model) if SIGNALS[each.signal] in measured]
    y = profile.relative_l1(fit_to)
    return {each.name: judge(each.policy(0.0), changes(profile, each.signal), y) for each in known}


def of_timesteps(x: np.ndarray) -> np.ndarray:
    """Return the one row, shape (1, 1, steps - 1), that all runs and guidance passes have of what timesteps alone make.

    Raises:
        CalibrationError: If they differ, by more than rounding.
    """
    row = median_of_runs(x)
    if np.nanmax(np.abs(x - row)) > ROUNDING * np.nanmax(row):
        raise CalibrationError(
            "teacache: the time embedding changes differently from run to run, so it depends on more than the "
            "timestep; take --signal modulated"
        )
    return row


def median_of_runs(x: np.ndarray) -> np.ndarray:
    """Return the median over runs and guidance passes, shape (1, 1, steps - 1), NaN at steps of another model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        return np.asarray(np.nanmedian(x, axis=(0, 1), keepdims=True))


def _find_threshold(
    policy: TeaCachePolicy, x: np.ndarray, anatomy: Anatomy, target_speedup: float, *, beforehand: bool
) -> float:
    """Return the smallest threshold with which the simulated rule reaches a speed-up in multiply-accumulates."""
    foretold = rescaled(policy, np.nan_to_num(x, nan=0.0))
    highest = float(np.maximum(foretold, 0).sum(axis=-1).max()) * 1.001 + 1e-9  # no sum of changes reaches it
    called = called_steps(x)

    def speedup(threshold: float) -> float:
        tried = replace(policy, threshold=threshold)
        computed = float(simulate(tried, x)[..., called].mean())
        return 1 / macs_fraction(tried, anatomy, computed, beforehand=beforehand)

    return find_limit(policy.name, x.shape[-1] + 1, speedup, highest, target_speedup)


@dataclass(frozen=True)
class TeaCacheSpace(AimedSpace):
    """How much to skip, and what foretells when."""

    usual_speedup = USUAL_SPEEDUP

    def free(self) -> Mapping[str, Axis]:
        axes: dict[str, Axis] = {"macs": self.shares(), "fit_to": get_args(FitTo), "degree": DEGREES}
        return axes if self.settings.signal != "modulated" else {**axes, "foretell": get_args(Foretell)}

    @property
    def least(self) -> float:
        always = self.settings.first_steps + self.settings.last_steps
        policy = TeaCachePolicy(0.0, (1.0, 0.0), (0.0, 1.0), negative=self.settings.negative)
        return macs_fraction(policy, self.profile.anatomy, always / self.profile.steps)  # all others skipped
