"""How far a run drifts from the uncached one on its way."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from dicache.evaluate.evaluation import Result
from dicache.figures import FigureError
from dicache.figures.page import SMALL, label, new_page, whole_numbers
from dicache.figures.palette import GRID, INK, LINES, line_of


def drift(results: Sequence[Result]) -> Figure:
    """Draw the latents' distance from the uncached run's after each step, a line a schedule.

    Args:
        results: Of schedules for one number of steps, as `evaluate` returns them; at most as many as there are lines.

    Raises:
        FigureError: If there is none or too many, or one is of fewer steps, whose latents cannot be compared.
    """
    if not 1 <= len(results) <= len(LINES):
        raise FigureError(f"found {len(results)} results; needed 1 to {len(LINES)}")
    if other := [result.name for result in results if not result.latent_error]:
        raise FigureError(f"{other[0]} took other steps than the uncached run; leave it out")
    detail = (
        f"{len(results[0].images)} images. |z - z'| / |z'| of the latents, z' uncached; in brackets the final PSNR."
    )
    figure = new_page(8.0, 3.6 + 0.22 * (len(results) // 2), "How far the latents drift from the uncached run", detail)
    axes = figure.add_subplot()
    for place, result in enumerate(results):
        name = f"{result.name} ({result.psnr.mean:.1f} dB)"
        axes.plot(result.latent_error, label=name, **line_of(result.name, place))
    label(axes, x="step (0 = noisiest)", y="relative distance")
    axes.set_xlim(0, len(results[0].latent_error) - 1)
    axes.set_ylim(bottom=0)
    whole_numbers(axes, x=12)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL, labelcolor=INK, frameon=False)
    return figure
