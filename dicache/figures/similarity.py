"""How much the output of attention and of the MLP is like that of earlier steps."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dicache.figures.heatmap import colour_bar, colour_scale, describe, draw, mean_over_runs
from dicache.figures.page import SMALL, label, new_page, whole_numbers
from dicache.figures.palette import GRID, INK, LINES
from dicache.profiler import Profile

MOST_COLUMNS = 3
LINES_HEIGHT = 1.75  # inches


def similarity_maps(profile: Profile, lag: int = 1) -> Figure:
    """Draw, for each kind of branch, the cosine of its output with that of `lag` steps before.

    A map a branch, step 0 at the left and block 0 at the top, all on one colour scale. If the profile has several
    lags, the mean over the blocks is drawn below each map, a line a lag. All are means over runs and guidance passes.

    Raises:
        ProfileError: If there is no finished run, or the lag was not measured or is not shorter than the run.

    References:
        FORA, arXiv 2407.01425, figure 2.
    """
    before = "the step before" if lag == 1 else f"{lag} steps before"
    measured = describe(profile, of="mean of ")
    tables = [mean_over_runs(profile.similarity(branch, lag)) for branch in profile.branches]  # each (b, s)
    scale = colour_scale(tables)
    columns = min(len(tables), MOST_COLUMNS)
    bands = -(-len(tables) // columns)  # rows of maps
    heights = [min(max(0.9 + 0.18 * len(tables[0]), 1.9), 4.2)]
    heights += [LINES_HEIGHT] if profile.provenance.lags > 1 else []
    figure = new_page(
        2.9 * columns + 1.4,
        bands * sum(heights) + 0.5,
        f"How much each branch's output is like that of {before}",
        f"{measured}. {scale}",
    )
    grid = figure.add_gridspec(bands * len(heights), columns, height_ratios=heights * bands)
    maps: list[Axes] = []
    for place, (branch, table) in enumerate(zip(profile.branches, tables, strict=True)):
        row, column = divmod(place, columns)
        maps.append(figure.add_subplot(grid[row * len(heights), column]))
        image = draw(maps[-1], table, scale, title=branch)
        whole_numbers(maps[-1], x=6, y=min(len(table), 9))
    if len(heights) > 1:
        places = [grid[place // columns * 2 + 1, place % columns] for place in range(len(maps))]
        first = figure.add_subplot(places[0])
        _draw_lags(profile, [first, *(figure.add_subplot(place, sharey=first) for place in places[1:])])
        handles, names = first.get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower center", ncols=4, fontsize=SMALL, labelcolor=INK, frameon=False
        )
        for axes in maps:
            axes.set_xlabel("")
    for axes in figure.axes:
        if axes.get_subplotspec().colspan.start:  # type: ignore[union-attr] # all are on the grid
            axes.set_ylabel("")
    colour_bar(figure, image, maps, scale, f"cosine with {before}")
    return figure


def _draw_lags(profile: Profile, panels: Sequence[Axes]) -> None:
    """Draw the mean over the blocks against the step, a line a lag, in one panel a branch."""
    for axes, branch in zip(panels, profile.branches, strict=True):
        for lag in range(1, min(profile.provenance.lags, profile.steps - 1) + 1):
            color, style = LINES[(lag - 1) % len(LINES)]
            mean = np.ma.masked_invalid(profile.similarity(branch, lag)).mean(axis=(0, 1, 3))  # (s,)
            axes.plot(mean, style, color=color, linewidth=1.8, label=f"{lag} step{'s' * (lag > 1)} before")
        label(axes, x="step (0 = noisiest)", y="mean cosine")
        axes.set_xlim(-0.5, profile.steps - 0.5)  # as the map above
        whole_numbers(axes, x=6)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
