"""The frame around what is drawn: axes as text of the page, so that it stays readable at any width.

A plot is an area that stretches, measured in shares of its width and height, with ticks and labels beside it. What is
drawn in it is read with the pointer and with the arrow keys; the values are those of a table on the page.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from dicache.figures.report.markup import Markup, element, join

MARGIN = 0.05  # of an axis, beside what is drawn

Tick = tuple[float, str]  # share of the axis from the left or from above, and text


@dataclass(frozen=True)
class Section:
    """A part of the page, under a heading of its own."""

    id: str
    title: str
    markup: Markup


@dataclass(frozen=True)
class Scale:
    """Maps values to shares of an axis.

    Attributes:
        low: Value at its beginning.
        high: Value at its end.
        log: Whether equal ratios are equally long.
    """

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, values: np.ndarray, *, log: bool = False, zero: bool = False) -> "Scale":
        """Return a scale that holds all values that are finite, with a margin; of `zero`, 0 as well."""
        known = values[np.isfinite(values) & ((values > 0) | (not log))]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.1, 1.0)
        if log:
            stretch = max(high / low, 1.5) ** MARGIN
            return cls(low / stretch, high * stretch, log=True)
        low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
        extra = MARGIN * (high - low) or 0.5 * abs(high) or 1.0
        return cls(low - extra * (low != 0 or not zero), high + extra * (high != 0 or not zero))

    def __call__(self, value: np.ndarray | float) -> np.ndarray:
        """Return where values lie, 0 at `low` and 1 at `high`."""
        if self.log:
            return np.asarray(np.log(np.asarray(value) / self.low) / np.log(self.high / self.low))
        return np.asarray((np.asarray(value) - self.low) / (self.high - self.low))

    def ticks(self, most: int = 6) -> list[Tick]:
        """Return round numbers within the scale."""
        if self.log:
            found = LogLocator(subs=(1, 2, 5)).tick_values(self.low, self.high)
        else:
            found = MaxNLocator(nbins=most, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        inside = [float(value) for value in found if -1e-9 <= float(self(value)) <= 1 + 1e-9]
        return [(float(self(value)), f"{value:.6g}") for value in inside]


def cells(names: Sequence[str], most: int = 10) -> list[Tick]:
    """Return ticks in the middle of cells: of all of them, or of every second, fifth, tenth, ..."""
    every = next(
        step for power in count() for step in (10**power, 2 * 10**power, 5 * 10**power) if len(names) <= step * most
    )
    return [((i + 0.5) / len(names), names[i]) for i in range(0, len(names), every)]


def plot(
    drawing: Markup,
    *,
    name: str,
    table: str,
    x: tuple[str, Sequence[Tick]],
    y: tuple[str, Sequence[Tick]],
    height: int,
    grid: tuple[int, int] | None = None,
    marks: Sequence[tuple[float, float]] = (),
    nearest: str = "both",
) -> Markup:
    """Return a plot whose values are read from a table of the page.

    Args:
        drawing: What is in the area.
        name: What it is called where it is not seen.
        table: The id of the table: of a grid, with a row and a column of it for each; else with a row a mark.
        x: Label, and ticks from the left.
        y: Label, and ticks from above.
        height: Of the area, in pixels.
        grid: Rows and columns of the cells that it is divided in.
        marks: Or shares of width and height, from the left and from above, of what it marks; NaN of what it does not.
        nearest: Whether a pointer finds the mark that is nearest in `both` directions, or along `x`.
    """
    kind = {"data_rows": grid[0], "data_columns": grid[1]} if grid else {"data_marks": _numbers(marks)}
    keys = "Arrow keys go from cell to cell." if grid else "Arrow keys go from point to point."
    area = element(
        "div",
        element("div", drawing, class_="drawing"),
        element("div", class_="cursor", hidden=True),
        class_="area",
        tabindex="0",
        role="application",
        aria_label=f"{name}. {keys}",
        data_table=table,
        data_nearest=None if grid else nearest,
        **kind,
    )
    down = join(element("span", text, style=f"top:{100 * place:.2f}%") for place, text in y[1])
    across = join(element("span", text, style=f"left:{100 * place:.2f}%") for place, text in x[1])
    widest = max((len(text) for _, text in y[1]), default=0)
    return element(
        "div",
        element("div", element("span", y[0]), class_="y-label", aria_hidden="true"),
        element("div", down, class_="y-ticks", aria_hidden="true"),
        area,
        element("div", across, class_="x-ticks", aria_hidden="true"),
        element("div", x[0], class_="x-label", aria_hidden="true"),
        class_="plot",
        style=f"--height:{height}px;--digits:{widest}ch",
    )


def picture(*shapes: Markup, width: float = 1, height: float = 1, crisp: bool = False) -> Markup:
    """Return shapes in an area of `width` by `height` that is stretched to fill the plot."""
    return element(
        "svg",
        *shapes,
        viewBox=f"0 0 {width:g} {height:g}",
        preserveAspectRatio="none",
        aria_hidden="true",
        focusable="false",
        shape_rendering="crispEdges" if crisp else None,
    )


def path(x: np.ndarray, y: np.ndarray, **attributes: str | None) -> Markup:
    """Return a line through places in shares from the left and from below; it is broken where one is not finite."""
    parts, pen = [], "M"
    for left, up in zip(x, y, strict=True):
        if not (np.isfinite(left) and np.isfinite(up)):
            pen = "M"
            continue
        parts.append(f"{pen}{left:.4g} {1 - up:.4g}")
        pen = "L"
    return element("path", d="".join(parts), **attributes)


def table(
    head: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    *,
    id_: str | None = None,
    caption: str,
    row: str = "",
    column: str = "",
) -> Markup:
    """Return a table whose rows have a name; `row` and `column` are what names and headings are numbers of."""
    headings = join(element("th", text, scope="col") for text in head)
    lines = (
        element("tr", element("th", name, scope="row"), (element("td", text) for text in texts)) for name, texts in rows
    )
    made = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", headings)),
        element("tbody", lines),
        id=id_,
        data_row=row or None,
        data_column=column or None,
    )
    return element("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)


def folded(summary: str, *children: Markup) -> Markup:
    """Return what is shown when it is asked for."""
    return element("details", element("summary", summary), *children)


def legend(*keys: tuple[Markup, str]) -> Markup:
    """Return what looks like what."""
    return element("p", (element("span", look, name) for look, name in keys), class_="legend")


def key(look: str) -> Markup:
    """Return a sample of a line or of a cell, by the name of its look."""
    return element("span", class_=f"key {look}")


def figure(title: str, *children: Markup, note: str = "", class_: str = "") -> Markup:
    """Return a figure under a heading that says what is seen."""
    told = [element("p", note, class_="note")] if note else []
    caption = element("figcaption", element("h3", title), *told)
    return element("figure", caption, *children, class_=class_ or None)


def section(id_: str, title: str, *children: Markup) -> Section:
    """Return a part of the page."""
    heading = element("h2", title, id=f"{id_}-title")
    return Section(id_, title, element("section", heading, *children, id=id_, aria_labelledby=f"{id_}-title"))


def _numbers(marks: Sequence[tuple[float, float]]) -> str:
    """Return marks as JSON; null for one that is nowhere."""
    known = [[round(x, 4), round(y, 4)] if np.isfinite(x) and np.isfinite(y) else None for x, y in marks]
    return json.dumps(known, separators=(",", ":"))
