"""TeaCache: fit how much the model's output will change from how much its modulated input has."""

from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import numpy as np

from dicache.calibrate.methods import CalibrationError, method
from dicache.profiler import Profile
from dicache.schedules import Plan, Rule, Schedule, TeaCachePolicy

FitTo = Literal["residual", "body", "output"]
Foretell = Literal["input", "steps"]
FOLDS = 4


@dataclass(frozen=True)
class Rescale:
    """The polynomial that foretells the change of the output, and how well it does.

    Attributes:
        coefficients: Highest power first.
        input_range: Smallest and largest x it was fitted on.
        pairs: How many pairs of x and y.
        held_out_r2: Share of the variance of y explained on runs that the fit did not see.
        held_out_rmse: Root mean square error of y on them.
        per_step_r2: What the median y of each step, over the other runs, explains of the same variance.
        negative_share: Share of the fitted range in which the polynomial is negative, and is taken for zero.
        falling_share: Share of it in which a larger change of the input foretells a smaller one of the output.
    """

    coefficients: tuple[float, ...]
    input_range: tuple[float, float]
    pairs: int
    held_out_r2: float
    held_out_rmse: float
    per_step_r2: float
    negative_share: float
    falling_share: float


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

    References:
        TeaCache, arXiv 2411.19108, section 3.3.
    """

    threshold: float | None = None
    target_speedup: float | None = None
    degree: int = 4
    fit_to: FitTo = "output"
    foretell: Foretell = "input"

    def __post_init__(self) -> None:
        given = [value for value in (self.threshold, self.target_speedup) if value is not None]
        if len(given) != 1:
            raise CalibrationError("teacache: give either a threshold (such as 0.1) or a target speed-up (such as 1.8)")
        if not np.isfinite(given[0]) or given[0] < 0:
            raise CalibrationError(f"teacache: the threshold must be a number of 0 or more, found {given[0]}")
        if self.target_speedup is not None and self.target_speedup < 1:
            raise CalibrationError(f"teacache: the target speed-up must be 1 or more, found {self.target_speedup}")
        if self.degree < 1:
            raise CalibrationError(f"teacache: the degree must be 1 or more, found {self.degree}")
        if self.fit_to not in get_args(FitTo):
            raise CalibrationError(
                f"teacache: the fit is to one of {', '.join(get_args(FitTo))}, found {self.fit_to!r}"
            )

        if self.foretell not in get_args(Foretell):
            raise CalibrationError(f"teacache: it is foretold from input or steps, found {self.foretell!r}")

    def calibrate(self, profile: Profile) -> Schedule:
        """Return the schedule that this profile gives.

        Raises:
            CalibrationError: If the profile has too few runs, or the target speed-up cannot be reached.
        """
        x, y = profile.relative_l1("input"), profile.relative_l1(self.fit_to)  # (runs, contexts, steps - 1)
        rescale = fit_rescale(x, y, degree=self.degree)
        coefficients, input_range, signal = rescale.coefficients, rescale.input_range, x
        if self.foretell == "steps":  # the change itself is known, so it is taken as it is
            signal = np.nanmedian(y, axis=(0, 1), keepdims=True)
            coefficients, input_range = (1.0, 0.0), (0.0, float(signal.max()))
        policy = TeaCachePolicy(self.threshold or 0.0, coefficients, input_range)
        if self.target_speedup is not None:
            policy = replace(policy, threshold=find_threshold(policy, signal, profile, self.target_speedup))
        computed = simulate(policy, signal)  # (runs, contexts, steps)
        often = computed.mean(axis=(0, 1))
        return Schedule(
            method="teacache",
            settings=asdict(self),
            anatomy=profile.anatomy,
            target=profile.provenance.target,
            steps=profile.steps,
            plan=_body_plan(computed[0, 0]) if self.foretell == "steps" else None,
            policy=None if self.foretell == "steps" else policy,
            measured={
                "model": profile.provenance.model,
                "runs": sum(run.ok for run in profile.runs),
                "guidance": profile.provenance.settings.get("guidance"),
                "fit": {
                    "pairs": rescale.pairs,
                    "held_out_r2": round(rescale.held_out_r2, 4),
                    "held_out_rmse": round(rescale.held_out_rmse, 5),
                    "per_step_r2": round(rescale.per_step_r2, 4),
                    "input_range": list(rescale.input_range),
                    "negative_share": round(rescale.negative_share, 3),
                    "falling_share": round(rescale.falling_share, 3),
                },
                "threshold": policy.threshold,
                "computed_steps": round(float(often.sum()), 2),
                "expected_steps": "".join("C" if share >= 0.5 else "." for share in often),
                "macs_fraction": round(_macs_fraction(profile, float(often.mean())), 4),
            },
        )


def fit_rescale(x: np.ndarray, y: np.ndarray, *, degree: int = 4) -> Rescale:
    """Fit the polynomial that foretells how much the output changes from how much the input did.

    All pairs of all runs are fitted at once. Its quality is measured on runs that were left out: the runs are dealt
    into four parts, and each part is foretold by a fit to the others.

    Args:
        x: Relative L1 change of the modulated input since the step before, unitless, shape (runs, contexts, steps - 1).
        y: The same of the output.
        degree: Degree of the polynomial.

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
    folds = min(FOLDS, runs)
    foretold, by_step = np.full_like(y, np.nan), np.full_like(y, np.nan)
    for fold in range(folds):
        left_out = np.arange(runs) % folds == fold
        seen = known & ~left_out[:, None, None]
        part = _polynomial(x[seen], y[seen], degree)
        foretold[left_out] = np.maximum(np.polyval(part, np.clip(x[left_out], x[seen].min(), x[seen].max())), 0)
        by_step[left_out] = np.nanmedian(np.where(known, y, np.nan)[~left_out], axis=0)
    error = foretold[known] - y[known]
    variation = ((y[known] - y[known].mean()) ** 2).sum()
    coefficients = _polynomial(x[known], y[known], degree)
    grid = np.polyval(coefficients, np.linspace(x[known].min(), x[known].max(), 1000))
    return Rescale(
        coefficients=tuple(float(c) for c in coefficients),
        input_range=(float(x[known].min()), float(x[known].max())),
        pairs=pairs,
        held_out_r2=float(1 - (error**2).sum() / variation),
        held_out_rmse=float(np.sqrt((error**2).mean())),
        per_step_r2=float(1 - np.nansum((by_step[known] - y[known]) ** 2) / variation),
        negative_share=float((grid < 0).mean()),
        falling_share=float((np.diff(grid) < 0).mean()),
    )


def _polynomial(x: np.ndarray, y: np.ndarray, degree: int) -> np.ndarray:
    """Return the least-squares polynomial, highest power first; fitted on x scaled to [-1, 1], where it is stable."""
    coefficients: np.ndarray = np.polynomial.Polynomial.fit(x, y, degree).convert().coef[::-1]
    return np.pad(coefficients, (degree + 1 - len(coefficients), 0))


def _body_plan(computed: np.ndarray) -> Plan:
    """Return the plan that skips the body where it is not computed, boolean, shape (steps,)."""
    letters = "".join("C" if c else "." for c in computed)
    return Plan(len(letters), (Rule("skip", letters),) if "." in letters else ())


def simulate(policy: TeaCachePolicy, x: np.ndarray) -> np.ndarray:
    """Return which steps the policy would compute on recorded signals, boolean, shape (runs, contexts, steps).

    Args:
        policy: The rule.
        x: Relative L1 change of the modulated input, shape (runs, contexts, steps - 1), from step 1 on.
    """
    runs, contexts, changes = x.shape
    steps = changes + 1
    computed = np.zeros((runs, contexts, steps), dtype=bool)
    for run in range(runs):
        for context in range(contexts):
            accumulated = 0.0
            for step in range(steps):
                change = float(x[run, context, step - 1]) if step else None
                computed[run, context, step], accumulated = policy.decide(step, steps, change, accumulated)
    return computed


def find_threshold(policy: TeaCachePolicy, x: np.ndarray, profile: Profile, target_speedup: float) -> float:
    """Return the smallest threshold with which the simulated rule reaches a speed-up in multiply-accumulates.

    Raises:
        CalibrationError: If no threshold does: the first and last steps, and what is outside the blocks, always run.
    """
    foretold = np.vectorize(policy.rescale)(np.nan_to_num(x, nan=0.0))
    highest = float(foretold.sum(axis=-1).max()) * 1.001 + 1e-9  # no sum of changes reaches it

    def speedup(threshold: float) -> float:
        return 1 / _macs_fraction(profile, float(simulate(replace(policy, threshold=threshold), x).mean()))

    if speedup(highest) < target_speedup:
        raise CalibrationError(
            f"teacache: a speed-up of {target_speedup:g} cannot be reached in {profile.steps} steps; "
            f"with all but the first and last step skipped it is {speedup(highest):.2f}"
        )
    low, high = 0.0, highest
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if speedup(middle) >= target_speedup else (middle, high)
    return float(high)


def _macs_fraction(profile: Profile, computed: float) -> float:
    """Return the share of all multiply-accumulates when this share of the steps computes the body."""
    anatomy = profile.anatomy
    return 1 - (1 - computed) * anatomy.macs_after_decision / anatomy.macs
