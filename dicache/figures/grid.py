"""Rows of images under one another: the same prompts and seeds with and without a cache."""

from collections.abc import Sequence
from math import ceil

import numpy as np
from matplotlib.figure import Figure

from dicache.figures.page import DPI, LEADING, MARGIN, SMALL, TEXT, text_width, wrapped
from dicache.figures.palette import INK

WANTED, LARGEST = 180, 300  # pixels of the page that an image is wide: about, and at most
GAP = 9  # pixels between images
ROUNDING = 1e-3  # how far outside [0, 1] a decoder's output may be


def image_grid(rows: Sequence[tuple[str, np.ndarray]], captions: Sequence[str] | None = None) -> Figure:
    """Draw rows of images, each pixel as it is, with the row's label at the left.

    Args:
        rows: Labels and images in [0, 1], each (n, h, w, 3), all of one shape.
        captions: What stands above the n columns, in as many lines as it takes, or None.

    Raises:
        ValueError: If there is no image, shapes differ, values lie outside [0, 1], or captions are not n.
    """
    n, high, wide = _check(rows, captions)
    # All in pixels of the page, whole ones, so that every pixel of a small image is drawn equally large.
    width = min(wide * max(1, round(WANTED / wide)), LARGEST)
    height = round(width * high / wide)
    names = max(text_width(line, TEXT) for name, _ in rows for line in name.split("\n"))
    heads = ["\n".join(wrapped(text, SMALL, "normal", width / DPI)) for text in captions or ()]
    lines = max((head.count("\n") + 1 for head in heads), default=0)
    left, top = (
        ceil((names + 2 * MARGIN) * DPI),
        ceil((MARGIN + lines * SMALL * LEADING / 72 + 0.06 * bool(lines)) * DPI),
    )
    page_width = left + n * (width + GAP) + GAP
    page_height = top + len(rows) * (height + GAP) + GAP
    figure = Figure(figsize=(page_width / DPI, page_height / DPI), dpi=DPI, facecolor="white")
    for i, (name, images) in enumerate(rows):
        bottom = page_height - top - i * (height + GAP) - height
        middle = (bottom + height / 2) / page_height
        figure.text(MARGIN * DPI / page_width, middle, name, va="center", size=TEXT, color=INK, linespacing=1.3)
        for j, image in enumerate(images):
            corner = left + j * (width + GAP)
            box = corner / page_width, bottom / page_height, width / page_width, height / page_height
            axes = figure.add_axes(box)
            axes.imshow(np.clip(image, 0, 1), interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            if heads and i == 0:
                axes.set_title(heads[j], fontsize=SMALL, color=INK, pad=4, linespacing=1.2)
    return figure


def _check(rows: Sequence[tuple[str, np.ndarray]], captions: Sequence[str] | None) -> tuple[int, int, int]:
    if not rows:
        raise ValueError("no images to draw; pass at least one (label, images)")
    wanted = rows[0][1].shape
    for name, images in rows:
        if images.ndim != 4 or images.shape[-1] != 3 or not images.size:
            raise ValueError(f"the images of {name!r} have the shape {images.shape}; needed (n, height, width, 3)")
        if images.shape != wanted:
            raise ValueError(f"the images of {name!r} have the shape {images.shape}, those of {rows[0][0]!r} {wanted}")
        if not (images.min() >= -ROUNDING and images.max() <= 1 + ROUNDING):
            raise ValueError(
                f"the images of {name!r} must lie in [0, 1], found {images.min():g} to {images.max():g}; "
                f"divide 8-bit values by 255"
            )
    if captions is not None and len(captions) != wanted[0]:
        raise ValueError(f"{len(captions)} captions for {wanted[0]} columns of images")
    return wanted[0], wanted[1], wanted[2]
