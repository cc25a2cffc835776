"""Which frequencies images hold that were made in several ways."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from dicache.evaluate.quality import mean_with_interval
from dicache.evaluate.spectrum import radial_log_magnitude
from dicache.figures.page import SMALL, label, new_page
from dicache.figures.palette import BLUE, GREEN, GRID, INK, MUTED, ORANGE, method_colour

# Of sets whose names tell of no method; two sets of one method share its colour and differ in the line.
LINES = ((INK, "-"), (BLUE, "--"), (ORANGE, "-."), (GREEN, ":"), (MUTED, (0, (5, 1, 1, 1, 1, 1))))


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
    if not 2 <= len(sets) <= len(LINES):
        raise ValueError(f"found {len(sets)} sets of images; needed 2 to {len(LINES)}")
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
    first = np.empty(0)
    for (name, images), (color, style) in zip(sets, LINES, strict=False):
        color = method_colour(name) or color
        frequencies, values = radial_log_magnitude(images)
        whole.plot(frequencies, values.mean(axis=0), linestyle=style, color=color, linewidth=1.8, label=name)
        if name == base:
            first = values
            apart.axhline(0, color=color, linewidth=1.2)
            continue
        means = [mean_with_interval(column) for column in (values - first).T]
        low, middle, high = np.transpose([(m.low, m.mean, m.high) for m in means])
        apart.fill_between(frequencies, low, high, color=color, alpha=0.2, linewidth=0)
        apart.plot(frequencies, middle, linestyle=style, color=color, linewidth=1.8)
    label(whole, x="frequency (cycles per pixel)", y="relative log magnitude")
    label(apart, x="frequency (cycles per pixel)", y=f"more (+) or less (-) than {base}")
    for axes in (whole, apart):
        axes.set_xlim(0, 0.5)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
    whole.legend(loc="upper right", fontsize=SMALL, labelcolor=INK, framealpha=0.9, edgecolor="none")
    return figure
