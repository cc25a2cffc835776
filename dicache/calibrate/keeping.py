"""Arrays that are kept in a folder while a long calibration runs, so that it goes on where it was broken off."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Kept:
    """A folder of arrays.

    Attributes:
        folder: Named after all that they depend on; None keeps nothing.
    """

    folder: Path | None = None

    def get(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return an array that is kept, or make it and keep it; whoever reads sees all of it or nothing.

        Args:
            name: Without an ending.
            make: Called if there is none that can be read.
        """
        if self.folder is None:
            return make()
        file = self.folder / f"{name}.npy"
        try:
            kept: np.ndarray = np.load(file, allow_pickle=False)
            return kept
        except (OSError, ValueError, EOFError):
            made = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{name}.{os.getpid()}.part"
        with part.open("wb") as opened:
            np.save(opened, made, allow_pickle=False)
        os.replace(part, file)
        return made
