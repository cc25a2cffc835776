"""What a schedule computes, reuses and skips: a strip a schedule, steps along it, blocks down it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dicache.figures.page import SMALL, label, new_page, show_cells, whole_numbers
from dicache.figures.palette import BLUE, HATCH, HATCH_INK, INK, LIGHT_BLUE, PAPER
from dicache.schedules import Schedule

LETTERS = "CRS"
COLOURS = ListedColormap([BLUE, LIGHT_BLUE, (1, 1, 1, 0)])  # a skipped cell shows the hatching behind it


@dataclass(frozen=True)
class _Strip:
    title: str
    cells: np.ndarray  # (blocks * rows, steps), places in LETTERS
    rows: int  # in each block

    @property
    def blocks(self) -> int:
        return len(self.cells) // self.rows

    @property
    def steps(self) -> int:
        return int(self.cells.shape[1])

    @property
    def height(self) -> float:
        """In inches."""
        rows = len(self.cells)
        return min(max(0.11 * rows, 0.5), max(2.2, min(0.045 * rows, 5.0)))


def schedule_strip(schedules: Sequence[tuple[str, Schedule]]) -> Figure:
    """Draw what each schedule does at each step (across) with each block (down), under its name and share of the MACs.

    Where the branches of a block are treated differently, they are rows inside the block. A plan with rules for single
    guidance passes gets a strip for each of these and one for the others. Of an adaptive schedule it is what the
    calibration expected.

    Args:
        schedules: Names and schedules, drawn from top to bottom.

    Raises:
        ValueError: If there is no schedule.
    """
    if not schedules:
        raise ValueError("no schedule to draw; pass at least one pair of a name and a schedule")
    strips = [strip for name, schedule in schedules for strip in _strips(name, schedule)]
    models = ", ".join(dict.fromkeys(schedule.anatomy.model for _, schedule in schedules))
    heights = [strip.height for strip in strips]
    one_axis = len({strip.steps for strip in strips}) == 1
    figure = new_page(
        8.0,
        sum(heights) + len(strips) * (0.36 if one_axis else 0.6) + 0.75,
        "What is computed at each step",
        f"{models}. From left to right the steps, from top to bottom the blocks as they are called.",
    )
    panels = figure.subplots(len(strips), 1, height_ratios=heights, sharex=one_axis, squeeze=False)[:, 0]
    for strip, axes in zip(strips, panels, strict=True):
        _draw(axes, strip)
        axes.tick_params(axis="x", bottom=axes is panels[-1] or not one_axis)
    panels[-1].set_xlabel("step (0 = noisiest)")
    handles = [
        Patch(facecolor=BLUE, label="computed"),
        Patch(facecolor=LIGHT_BLUE, label="output reused"),
        Patch(facecolor=PAPER, hatch=HATCH, edgecolor=HATCH_INK, linewidth=0, label="block skipped, its delta added"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=SMALL, labelcolor=INK, frameon=False)
    return figure


def _strips(name: str, schedule: Schedule) -> list[_Strip]:
    share = share_in_words(schedule)
    method = "" if schedule.method in name else f" ({schedule.method})"
    if not schedule.contexts:
        return [_strip(f"{name}{method}: {share}", schedule, None)]
    strips = [_strip(f"{name}{method}, pass {context}", schedule, context) for context in schedule.contexts]
    return [*strips, _strip(f"{name}{method}, any other pass: {share}", schedule, None)]


def share_in_words(schedule: Schedule) -> str:
    """Return what share of the multiply-accumulates a schedule means to compute, in words."""
    if not schedule.foreseen:
        return "decides at run time; what to expect is not known"
    fraction = schedule.macs_fraction()
    share = "MACs not known" if math.isnan(fraction) else f"{100 * fraction:.0f} % of the MACs"
    if schedule.collapse_guidance_from is not None:
        return f"{share}; one guidance pass from step {schedule.collapse_guidance_from} on"
    return f"{share} expected; decides at run time" if schedule.adaptive else share


def _strip(title: str, schedule: Schedule, context: str | None) -> _Strip:
    table = schedule.table(context)
    blocks = [[block.key(site) for site in block.sites] for block in schedule.anatomy.blocks]
    rows = 1
    if any(len({table[key] for key in keys}) > 1 for keys in blocks):
        rows = math.lcm(*(len(keys) for keys in blocks))
        kinds = dict.fromkeys(", ".join(site.branch for site in block.sites) for block in schedule.anatomy.blocks)
        title += f"; rows in a block: {' or '.join(kinds)}"
    keys_of_rows = [keys[row * len(keys) // rows] for keys in blocks for row in range(rows)]
    return _Strip(title, np.array([[LETTERS.index(letter) for letter in table[key]] for key in keys_of_rows]), rows)


def _draw(axes: Axes, strip: _Strip) -> None:
    label(axes, y="block", title=strip.title)
    show_cells(axes)
    axes.imshow(
        strip.cells,
        cmap=COLOURS,
        vmin=0,
        vmax=2,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, strip.steps - 0.5, strip.blocks - 0.5, -0.5),
    )
    whole_numbers(axes, x=12, y=max(1, min(strip.blocks, int(strip.height / 0.22))))
    axes.set_xticks(np.arange(0.5, strip.steps - 1), minor=True)
    axes.set_yticks(np.arange(0.5, strip.blocks - 1), minor=True)
    axes.grid(which="minor", axis="x", color="white", linewidth=0.8)
    axes.grid(which="minor", axis="y", color="white", linewidth=min(0.8, 0.12 * 72 * strip.height / strip.blocks))
    axes.tick_params(which="minor", length=0)
