"""Pictures of profiles, schedules and images. The only package that imports matplotlib.

Every function returns a `matplotlib.figure.Figure` of its own and leaves matplotlib's global state alone, so that it
works without a display, in notebooks and in threads. `save` writes one to a file.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dicache.figures.convergence import branch_convergence
    from dicache.figures.delta import delta_map
    from dicache.figures.grid import image_grid
    from dicache.figures.motion import motion_rates
    from dicache.figures.schedule import schedule_strip
    from dicache.figures.similarity import similarity_maps
    from dicache.figures.spectrum import error_spectra, spectra
    from dicache.figures.teacache import teacache_fit
    from dicache.figures.trajectory import drift
    from dicache.figures.trend import trend_maps

__all__ = [
    "SUFFIXES",
    "FigureError",
    "branch_convergence",
    "delta_map",
    "drift",
    "error_spectra",
    "image_grid",
    "motion_rates",
    "save",
    "schedule_strip",
    "similarity_maps",
    "spectra",
    "teacache_fit",
    "trend_maps",
]


class FigureError(ValueError):
    """A picture cannot be drawn or written as asked."""


SUFFIXES = (".png", ".svg", ".pdf")


def save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Write a figure in the format that the suffix names, in one go: a reader never sees a part of it.

    Raises:
        FigureError: If the suffix is not one of `SUFFIXES`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        found = f"the suffix {path.suffix!r}" if suffix else "no suffix"
        raise FigureError(f"{path} has {found}; a figure is written as one of {', '.join(SUFFIXES)}")
    from dicache.schedules.replacing import replacing  # not for those who only ask for this package

    with replacing(path) as part:
        figure.savefig(part, format=suffix[1:])


# matplotlib takes a second to import, and `dicache --help` does not need it.
_HOMES = {
    "branch_convergence": "convergence",
    "delta_map": "delta",
    "drift": "trajectory",
    "error_spectra": "spectrum",
    "image_grid": "grid",
    "motion_rates": "motion",
    "schedule_strip": "schedule",
    "similarity_maps": "similarity",
    "spectra": "spectrum",
    "teacache_fit": "teacache",
    "trend_maps": "trend",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
