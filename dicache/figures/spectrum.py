"""Which frequencies images hold that were made in several ways, and at which of them they went wrong."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from dicache.evaluate.quality import mean_with_interval
from dicache.evaluate.spectrum import radial_error, radial_log_magnitude
from dicache.figures.page import SMALL, label, new_page
from dicache.figures.palette import GRID, INK, LINES, line_of

MOST = len(LINES) + 1  # sets of images, the first among them


def spectra(sets: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """Draw the relative log magnitude of sets of images against the frequency.

    Left, the mean over each set. Right, what each other set has more or less than the first, image by image of the same
    place: the mean and its 95 % bootstrap interval.

    Args:
        sets: Names and images, each (n, h, w, 3) and all of one shape; the first is what the others are compared with.

    Raises:
        ValueError: If there are more sets than lines to tell apart, or their shapes differ.

    References:
        Delta-DiT, arXiv 2406.01125, figure 5.
    """
    if not 2 <= len(sets) <= MOST:
        raise ValueError(f"found {len(sets)} sets of images; needed 2 to {MOST}")
    base, wanted = sets[0][0], sets[0][1].shape
    for name, images in sets:
        if images.shape != wanted:
            raise ValueError(f"the images of {name!r} have the shape {images.shape}, those of {base!r} {wanted}")
    detail = (
        f"{wanted[0]} images of {wanted[1]} x {wanted[2]} in each set. Logarithm of each Fourier coefficient's "
        "magnitude relative to the image's largest, mean over a ring of equal frequency. Bands: 95 % intervals."
    )
    figure = new_page(10.0, 4.1, "Which frequencies the images hold", detail)
    whole, apart = figure.subplots(1, 2)
    frequencies, first = radial_log_magnitude(sets[0][1])
    looks = {"color": INK, "linewidth": 1.2}
    whole.plot(frequencies, first.mean(axis=0), label=base, **looks)
    apart.axhline(0, **looks)
    for place, (name, images) in enumerate(sets[1:]):
        _, values = radial_log_magnitude(images)
        looks = line_of(name, place)
        whole.plot(frequencies, values.mean(axis=0), label=name, **looks)
        means = [mean_with_interval(column) for column in (values - first).T]
        low, middle, high = np.transpose([(m.low, m.mean, m.high) for m in means])
        apart.fill_between(frequencies, low, high, color=looks["color"], alpha=0.2, linewidth=0)
        apart.plot(frequencies, middle, **looks)
    label(whole, x="frequency (cycles per pixel)", y="relative log magnitude")
    label(apart, x="frequency (cycles per pixel)", y=f"more (+) or less (-) than {base}")
    for axes in (whole, apart):
        axes.set_xlim(0, 0.5)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
    whole.legend(loc="upper right", fontsize=SMALL, labelcolor=INK, framealpha=0.9, edgecolor="none")
    return figure


def error_spectra(sets: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """Draw at which frequencies sets of images differ from the first: low ones are the outline, high ones the detail.

    The difference is relative to what the first holds at the frequency: median over the images, and the band from the
    first to the third quartile.

    Args:
        sets: Names and images, each (n, h, w, 3) and all of one shape; the first is what the others are compared with.

    Raises:
        ValueError: If there are more sets than lines to tell apart, or their shapes differ.
    """
    if not 2 <= len(sets) <= MOST:
        raise ValueError(f"found {len(sets)} sets of images; needed 2 to {MOST}")
    base, wanted = sets[0]
    detail = (
        f"{len(wanted)} images of {wanted.shape[1]} x {wanted.shape[2]} in each set. |F - F'| / |F'| over a ring of "
        f"equal frequency, F' of {base}. Low frequencies: outline; high ones: detail. Bands: quartiles."
    )
    figure = new_page(8.0, 3.8, f"Where images differ from {base}: outline or detail", detail)
    axes = figure.add_subplot()
    for place, (name, images) in enumerate(sets[1:]):
        frequencies, errors = radial_error(images, wanted)
        low, middle, high = np.percentile(errors, (25, 50, 75), axis=0)
        looks = line_of(name, place)
        axes.fill_between(frequencies, low, high, color=looks["color"], alpha=0.15, linewidth=0)
        axes.plot(frequencies, middle, label=name, **looks)
    label(axes, x="frequency (cycles per pixel)", y="relative difference (log scale)")
    axes.set_yscale("log")
    axes.set_xlim(0, 0.5)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.legend(fontsize=SMALL, labelcolor=INK, framealpha=0.9, edgecolor="none")
    return figure
