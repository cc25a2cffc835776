"""Heat maps over steps and blocks, all drawn alike: a block a row, a step a column, hatched where nothing is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from dicache.figures.page import label, label_bar, show_cells
from dicache.figures.palette import COLOURS
from dicache.profiler import Profile, ProfileError

Table = np.ma.MaskedArray[Any, np.dtype[np.float64]]

LOW_PERCENTILE = 2  # below it a few cells would take the colours from all others
WORTH_CLIPPING = 1.25  # the range is cut only if that widens the colours of what remains by this factor
NARROWEST = 1e-4  # of a colour range; below it there is only rounding


@dataclass(frozen=True)
class Scale:
    """What the colours mean: from `low` to 1. `lowest` is the lowest value, which may lie below."""

    low: float
    lowest: float

    @property
    def cut(self) -> bool:
        return self.lowest < self.low

    def __str__(self) -> str:
        """Say what the colours do not."""
        return "Hatched: nothing to compare." + (f" Lowest: {self.lowest:.2f}." if self.cut else "")


def describe(profile: Profile, *, of: str = "") -> str:
    """Return what a profile was measured on, as a line of text; `of` is what was made of its runs: "mean of ".

    Raises:
        ProfileError: If no run was finished.
    """
    runs, contexts, steps = profile.delta_cosine.shape[:3]
    if not runs:
        raise ProfileError(
            f"none of the {len(profile.runs)} runs in this profile was finished; there is nothing to draw"
        )
    model, scheduler = profile.provenance.model, profile.provenance.target.scheduler
    parts = [PurePath(model).name if PurePath(model).is_absolute() else model]
    parts += [f"{steps} steps of {scheduler}" if scheduler else f"{steps} steps"]
    passes = f" and {contexts} guidance passes" if contexts > 1 else ""
    parts += [of + (f"{runs} runs" if runs > 1 else "1 run") + passes]
    return ", ".join(parts)


def mean_over_runs(values: np.ndarray) -> Table:
    """Return the mean over runs and contexts of what is finite: (r, c, s, b) -> (b, s), masked where nothing is."""
    mean: Table = np.ma.masked_invalid(values).mean(axis=(0, 1)).T
    return mean


def colour_scale(tables: Sequence[Table]) -> Scale:
    """Return one scale for tables of cosines: from the lowest value that is no outlier up to 1.

    Raises:
        ProfileError: If no table has a value.
    """
    values = np.concatenate([table.compressed() for table in tables])
    if not len(values):
        raise ProfileError("this profile has nothing to compare: it takes a step and the one before it")
    lowest, low = float(values.min()), float(np.percentile(values, LOW_PERCENTILE))
    if 1 - lowest < WORTH_CLIPPING * (1 - low):
        low = lowest
    return Scale(low=min(low, 1 - NARROWEST), lowest=lowest)


def draw(axes: Axes, table: Table, scale: Scale, *, title: str = "") -> AxesImage:
    """Draw a table of shape (blocks, steps) with block 0 at the top and step 0 at the left."""
    label(axes, x="step (0 = noisiest)", y="block (0 = first)", title=title, weight="bold")
    show_cells(axes)
    return axes.imshow(table, cmap=COLOURS, vmin=scale.low, vmax=1, aspect="auto", interpolation="nearest")


def colour_bar(figure: Figure, image: AxesImage, panels: Sequence[Axes], scale: Scale, text: str) -> None:
    """Draw the scale beside the panels; its lower end is pointed where values lie below it."""
    extend = "min" if scale.cut else "neither"
    slim = figure.get_figheight() * 0.7 / 0.14  # so that the bar is about 0.14 inches wide, whatever its length
    bar = figure.colorbar(image, ax=list(panels), extend=extend, extendfrac=0.03, aspect=slim, pad=0.02)
    label_bar(bar, text)
    bar.ax.ticklabel_format(useOffset=False)
