"""TeaCache: whether the change of its signal foretells that of the output, and what the fit leaves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dicache.calibrate import CalibrationError
from dicache.calibrate.rescale import HeldOut, Rescale, fit_rescale, held_out, judge, rescaled
from dicache.calibrate.teacache import changes, published_fits
from dicache.calibrate.teacache_published import IN_WORDS
from dicache.figures.report.markup import Markup, element, join
from dicache.figures.report.plots import (
    Scale,
    Section,
    figure,
    folded,
    key,
    legend,
    path,
    picture,
    plot,
    section,
    table,
)
from dicache.figures.teacache import OUTPUTS
from dicache.profiler import Profile
from dicache.schedules import Schedule, TeaCachePolicy

MOST_POINTS = 1000  # drawn and listed; the numbers are of all
HEIGHT = 260  # pixels
CURVE = 160  # points along a polynomial


@dataclass(frozen=True)
class _Pairs:
    """The changes of a signal and of an output that are drawn, each (n,), and where they were measured."""

    x: np.ndarray
    y: np.ndarray
    foretold: np.ndarray
    run: np.ndarray
    step: np.ndarray

    @property
    def residual(self) -> np.ndarray:
        return np.asarray(self.y - self.foretold)


def teacache(profile: Profile, schedules: Sequence[tuple[str, Schedule]]) -> Section:
    """Return the fit of TeaCache's polynomial, what it leaves on runs it did not see, and the changes along the steps.

    It is fitted as the first schedule of TeaCache was, else as `dicache calibrate teacache` does it by itself.
    """
    own = [(name, each) for name, each in schedules if isinstance(each.policy, TeaCachePolicy)]
    settings: dict[str, Any] = dict(own[0][1].settings) if own else {}
    signal, output = settings.get("signal", "modulated"), settings.get("fit_to", "output")
    options = {"degree": settings.get("degree", 4), "negative": settings.get("negative", "clamp")}
    x, y = changes(profile, signal), profile.relative_l1(output)  # (r, c, s - 1)
    names = IN_WORDS[signal], OUTPUTS[output]
    told = element(
        "p",
        f"TeaCache skips a step while the changes that the {names[0]} foretells are small. It works where the points "
        "lie along the line, and where what the line leaves is small beside what it foretells.",
    )
    parts = []
    try:
        fit, left_out = fit_rescale(x, y, **options), held_out(x, y, **options)
    except CalibrationError as error:
        parts.append(element("p", f"There is no fit: {error}.", class_="missing"))
    else:
        policy = TeaCachePolicy(0.0, fit.coefficients, fit.input_range, negative=options["negative"])
        parts += [_fit(x, y, left_out, policy, own, names), _quality(profile, x, y, fit, own, output)]
    parts.append(_along(x, y, names))
    return section("teacache", "Whether the input foretells the output", told, *parts)


def _fit(
    x: np.ndarray,
    y: np.ndarray,
    left_out: HeldOut,
    policy: TeaCachePolicy,
    schedules: Sequence[tuple[str, Schedule]],
    names: tuple[str, str],
) -> Markup:
    pairs, runs = _drawn(x, y, left_out.foretold)
    across, up = Scale.of(pairs.x), Scale.of(pairs.y, zero=True)
    lines = [("fitted here", policy, "fit")]
    for name, schedule in schedules:
        of = schedule.policy
        assert isinstance(of, TeaCachePolicy)
        alike = len(of.coefficients) == len(policy.coefficients)
        if not (alike and np.allclose(of.coefficients, policy.coefficients)):
            lines.append((name, of, "other"))
    at = np.linspace(across.low, across.high, CURVE)
    curves = [path(across(at), up(_within(up, rescaled(of, at))), class_=f"line {look}") for _, of, look in lines]
    edge = "".join(f"M{float(across(end)):.4g} 0V1" for end in policy.input_range)
    shapes = [*_dots(across(pairs.x), up(pairs.y), pairs.step), element("path", d=edge, class_="edge"), *curves]
    x_axis = f"relative L1 change of the {names[0]}", across.ticks()
    points = plot(
        picture(*shapes),
        name=f"Change of the {names[1]} against that of the {names[0]}",
        table="pairs",
        x=x_axis,
        y=(f"of the {names[1]}", _from_above(up)),
        height=HEIGHT,
        marks=list(zip(across(pairs.x), 1 - up(pairs.y), strict=True)),
    )
    beside = Scale.of(pairs.residual, zero=True)
    zero = path(np.array([0.0, 1.0]), np.repeat(beside(0.0), 2), class_="line fit")
    rest = plot(
        picture(*_dots(across(pairs.x), beside(pairs.residual), pairs.step), zero),
        name="What the polynomial leaves, on runs that it was not fitted to",
        table="pairs",
        x=x_axis,
        y=("measured - foretold", _from_above(beside)),
        height=HEIGHT,
        marks=list(zip(across(pairs.x), 1 - beside(pairs.residual), strict=True)),
    )
    values = table(
        ["point", "run", "step", "change of the input", "of the output", "foretold, held out", "left"],
        [
            (str(i), (str(r), str(s), f"{a:.4g}", f"{b:.4g}", f"{c:.4g}", f"{b - c:.3g}"))
            for i, (r, s, a, b, c) in enumerate(
                zip(pairs.run, pairs.step, pairs.x, pairs.y, pairs.foretold, strict=True)
            )
        ],
        id_="pairs",
        caption="Pairs of changes",
        row="point",
    )
    some = "" if runs == len(x) else f" Points of {runs} of {len(x)} runs are drawn; the numbers are of all."
    keys = legend(
        (key("early"), "first steps"),
        (key("late"), "last steps"),
        (key("line-fit"), f"polynomial of degree {len(policy.coefficients) - 1}"),
        *((key("line-other"), name) for name, _, look in lines if look == "other"),
    )
    return join(
        keys,
        element(
            "div",
            figure(f"Change of the {names[1]} against that of the {names[0]}", points, note=_range(policy) + some),
            figure("What the polynomial leaves", rest, note="Each run foretold by a fit to the other runs."),
            class_="maps",
        ),
        folded("Values as a table", values),
    )


def _range(policy: TeaCachePolicy) -> str:
    outside = "taken as it is" if policy.negative == "reference" else "held"
    return f"Thin lines: the range that was fitted, outside which the input is {outside}."


def _drawn(x: np.ndarray, y: np.ndarray, foretold: np.ndarray) -> tuple[_Pairs, int]:
    """Return the pairs of as many runs as are drawn, and how many these are."""
    known = np.isfinite(x) & np.isfinite(y) & np.isfinite(foretold)
    runs = int(max(1, (np.cumsum(known.sum(axis=(1, 2))) <= MOST_POINTS).sum()))
    run, _, step = np.nonzero(known[:runs])
    drawn = known[:runs]
    return _Pairs(x[:runs][drawn], y[:runs][drawn], foretold[:runs][drawn], run, step + 1), runs


def _quality(
    profile: Profile,
    x: np.ndarray,
    y: np.ndarray,
    fit: Rescale,
    schedules: Sequence[tuple[str, Schedule]],
    output: Any,
) -> Markup:
    """Return how well the output's change is foretold: by the fit, by the step alone, and by polynomials as given."""
    rows = [
        ("polynomial, on held-out runs", _judged(fit.held_out_r2, fit.held_out_rmse, fit.held_out_outside_share)),
        ("median of each step, on held-out runs", _judged(fit.per_step_r2, fit.per_step_rmse, None)),
    ]
    for name, schedule in schedules:
        assert isinstance(schedule.policy, TeaCachePolicy)
        judged = judge(schedule.policy, x, y)
        rows.append((f"{name}, as it is", _judged(judged.r2, judged.rmse, judged.outside_share)))
    for name, judged in published_fits(profile, fit_to=output).items():
        rows.append((f"published for {name}", _judged(judged.r2, judged.rmse, judged.outside_share)))
    return table(
        ["foretold by", "R2", "RMSE", "inputs outside its range"], rows, caption="How well the change is foretold"
    )


def _judged(r2: float, rmse: float, outside: float | None) -> tuple[str, str, str]:
    return f"{r2:.3f}", f"{rmse:.3g}", "-" if outside is None else f"{outside:.1%}"


def _along(x: np.ndarray, y: np.ndarray, names: tuple[str, str]) -> Markup:
    """Return both changes against the step: the median, and the band from the first to the third quartile."""
    steps = np.arange(1, x.shape[2] + 1)
    quartiles = [_quartiles(values) for values in (x, y)]  # each (3, s - 1)
    scale = Scale.of(np.concatenate(quartiles), log=True)
    across = Scale(0, len(steps) + 1)
    shapes = []
    for (low, middle, high), look in zip(quartiles, ("signal", "outcome"), strict=True):
        known = np.isfinite(low)
        around = np.concatenate([steps[known], steps[known][::-1]])
        band = path(across(around), scale(np.concatenate([low[known], high[known][::-1]])), class_=f"band {look}")
        shapes += [band, path(across(steps), scale(middle), class_=f"line {look}")]
    keys = legend((key("line-signal"), names[0]), (key("line-outcome"), names[1]))
    told = [
        (str(step), [f"{q:.3g}" for each in quartiles for q in each[[1, 0, 2], step - 1]]) for step in steps.tolist()
    ]
    heads = [f"{name}: {what}" for name in names for what in ("median", "first quartile", "third quartile")]
    return figure(
        "Both changes along the steps",
        keys,
        plot(
            picture(*shapes),
            name=f"Relative change of the {names[0]} and of the {names[1]} along the steps",
            table="along",
            x=("step (0 = noisiest)", across.ticks(10)),
            y=("relative L1 change (log scale)", _from_above(scale)),
            height=HEIGHT,
            marks=[(float(across(step)), 1 - float(scale(quartiles[1][1, step - 1]))) for step in steps],
            nearest="x",
        ),
        folded(
            "Values as a table",
            table(["step", *heads], told, id_="along", caption="Relative L1 change from step to step", row="step"),
        ),
        note="Median and quartiles over runs and guidance passes.",
        class_="wide",
    )


def _quartiles(change: np.ndarray) -> np.ndarray:
    """Return the first quartile, the median and the third one of each step, (3, s - 1); NaN where nothing is known."""
    by_step = [step[np.isfinite(step)] for step in np.moveaxis(change, 2, 0)]
    return np.transpose([np.percentile(s, (25, 50, 75)) if len(s) else np.full(3, np.nan) for s in by_step])


def _dots(across: np.ndarray, up: np.ndarray, step: np.ndarray) -> list[Markup]:
    """Return a dot a point, in colours from the first to the last step; each is a line without length."""
    last = max(int(step.max()), 1)
    return [
        element(
            "path",
            d="".join(f"M{a:.4g} {1 - b:.4g}h0" for a, b in zip(across[step == s], up[step == s], strict=True)),
            class_="dots",
            style=f"--share:{100 * s / last:.0f}%",
        )
        for s in np.unique(step)
    ]


def _within(scale: Scale, values: np.ndarray) -> np.ndarray:
    """Return the values, NaN where they lie outside a scale."""
    return np.where((values >= scale.low) & (values <= scale.high), values, np.nan)


def _from_above(scale: Scale) -> list[tuple[float, str]]:
    return [(1 - place, text) for place, text in scale.ticks()]
