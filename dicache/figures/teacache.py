"""TeaCache's fit: what a change of the modulated input foretells about the output."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from dicache.calibrate.teacache import changes
from dicache.calibrate.teacache_published import IN_WORDS, Published
from dicache.figures.heatmap import describe
from dicache.figures.page import SMALL, label, label_bar, new_page, whole_numbers
from dicache.figures.palette import BLUE, COLOURS, GRID, INK, ORANGE, PAPER
from dicache.profiler import Profile, ProfileError
from dicache.schedules import Schedule, TeaCachePolicy

OUTPUTS = {"residual": "body's residual", "body": "body's output", "output": "model's output"}
VECTOR_POINTS = 2000  # above it the points of an svg or pdf are one picture inside it


def teacache_fit(
    profile: Profile, schedule: Schedule | None = None, output: str = "output", published: Published | None = None
) -> Figure:
    """Draw how much an output changes from step to step against how much the modulated input does.

    Left, a point a step of each run and guidance pass, and the schedule's polynomial over the range that it was fitted
    on. Right, the same two changes along the steps: median, and the band from the first to the third quartile.

    Args:
        profile: Where the points are from.
        schedule: A schedule of TeaCache, or None to draw the points alone.
        output: Which output: `residual`, `body` or `output`, the model's.
        published: A published polynomial to draw in the place of a schedule's, over the range in which x is held. The
            points are those of its signal.

    Raises:
        ProfileError: If the output was not measured, there is no finished run, or only one step.
        ValueError: If the schedule has no polynomial, or another output is asked for.
        CalibrationError: If the profile does not have the published polynomial's signal.

    References:
        TeaCache, arXiv 2411.19108, section 3.3.
    """
    if output not in OUTPUTS:
        raise ValueError(f"the input's change foretells that of an output: {', '.join(OUTPUTS)}; found {output!r}")
    policy = published.policy(0.0) if published else None if schedule is None else _policy(schedule)
    signal = published.signal if published else "modulated"
    name = IN_WORDS[signal]
    detail = f"{describe(profile)}. Relative L1 change: mean |difference to the step before| / mean |step before|."
    x, y = changes(profile, signal), profile.relative_l1(output)  # (r, c, s - 1)
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        raise ProfileError("this profile has no change of input and output to draw: it takes a step and the one before")
    title = f"What the {name}'s change foretells about the {OUTPUTS[output]}"
    figure = new_page(10.0, 4.1, title, detail)
    scatter, along = figure.subplots(1, 2, width_ratios=(1.15, 1))
    steps = np.broadcast_to(np.arange(1, x.shape[2] + 1), x.shape)
    points = scatter.scatter(x[known], y[known], c=steps[known], s=18, cmap=COLOURS, alpha=0.8, linewidths=0, zorder=2)
    points.set_rasterized(len(x[known]) > VECTOR_POINTS)
    label(scatter, x=f"relative L1 change of the {name}", y=f"relative L1 change of the {OUTPUTS[output]}")
    bar = figure.colorbar(points, ax=scatter, aspect=26, pad=0.02)
    label_bar(bar, "step (0 = noisiest)")
    whole_numbers(bar.ax, y=9)
    if policy is not None:
        _draw_polynomial(scatter, policy, published.name if published else None)
    _draw_along(along, {name: (x, BLUE, "-"), OUTPUTS[output]: (y, ORANGE, "--")})
    return figure


def _policy(schedule: Schedule) -> TeaCachePolicy:
    if not isinstance(schedule.policy, TeaCachePolicy):
        raise ValueError(f"a schedule of {schedule.method} has no polynomial; pass one of teacache, or None")
    return schedule.policy


def _draw_polynomial(axes: Axes, policy: TeaCachePolicy, published: str | None = None) -> None:
    """Draw what the policy foretells, and shade what lies outside the range that x is held in."""
    low, high = policy.input_range
    left, right = axes.get_xlim()
    # A published one may be held far beyond the points, where it says nothing of them.
    left, right = min(left, low), max(right, low if published else high)
    high = min(high, right)
    inside = np.linspace(low, high, 200)
    name = f"published for {published}" if published else f"polynomial of degree {len(policy.coefficients) - 1}"
    axes.plot(inside, [policy.rescale(x) for x in inside], color=INK, linewidth=2, zorder=3, label=name)
    outside = "outside its range" if policy.negative == "reference" else "outside its range: input clamped"
    for start, stop in ((left, low), (high, right)):
        beyond = np.linspace(start, stop, 50)
        axes.plot(beyond, [policy.rescale(x) for x in beyond], ":", color=INK, linewidth=2, zorder=3)
        axes.axvspan(start, stop, facecolor=PAPER, linewidth=0, zorder=0, label=outside)
        outside = ""  # one line in the legend
    axes.set_xlim(left, right)
    axes.legend(loc="upper left", fontsize=SMALL, labelcolor=INK, framealpha=0.9, edgecolor="none")


def _draw_along(axes: Axes, changes: dict[str, tuple[np.ndarray, str, str]]) -> None:
    """Draw each change (r, c, s - 1) against the step: its name, colour and line."""
    for name, (change, color, style) in changes.items():
        by_step = [step[np.isfinite(step)] for step in np.moveaxis(change, 2, 0)]
        quartiles = [np.percentile(step, (25, 50, 75)) if len(step) else np.full(3, np.nan) for step in by_step]
        first, median, third = np.transpose(quartiles)  # each (s - 1,)
        steps = np.arange(1, len(median) + 1)
        axes.fill_between(steps, first, third, color=color, alpha=0.25, linewidth=0)
        axes.plot(steps, median, style, color=color, linewidth=1.8, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    label(axes, x="step (0 = noisiest)", y="relative L1 change (log scale)")
    whole_numbers(axes, x=9)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.legend(
        title="median and quartiles",
        title_fontsize=SMALL,
        fontsize=SMALL,
        labelcolor=INK,
        framealpha=0.9,
        edgecolor="none",
        alignment="left",
    )
