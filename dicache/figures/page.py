"""The page that every picture is drawn on: size, type and the heading that says what is seen.

All is set on the figure itself; matplotlib's rcParams belong to the user and to no thread in particular.
"""

from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from dicache.figures.palette import HATCH, HATCH_INK, INK, MUTED, PAPER

DPI = 144

TITLE, TEXT, SMALL = 13.0, 10.5, 9.5  # points
LEADING = 1.35  # height of a line, in its size
MARGIN = 0.12  # inches


def new_page(width: float, height: float, title: str, detail: str) -> Figure:
    """Return an empty figure with a heading: a bold line and a grey one, wrapped to the width.

    Args:
        width: In inches.
        height: In inches, without the heading.
        title: What is seen.
        detail: What it was measured on, and how to read it.
    """
    lines = [(line, TITLE, INK, "bold") for line in wrapped(title, TITLE, "bold", width - 2 * MARGIN)]
    lines += [(line, SMALL, MUTED, "normal") for line in wrapped(detail, SMALL, "normal", width - 2 * MARGIN)]
    heading = MARGIN + sum(size for _, size, _, _ in lines) * LEADING / 72
    total = height + heading
    figure = Figure(figsize=(width, total), dpi=DPI, facecolor="white")
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0, 1, height / total), w_pad=0.08, h_pad=0.07))
    top = MARGIN  # inches from the upper edge
    for line, size, color, weight in lines:
        figure.text(MARGIN / width, 1 - top / total, line, va="top", size=size, color=color, weight=weight)
        top += size * LEADING / 72
    return figure


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Return how wide a line of text is, in inches."""
    path = TextPath((0, 0), text, size=size, prop=FontProperties(weight=weight), usetex=False)
    return float(path.get_extents().width) / 72 if text.strip() else 0.0


def label(axes: Axes, *, x: str = "", y: str = "", title: str = "", weight: str = "normal") -> None:
    """Write the labels of one panel and take away what is not needed to read it."""
    axes.set_xlabel(x, fontsize=TEXT, color=INK)
    axes.set_ylabel(y, fontsize=TEXT, color=INK)
    axes.set_title(title, fontsize=TEXT, color=INK, loc="left", weight=weight)
    axes.tick_params(labelsize=SMALL, labelcolor=INK, color=MUTED, length=3)
    axes.set_facecolor("white")
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=MUTED, linewidth=0.8)


def label_bar(bar: Colorbar, text: str) -> None:
    """Write the label of a colour bar."""
    bar.set_label(text, fontsize=TEXT, color=INK)
    bar.ax.tick_params(labelsize=SMALL, labelcolor=INK, color=MUTED, length=3)
    bar.outline.set_visible(False)


def whole_numbers(axes: Axes, *, x: int = 0, y: int = 0) -> None:
    """Put ticks at whole numbers only: at most `x` across and `y` up; 0 leaves an axis as it is."""
    for axis, most in ((axes.xaxis, x), (axes.yaxis, y)):
        if most:
            axis.set_major_locator(MaxNLocator(nbins=most, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def show_cells(axes: Axes) -> None:
    """Leave a panel of cells without a frame, and hatch what no cell covers."""
    axes.patch.set(facecolor=PAPER, hatch=HATCH, edgecolor=HATCH_INK, linewidth=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def wrapped(text: str, size: float, weight: str, width: float) -> list[str]:
    """Return the text in lines of at most a width in inches, or of one word."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
