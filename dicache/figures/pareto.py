"""How close images stay to the uncached ones at what cost: schedules, searches and other projects side by side."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dicache.evaluate.evaluation import Result
from dicache.figures import FigureError
from dicache.figures.page import SMALL, label, new_page
from dicache.figures.palette import FRONT, INK, MUTED, method_colour

Source = Literal["dicache", "peer", "steps"]
GROUPS: dict[Source, str] = {"dicache": "dicache", "peer": "other projects", "steps": "no cache"}
MARKERS = "os^DvPX*<>ph"


@dataclass(frozen=True)
class Point:
    """One schedule's cost and quality.

    Attributes:
        macs_fraction: Share of the uncached run's multiply-accumulates.
        psnr: Mean over the images in dB, against the uncached ones.
        low: Lower end of its 95 % interval; None if it is not told.
        high: Upper end.
        speedup: Measured, over the uncached run; None if it was not timed.
    """

    macs_fraction: float
    psnr: float
    low: float | None = None
    high: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Series:
    """The points of one method, in whatever order.

    Attributes:
        name: Of the method.
        points: At least one.
        source: `dicache`, a `peer` of another project, or fewer `steps` without a cache.
    """

    name: str
    points: tuple[Point, ...]
    source: Source = "dicache"


@dataclass(frozen=True)
class Measured:
    """What files tell: the model that all of them are of, if they say so, how many images, and series."""

    model: str | None
    runs: int | None
    series: tuple[Series, ...]

    def ordered(self) -> list[Series]:
        """Return the series, those of dicache first, then those of other projects, then fewer steps.

        Raises:
            FigureError: If there is none.
        """
        if not self.series:
            raise FigureError("there is no point to draw; needed a result or a front of a search")
        return [one for group in GROUPS for one in self.series if one.source == group]


def series_of(model: str, methods: Mapping[str, Sequence[Result]], fewer_steps: Sequence[Result] = ()) -> Measured:
    """Return what an evaluation found, a series a method.

    Args:
        model: Its name.
        methods: Names, and the results of each one's schedules, as `evaluate` returns them.
        fewer_steps: The results of fewer steps.
    """

    def points(results: Sequence[Result]) -> tuple[Point, ...]:
        return tuple(Point(r.macs_fraction, r.psnr.mean, r.psnr.low, r.psnr.high, r.speedup) for r in results)

    series = [Series(name, points(results)) for name, results in methods.items()]
    series += [Series("fewer steps", points(fewer_steps), "steps")] if fewer_steps else []
    runs = {len(result.images) for results in methods.values() for result in results}
    return Measured(model, runs.pop() if len(runs) == 1 else None, tuple(series))


def read_series(files: Sequence[Path]) -> Measured:
    """Read outputs of `dicache evaluate --json` and of `benchmarks.pareto`, and schedules that a search found.

    Rows of one name are one series, across files too. A search's front is as its own runs have it.

    Raises:
        FigureError: If a file is none of these, or they are of different models.
    """
    models: dict[str, Path] = {}
    runs: set[int] = set()
    found: dict[tuple[str, Source], list[Point]] = {}
    for file in files:
        content = _content(file)
        if model := content.get("model") if "results" in content else content["measured"].get("model"):
            models.setdefault(str(model), file)
        for name, source, row in _rows(file, content):
            found.setdefault((name, source), []).append(_point(file, row))
            runs |= {row["runs"]} if isinstance(row.get("runs"), int) else set()
    if len(models) > 1:
        (one, at), (other, there) = list(models.items())[:2]
        raise FigureError(f"{at} is of {one} and {there} of {other}; needed one model, as its PSNR is its own")
    series = tuple(Series(name, tuple(points), source) for (name, source), points in found.items())
    return Measured(next(iter(models), None), runs.pop() if len(runs) == 1 else None, series)


def _content(file: Path) -> Mapping[str, Any]:
    needed = "needed an output of `dicache evaluate --json`, or a schedule that `dicache calibrate --search` wrote"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise FigureError(f"{file} does not exist; {needed}") from None
    except (OSError, ValueError) as error:
        raise FigureError(f"{file} is not JSON ({error}); {needed}") from None
    if not isinstance(content, dict) or not ("results" in content or isinstance(content.get("measured"), dict)):
        raise FigureError(f"{file} holds neither results nor what a search measured; {needed}")
    return content


def _rows(file: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, Source, Mapping[str, Any]]]:
    """Yield the name of each row's series, its source, and the row."""
    if "results" in content:
        for row in _mappings(file, content["results"]):
            if "schedule" not in row or row.get("source", "dicache") not in GROUPS:
                raise FigureError(
                    f"{file} has a row of schedule {row.get('schedule')!r} and source {row.get('source')!r}; needed a "
                    f"name, and one of {', '.join(GROUPS)}"
                )
            yield str(row["schedule"]), row.get("source", "dicache"), row
        for row in _mappings(file, content.get("fewer_steps", [])):
            yield "fewer steps", "steps", row
        return
    search = content["measured"].get("search") or {}
    if not search.get("front"):
        raise FigureError(
            f"{file} holds no front of a search; make it with `dicache calibrate --search`, or evaluate it with "
            "`dicache evaluate --json` and draw what that writes"
        )
    for row in _mappings(file, search["front"]):
        yield f"{content.get('method', file.stem)}, searched", "dicache", row


def _mappings(file: Path, rows: Any) -> list[Mapping[str, Any]]:
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise FigureError(f"{file} has no list of rows where it should; write it anew with `dicache evaluate --json`")
    return rows


def _point(file: Path, row: Mapping[str, Any]) -> Point:
    told = row.get("psnr")
    told = told if isinstance(told, Mapping) else {"mean": told}
    values = row.get("macs_fraction"), told.get("mean"), told.get("low"), told.get("high"), row.get("speedup")
    for needed, value in zip((True, True, False, False, False), values, strict=True):
        number = isinstance(value, int | float) and math.isfinite(value)
        if not number and (needed or value is not None):
            of = f" of {row['schedule']}" if "schedule" in row else ""
            raise FigureError(f"{file} has {value!r} in a row{of}; needed numbers for macs_fraction and psnr")
    return Point(*values)  # type: ignore[arg-type] # they were looked at


def pareto(measured: Measured) -> Figure:
    """Draw PSNR against the share of multiply-accumulates and, where all was timed, against the measured speed-up.

    Bars are 95 % intervals. What dicache does is solid, what other projects do dashed and hollow, in the same colour
    where it is the same method. The grey line runs through the points that no other one betters in both.

    Args:
        measured: As from `read_series`.

    Raises:
        FigureError: If there is no point.
    """
    ordered = measured.ordered()
    points = [point for one in ordered for point in one.points]
    timed = any(point.speedup is not None for point in points)
    of = f"{measured.model}, " if measured.model else ""
    many = f"{measured.runs} images, " if measured.runs else ""
    told = "Solid: dicache; dashed and hollow: other projects. " if "peer" in {one.source for one in ordered} else ""
    detail = f"{of}{many}bars: 95 % intervals over prompts. {told}Grey: what no other point betters in both."
    high = max(4.6, 0.185 * (len(ordered) + 4))
    figure = new_page(12.0 if timed else 8.4, high, "How close images stay to the uncached ones, at what cost", detail)
    panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    _panel(panels[0], ordered, lambda point: point.macs_fraction, cheaper=-1)
    label(panels[0], x="share of the uncached multiply-accumulates", y="PSNR against the uncached images (dB)")
    if timed:
        _panel(panels[1], ordered, lambda point: point.speedup, cheaper=1)
        label(panels[1], x="measured speed-up over the uncached run")
    handles = []
    for source, heading in GROUPS.items():
        members = [one for one in ordered if one.source == source]
        handles += [Line2D([], [], linestyle="", label=heading)] if members else []
        handles += [Line2D([], [], label=one.name, **looks(one, ordered)) for one in members]
    legend = panels[-1].legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        fontsize=SMALL - 1,
        frameon=False,
        handlelength=2.6,
    )
    for text in legend.get_texts():
        text.set(color=INK, weight="bold" if text.get_text() in GROUPS.values() else "normal")
    return figure


def _panel(axes: Axes, ordered: Sequence[Series], cost: Any, *, cheaper: int) -> None:
    """Draw every series; `cheaper` is 1 where a larger cost value is the better one, and -1 elsewhere."""
    axes.grid(color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
    every = [(cost(point), point.psnr) for one in ordered for point in one.points if cost(point) is not None]
    front = best_of(every, cheaper)
    axes.plot(*zip(*front, strict=True), color=FRONT, linewidth=7, solid_capstyle="round", zorder=1)
    for one in ordered:
        points = sorted((p for p in one.points if cost(p) is not None), key=cost)
        look = looks(one, ordered)
        x, y = [cost(p) for p in points], [p.psnr for p in points]
        axes.plot(x, y, zorder=3, **look)
        bars = [(cost(p), p.low, p.high) for p in points if p.low is not None and p.high is not None]
        if bars:
            axes.vlines(*zip(*bars, strict=True), color=look["color"], linewidth=1.0, alpha=0.7, zorder=2)


def best_of(points: Sequence[tuple[float, float]], cheaper: int = -1) -> list[tuple[float, float]]:
    """Return the pairs of a cost and a quality that no other pair betters in both, by rising cost.

    Args:
        points: Pairs; the higher the quality, the better.
        cheaper: 1 where a larger first number is better, -1 where a smaller one is.
    """
    kept: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (-cheaper * point[0], -point[1])):
        if not kept or quality > kept[-1][1]:
            kept.append((cost, quality))
    return sorted(kept)


def looks(one: Series, ordered: Sequence[Series]) -> dict[str, Any]:
    """Return how the line of a series among others is drawn, as matplotlib calls it."""
    color = _colour(one)
    alike = list(dict.fromkeys(_method(other) for other in ordered if _colour(other) == color))
    peer = one.source == "peer"
    return {
        "color": color,
        "linestyle": "--" if peer else ":" if one.source == "steps" else "-",
        "linewidth": 2.0 if one.source == "steps" else 1.3,
        "marker": MARKERS[alike.index(_method(one)) % len(MARKERS)],
        "markersize": 5.5,
        "markerfacecolor": "white" if peer else color,
    }


def _method(one: Series) -> str:
    """Return what another project calls its method, without the project's name."""
    return one.name.removeprefix("diffusers ").removeprefix("cache-dit ") if one.source == "peer" else one.name


def _colour(one: Series) -> str:
    return method_colour(one.name) or MUTED
