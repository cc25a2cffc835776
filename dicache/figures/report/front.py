"""How close images stay to the uncached ones at what cost, of what `dicache evaluate --json` and searches wrote."""

from collections.abc import Sequence

import numpy as np

from dicache.figures.palette import INK, MUTED
from dicache.figures.pareto import Measured, Point, Series, best_of, looks
from dicache.figures.report.markup import Markup, element, join
from dicache.figures.report.plots import Scale, Section, figure, legend, path, picture, plot, section, table

HEIGHT = 340  # pixels
THEMED = {INK: "var(--ink)", MUTED: "var(--muted)"}  # dark on light paper, light on dark
# Outlines of matplotlib's markers in a box from -1 to 1.
SHAPES = {
    "o": "M-.8 0a.8.8 0 1 0 1.6 0a.8.8 0 1 0-1.6 0z",
    "s": "M-.75-.75h1.5v1.5h-1.5z",
    "^": "M0-.9L.9.7H-.9z",
    "D": "M0-1L1 0L0 1L-1 0z",
    "v": "M0 .9L.9-.7H-.9z",
    "P": "M-.3-.9h.6v.6h.6v.6h-.6v.6h-.6v-.6h-.6v-.6h.6z",
    "X": "M-.9-.5L-.5-.9L0-.4L.5-.9L.9-.5L.4 0L.9 .5L.5 .9L0 .4L-.5 .9L-.9 .5L-.4 0z",
    "*": "M0-1L.25-.3L1-.3L.4 .15L.6 .85L0 .4L-.6 .85L-.4 .15L-1-.3L-.25-.3z",
    "<": "M-.9 0L.7-.9V.9z",
    ">": "M.9 0L-.7-.9V.9z",
    "p": "M0-.9L.9-.2L.55 .8H-.55L-.9-.2z",
    "h": "M0-.95L.85-.45V.45L0 .95L-.85 .45V-.45z",
}


def pareto(measured: Measured) -> Section:
    """Return quality against cost and, where it was timed, against the measured speed-up, and the numbers.

    Raises:
        FigureError: If there is no point.
    """
    ordered = measured.ordered()
    points = [(one, point) for one in ordered for point in sorted(one.points, key=lambda p: -p.macs_fraction)]
    many = f"{measured.runs} images; bars" if measured.runs else "Bars"
    told = element("p", f"{many}: 95 % intervals over prompts. The thick line: what no other point betters in both.")
    costs: list[tuple[str, int, list[float | None]]] = [
        ("share of the uncached multiply-accumulates", -1, [point.macs_fraction for _, point in points])
    ]
    if any(point.speedup is not None for _, point in points):
        costs.append(("measured speed-up over the uncached run", 1, [point.speedup for _, point in points]))
    up = Scale.of(np.array([v for _, p in points for v in (p.psnr, p.low, p.high) if v is not None]))
    panels = (
        figure(f"PSNR against the {label}", _panel(points, np.array(cost, dtype=float), up, label, cheaper))
        for label, cheaper, cost in costs
    )
    keys = legend(*((_key(one, ordered), one.name) for one in ordered))
    return section("pareto", "What quality costs", told, keys, element("div", panels, class_="maps"), _values(points))


def _panel(points: Sequence[tuple[Series, Point]], cost: np.ndarray, up: Scale, label: str, cheaper: int) -> Markup:
    """Return one plot; the cost of each point is NaN where it is not known."""
    across = Scale.of(cost)
    ordered = list(dict.fromkeys(one for one, _ in points))
    timed = [(x, *point) for x, point in zip(cost.tolist(), points, strict=True) if np.isfinite(x)]
    x, y = np.transpose(best_of([(x, point.psnr) for x, _, point in timed], cheaper))
    shapes = [path(across(x), up(y), class_="front")]
    for one in ordered:
        style = _style(one, ordered)
        mine = sorted(((x, point) for x, series, point in timed if series is one), key=lambda pair: pair[0])
        x, y = np.array([x for x, _ in mine]), np.array([point.psnr for _, point in mine])
        shapes.append(path(across(x), up(y), class_=f"line {one.source}", style=style))
        for left, point in mine:
            if point.low is not None and point.high is not None:
                ends = up(np.array([point.low, point.high]))
                shapes.append(path(np.repeat(across(left), 2), ends, class_="bar", style=style))
    marks = list(zip(across(cost).tolist(), (1 - up(np.array([p.psnr for _, p in points]))).tolist(), strict=True))
    markers = (
        _key(one, ordered, f"left:{100 * left:.2f}%;top:{100 * top:.2f}%")
        for (one, _), (left, top) in zip(points, marks, strict=True)
        if np.isfinite(left)
    )
    return plot(
        join(picture(*shapes), element("div", markers, class_="markers")),
        name=f"PSNR against the {label}",
        table="points",
        x=(label, across.ticks()),
        y=("PSNR (dB)", [(1 - place, text) for place, text in up.ticks()]),
        height=HEIGHT,
        marks=marks,
    )


def _values(points: Sequence[tuple[Series, Point]]) -> Markup:
    rows = [
        (
            one.name,
            (
                f"{point.psnr:.1f}",
                "-" if point.low is None or point.high is None else f"{point.low:.1f} to {point.high:.1f}",
                f"{point.macs_fraction:.3f}",
                "-" if point.speedup is None else f"{point.speedup:.2f}",
            ),
        )
        for one, point in points
    ]
    heads = ["schedule", "PSNR dB", "95 %", "share of the MACs", "speed-up"]
    return table(heads, rows, id_="points", caption="Quality and cost")


def _key(one: Series, ordered: Sequence[Series], place: str = "") -> Markup:
    """Return the marker of a series, where it is to be."""
    shape = element("path", d=SHAPES[str(looks(one, ordered)["marker"])])
    return element(
        "svg",
        shape,
        viewBox="-1.2 -1.2 2.4 2.4",
        class_=f"marker {one.source}",
        style=f"{_style(one, ordered)};{place}",
        aria_hidden="true",
    )


def _style(one: Series, ordered: Sequence[Series]) -> str:
    color = str(looks(one, ordered)["color"])
    return f"color:{THEMED.get(color, color)}"
