"""When the output of each kind of branch comes to rest: T-GATE's question to cross-attention."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dicache.anatomy.parts import branch_of
from dicache.figures.heatmap import describe
from dicache.figures.page import SMALL, label, new_page, whole_numbers
from dicache.figures.palette import GRID, INK, branch_colour
from dicache.profiler import Profile, ProfileError

STYLES = ("-", "--", "-.", ":")  # of branches that share a colour, such as those of two streams, and one after another


def branch_convergence(profile: Profile) -> Figure:
    """Draw how much each kind of branch's output changes from step to step, and how much it still will.

    Left, |x_i - x_(i-1)| / |x_i| in the 2-norm: median over runs, guidance passes and blocks, and the band from the
    first to the third quartile. Right, what it costs to hold the last output from a step m on: |x_j - x_(m-1)| / |x_j|
    of the guided outputs of all blocks together, the mean over all steps j from m on; the mean over runs, and their
    range from the lowest to the highest.

    Raises:
        ProfileError: If there is no finished run, or only one step, or guidance is no weighted sum of the passes.

    References:
        T-GATE, arXiv 2404.02747, figure 2.
    """
    detail = f"{describe(profile)}. Changes are relative, in the 2-norm."
    if profile.steps < 2:
        raise ProfileError("this profile has one step, and nothing to compare it with; profile two steps or more")
    held = [cost_of_holding(gram) for gram in np.moveaxis(profile.arrays["body/branches"], 1, 0)]  # each (r, s - 1)
    if not np.isfinite(held).any():
        raise ProfileError("the guidance of this profile's pipeline is no weighted sum of its passes; nothing to draw")
    figure = new_page(10.0, 4.0, "How much each kind of branch still changes", detail)
    stepwise, onwards = figure.subplots(1, 2)
    for place, (branch, costs) in enumerate(zip(profile.branches, held, strict=True)):
        looks = {"color": branch_colour(branch), "linestyle": STYLES[place % len(STYLES)]}
        changes = _changes(profile, branch)  # (values, s - 1)
        _band(stepwise, np.nanpercentile(changes, (25, 50, 75), axis=0), looks, branch)
        _band(onwards, np.stack([costs.min(axis=0), costs.mean(axis=0), costs.max(axis=0)]), looks, branch)
    label(stepwise, x="step (0 = noisiest)", y="change since the step before", title="From step to step")
    label(onwards, x="first step at which it is held", y="mean change since, to the end", title="Held to the end")
    for axes in (stepwise, onwards):
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, profile.steps - 1)
        whole_numbers(axes, x=9)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
    stepwise.legend(fontsize=SMALL, labelcolor=INK, framealpha=0.9, edgecolor="none")
    return figure


def cost_of_holding(gram: np.ndarray) -> np.ndarray:
    """Return, for each step m from 1 on, the mean over j >= m of |x_j - x_(m-1)| / |x_j|.

    Args:
        gram: Products of a thing's values at all steps with one another, shape (r, s, s).

    Returns:
        Shape (r, s - 1).
    """
    sizes = np.diagonal(gram, axis1=1, axis2=2)  # (r, s)
    square = sizes[:, None, :] + sizes[:, :, None] - 2 * gram  # (r, held, in its place)
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = np.sqrt(np.maximum(square, 0.0) / sizes[:, None, :])
    return np.stack([apart[:, m - 1, m:].mean(axis=-1) for m in range(1, gram.shape[-1])], axis=-1)


def _changes(profile: Profile, branch: str) -> np.ndarray:
    """Return |x_i - x_(i-1)| / |x_i| of a branch's sites from step 1 on, (runs * passes * sites, s - 1)."""
    places = [place for place, key in enumerate(profile.anatomy.sites) if branch_of(key) == branch]
    squares = profile.arrays["sites/norm2"][..., places, 0]  # (r, c, s, sites)
    products = profile.arrays["sites/dot"][..., places, 0]
    change = squares[:, :, 1:] + squares[:, :, :-1] - 2 * products[:, :, 1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.sqrt(np.maximum(change, 0.0) / squares[:, :, 1:])
    return np.asarray(np.moveaxis(relative, 2, -1).reshape(-1, profile.steps - 1))


def _band(axes: Axes, rows: np.ndarray, looks: dict[str, str], name: str) -> None:
    """Draw low, middle and high, (3, s - 1), from step 1 on."""
    steps: Sequence[int] = range(1, rows.shape[1] + 1)
    axes.fill_between(steps, rows[0], rows[2], color=looks["color"], alpha=0.2, linewidth=0)
    axes.plot(steps, rows[1], linewidth=1.8, label=name, **looks)  # type: ignore[arg-type]
