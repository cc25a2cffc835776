"""What was drawn, read back from a figure."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes


def table(axes: Axes) -> "np.ma.MaskedArray[Any, Any]":
    """Return the cells of the one image in a panel."""
    (image,) = axes.images
    return np.ma.asarray(image.get_array())


def colour_limits(axes: Axes) -> tuple[float, float]:
    """Return the ends of that image's colour scale."""
    low, high = axes.images[0].get_clim()
    assert low is not None
    assert high is not None
    return low, high


def points(axes: Axes) -> np.ndarray:
    """Return the places of a scatter's points, (n, 2)."""
    return np.asarray(axes.collections[0].get_offsets())
