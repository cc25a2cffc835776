"""Maps of cells: heat maps of numbers, and strips of what is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from matplotlib import colormaps

from dicache.figures.heatmap import Table
from dicache.figures.palette import COLOURS
from dicache.figures.report.markup import Markup, element, join
from dicache.figures.report.plots import cells, figure, folded, key, legend, picture, plot, table

LEVELS = 64  # of colour; more are not told apart
ABSENT = "none"
ROW, LEAST, LOWEST, HIGHEST = 16, 15, 32, 420  # pixels


@dataclass(frozen=True)
class Axis:
    """What the rows or the columns of a map are.

    Attributes:
        label: Beside them.
        names: One for each.
        word: What stands before a name when it is read out.
    """

    label: str
    names: Sequence[str]
    word: str


def steps_axis(steps: int, label: str = "step (0 = noisiest)") -> Axis:
    return Axis(label, [str(step) for step in range(steps)], "step")


def blocks_axis(blocks: int) -> Axis:
    return Axis("block (0 = first)", [str(block) for block in range(blocks)], "block")


@dataclass(frozen=True)
class Colours:
    """What the colours of heat maps mean: bright is what can be reused.

    Attributes:
        low: Value at one end.
        high: Value at the other.
        bright: Which of the two is bright.
        text: What is measured.
    """

    low: float
    high: float
    bright: str
    text: str

    def levels(self, values: Table) -> np.ndarray:
        """Return the level of each value, from 0, dark, to `LEVELS` - 1; -1 where there is none."""
        share = (np.clip(values.filled(np.nan), self.low, self.high) - self.low) / (self.high - self.low)
        share = share if self.bright == "high" else 1 - share
        return np.where(np.isnan(share), -1, np.nan_to_num(np.round(share * (LEVELS - 1)))).astype(int)

    def legend(self) -> Markup:
        """Return the bar of colours between its ends."""
        stops = [_colour(level) for level in np.linspace(0, LEVELS - 1, 9).round().astype(int)]
        stops = stops if self.bright == "high" else stops[::-1]
        bar = element("span", class_="bar", style=f"background:linear-gradient(to right,{','.join(stops)})")
        scale = join(f"{self.text} {self.low:.3g}", bar, f"{self.high:.3g}")
        return legend((scale, ""), (key("skipped"), "nothing to compare"))


def heat_map(
    id_: str,
    title: str,
    values: Table,
    rows: Axis,
    columns: Axis,
    colours: Colours,
    note: str = "",
    *,
    explained: bool = True,
) -> Markup:
    """Return a map of numbers, (rows, columns), and the table that they are read from.

    Args:
        id_: Of the table, one of its kind on the page.
        title: What is seen.
        values: Masked where nothing is known.
        rows: Of the table.
        columns: Likewise.
        colours: Of the map.
        note: Below the title.
        explained: Whether the map says what its colours mean.
    """
    levels = colours.levels(values)
    colors = {level: _colour(level) for level in range(LEVELS) if (levels == level).any()}
    # With a thin line around, so that no gap shows between cells on paper.
    shapes = [_filled(levels == level, fill=color, stroke=color) for level, color in colors.items()]
    texts = [[ABSENT if value is np.ma.masked else f"{value:.4g}" for value in line] for line in values]
    above = [colours.legend()] if explained else []
    return _map(id_, title, shapes, texts, rows, columns, note, above)


# In the order of the letters: what they are called and how they look.
KINDS: Mapping[str, tuple[str, str]] = {
    "C": ("computed", "computed"),
    "R": ("output reused", "reused"),
    "S": ("block skipped, its delta added", "skipped"),
}
OF_STEPS: Mapping[str, tuple[str, str]] = {"C": ("all computed", "computed"), ".": ("not all computed", "reused")}


def strip(
    id_: str,
    title: str,
    rows: Axis,
    letters: Sequence[str],
    note: str = "",
    kinds: Mapping[str, tuple[str, str]] = KINDS,
) -> Markup:
    """Return a map of letters, one string a row and one letter a step."""
    steps = len(letters[0])
    cells_ = np.array([list(line) for line in letters])
    shapes = [_filled(cells_ == letter, class_=look) for letter, (_, look) in kinds.items()]
    # Lines between the cells, so that they can be counted.
    upright = "".join(f"M{i} 0V{len(letters)}" for i in range(1, steps))
    level = "".join(f"M0 {i}H{steps}" for i in range(1, len(letters)))
    lines = element("path", d=upright + level, class_="between")
    texts = [[kinds[letter][0] for letter in line] for line in letters]
    return _map(id_, title, [*shapes, lines], texts, rows, steps_axis(steps), note, [])


def kinds_legend(kinds: Mapping[str, tuple[str, str]] = KINDS) -> Markup:
    """Return how the letters of strips look."""
    return legend(*((key(look), name) for name, look in kinds.values()))


def _map(
    id_: str,
    title: str,
    shapes: Sequence[Markup],
    texts: Sequence[Sequence[str]],
    rows: Axis,
    columns: Axis,
    note: str,
    above: Sequence[Markup],
) -> Markup:
    height = int(np.clip(ROW * len(rows.names), LOWEST, HIGHEST))
    drawn = plot(
        picture(*shapes, width=len(columns.names), height=len(rows.names), crisp=True),
        name=title,
        table=id_,
        x=(columns.label, cells(columns.names)),
        y=(rows.label, cells(rows.names, max(1, height // LEAST))),
        height=height,
        grid=(len(rows.names), len(columns.names)),
    )
    values = table(
        [rows.label, *columns.names],
        list(zip(rows.names, texts, strict=True)),
        id_=id_,
        caption=title,
        row=rows.word,
        column=columns.word,
    )
    return figure(title, *above, drawn, folded("Values as a table", values), note=note)


def _colour(level: int) -> str:
    red, green, blue, _ = colormaps[COLOURS](level / (LEVELS - 1), bytes=True)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _filled(cells_: np.ndarray, **attributes: str) -> Markup:
    """Return the cells that are true as one shape; neighbours in a row are one rectangle."""
    parts = []
    for row, line in enumerate(cells_):
        start = 0
        for filled, run in groupby(line):
            length = len(list(run))
            parts += [f"M{start} {row}h{length}v1h-{length}z"] if filled else []
            start += length
    return element("path", d="".join(parts), **attributes)
