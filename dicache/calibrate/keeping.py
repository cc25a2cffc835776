"""Arrays that are kept in a folder while a long calibration runs, so that it goes on where it was interrupted."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from dicache.evaluate.rerunning import Reruns
from dicache.schedules.replacing import replacing


@dataclass(frozen=True)
class Kept:
    """A folder of arrays.

    Attributes:
        folder: Named after all that they depend on; None keeps nothing.
    """

    folder: Path | None = None

    def get(self, name: str, runs: Reruns, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return an array that is kept, or make it and keep it; whoever reads sees all of it or nothing.

        What an array cost is kept with it and counted again, so that a search that goes on does what an undisturbed one
        does.

        Args:
            name: Without an ending.
            runs: That it is made with.
            make: Called if there is none that can be read.
        """
        if self.folder is None:
            return make()
        file = self.folder / f"{name}.npz"
        try:
            with np.load(file, allow_pickle=False) as kept:
                array: np.ndarray = kept["array"]
                spent = float(kept["spent"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            before = runs.spent
            array = make()
            with replacing(file) as part, part.open("wb") as opened:
                np.savez(opened, array=array, spent=runs.spent - before)
        else:
            runs.spent += spent
        return array
