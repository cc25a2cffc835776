"""What all runs have in common of how a branch changes: the trend by which EOC corrects."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dicache.figures.heatmap import Scale, Table, colour_bar, describe, draw
from dicache.figures.page import SMALL, label, new_page, whole_numbers
from dicache.figures.palette import GRID, INK, branch_colour
from dicache.profiler import Profile, ProfileError

Prior = Callable[[str], tuple[tuple[int, ...], np.ndarray]]


def trend_maps(profile: Profile, prior: Prior) -> Figure:
    """Draw how much of each branch's change since the step before is the same in all runs.

    The trend is the difference of the mean outputs of two steps; its share is |trend|^2 over the mean of the runs'
    |x_i - x_(i-1)|^2, less what the mean of so few runs holds of chance. Step 0 at the left and block 0 at the top; a
    share of 1 could be corrected without looking at the run, and of a share of 0 EOC can correct nothing. Below, over
    all blocks, how large the change is, and how much of it is left when the trend is added.

    Args:
        profile: With two runs or more.
        prior: Given a site, the steps that there are mean outputs of, and those, (parts of all guidance passes, steps,
            tokens, channels); `load_prior` of the profile's file.

    Raises:
        ProfileError: If there are not two finished runs, or no mean outputs of all steps.

    References:
        EOC, arXiv 2501.19243, section 3.
    """
    detail = describe(profile)
    runs = len(profile.delta_cosine)
    if runs < 2:
        raise ProfileError("this profile has one run, which has nothing in common with another; profile two or more")
    scale = Scale(low=0.0, lowest=0.0)
    branches = profile.branches
    figure = new_page(
        2.9 * len(branches) + 1.4,
        0.18 * len(profile.anatomy.blocks) + 3.5,
        "How much of a branch's change is the same in every run",
        f"{detail}. Change since the step before, squared; what few runs share by chance is taken off. {scale}",
    )
    grid = figure.add_gridspec(2, len(branches), height_ratios=(0.18 * len(profile.anatomy.blocks) + 0.9, 1.75))
    maps: list[Axes] = []
    lines: list[Axes] = []
    for column, branch in enumerate(branches):
        shares, whole, left = shared_change(profile, prior, branch)
        maps.append(figure.add_subplot(grid[0, column]))
        image = draw(maps[-1], shares, scale, title=branch)
        lines.append(figure.add_subplot(grid[1, column], sharey=lines[0] if lines else None))
        colour, steps = branch_colour(branch), range(profile.steps)
        lines[-1].plot(steps, whole, color=colour, linewidth=1.8)
        lines[-1].plot(steps, left, ":", color=colour, linewidth=1.8)
        lines[-1].fill_between(steps, left, whole, color=colour, alpha=0.15, linewidth=0)
        label(lines[-1], x="step (0 = noisiest)", y="" if column else "relative change")
        lines[-1].set_xlim(-0.5, profile.steps - 0.5)  # as the map above
        lines[-1].grid(axis="y", color=GRID, linewidth=0.6)
        maps[-1].set_xlabel("")
        if column:
            maps[-1].set_ylabel("")
        for axes in (maps[-1], lines[-1]):
            whole_numbers(axes, x=6)
        whole_numbers(maps[-1], y=9)
    lines[0].set_ylim(bottom=0)
    handles = [
        Line2D([], [], color=INK, linestyle="-", label="change since the step before"),
        Line2D([], [], color=INK, linestyle=":", label="what is left of it when the trend is added"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=SMALL, labelcolor=INK, frameon=False)
    colour_bar(figure, image, maps, scale, "share that all runs have in common")
    return figure


def shared_change(profile: Profile, prior: Prior, branch: str) -> tuple[Table, np.ndarray, np.ndarray]:
    """Return the share of a branch's change since the step before that all runs have in common.

    Args:
        profile: Of r runs.
        prior: As `trend_maps` takes it.
        branch: Such as `mlp`.

    Returns:
        The share, shape (blocks, steps), masked where there is nothing to compare; over all blocks, the change relative
        to the output in the 2-norm, (steps,); and what is left of it when the trend is added.

    Raises:
        ProfileError: If a mean output is missing.
    """
    runs, steps = len(profile.delta_cosine), profile.steps
    table = np.full((len(profile.anatomy.blocks), steps), np.nan)
    sums = np.zeros((3, steps))  # |x_i|^2, |x_i - x_(i-1)|^2, and what of the latter is the trend
    for place, key in enumerate(profile.anatomy.sites):
        block, _, kind = key.partition(".")
        if kind != branch:
            continue
        squares = profile.arrays["sites/norm2"][..., place, 0].sum(axis=1).mean(axis=0)  # (s,)
        products = profile.arrays["sites/dot"][..., place, 0].sum(axis=1).mean(axis=0)
        change = squares[1:] + squares[:-1] - 2 * products[1:]
        known, means = prior(key)
        if known != tuple(range(steps)):
            raise ProfileError(
                f"there are mean outputs of {key} at {len(known)} of {steps} steps; profile with --priors"
            )
        trend = (np.diff(means.astype(np.float64), axis=1) ** 2).sum(axis=(0, 2, 3))
        # Of what differs from run to run, the mean of r runs keeps 1/r of the square.
        trend = np.clip((runs * trend - change) / (runs - 1), 0.0, change)
        with np.errstate(invalid="ignore", divide="ignore"):
            table[int(block), 1:] = trend / change
        sums += [squares, np.append(np.nan, change), np.append(np.nan, trend)]
    relative = np.sqrt(sums[1] / sums[0]), np.sqrt((sums[1] - sums[2]) / sums[0])
    return np.ma.masked_invalid(table), *relative
