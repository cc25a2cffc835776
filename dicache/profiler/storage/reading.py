"""Read a profile."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dicache.anatomy import AnatomyError
from dicache.profiler.profiles import FORMAT, Profile, ProfileError, Provenance, Run
from dicache.profiler.storage.layout import shapes
from dicache.schedules import ScheduleError


def load(path: str | os.PathLike[str]) -> Profile:
    """Read a profile. Its arrays are read from the file when they are first asked for.

    Raises:
        ProfileError: If the file is missing, cut off, or not a profile.
    """
    path = Path(path)
    with reading(path) as file:
        provenance = _provenance(path, file)
        runs = _runs(file)
        for name, shape in shapes(provenance).items():
            if file[name].shape != (len(runs), *shape):
                found, needed = file[name].shape, (len(runs), *shape)
                raise ProfileError(f"{path}: found {name} of shape {found}, needed {needed}; profile again")
    return Profile(provenance, runs, _Arrays(path, tuple(shapes(provenance)), np.array([run.ok for run in runs])))


def load_prior(path: str | os.PathLike[str], site: str) -> tuple[tuple[int, ...], np.ndarray]:
    """Read the mean outputs of one site over all runs.

    Returns:
        The steps, and the means, (parts of all passes, steps, tokens, channels) in float32.

    Raises:
        ProfileError: If the profile has no priors of this site.
    """
    with reading(Path(path)) as file:
        if f"priors/{site}" not in file:
            raise ProfileError(f"{path} has no prior of {site}; profile again with --priors")
        dataset = file[f"priors/{site}"]
        steps = np.array(dataset.attrs["steps"])
        whole = np.flatnonzero((dataset.attrs.get("counts", np.ones((1, len(steps)))) > 0).all(axis=0))
        return tuple(steps[whole].tolist()), dataset[:, whole]


def has_priors(path: str | os.PathLike[str]) -> bool:
    """Return whether a profile has mean outputs of any site."""
    with reading(Path(path)) as file:
        return "priors" in file


class _Arrays(Mapping[str, np.ndarray]):
    """The datasets of a profile by name, without the rows of failed runs, each read once."""

    def __init__(self, path: Path, names: tuple[str, ...], ok: np.ndarray) -> None:
        self._path, self._names, self._ok = path, names, ok
        self._read: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._read:
            with reading(self._path) as file:
                rows = file[name][: len(self._ok)]
            self._read[name] = rows if self._ok.all() else rows[self._ok]
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def header(path: str | os.PathLike[str]) -> tuple[Provenance, tuple[Run, ...]]:
    """Read where a profile came from and which runs it has, without its measurements.

    Raises:
        ProfileError: If the file is missing, cut off, or not a profile.
    """
    with reading(Path(path)) as file:
        return _provenance(path, file), _runs(file)


def array_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every dataset in a profile by its name."""
    found: dict[str, tuple[int, ...]] = {}
    with reading(Path(path)) as file:
        file.visititems(lambda name, item: found.update({f"/{name}": item.shape}) if hasattr(item, "shape") else None)
    return found


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Open a profile.

    Raises:
        ProfileError: If it is missing or cannot be read, now or later in the block.
    """
    if not path.is_file():
        raise ProfileError(f"{path} does not exist; make a profile with `dicache profile --model ...`")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(f"{path} cannot be read as a profile ({error}); was it cut off? Profile again") from None


def _provenance(path: str | os.PathLike[str], file: Any) -> Provenance:
    found = file.attrs.get("format")
    if found != FORMAT:
        raise ProfileError(f"{path} is not a profile: found format {found!r}, needed {FORMAT!r}; profile again")
    try:
        return Provenance.from_json(json.loads(file.attrs["provenance"]))
    except (KeyError, TypeError, ValueError, AnatomyError, ScheduleError) as error:
        raise ProfileError(f"{path}: its provenance cannot be read ({error}); profile again") from None


def _runs(file: Any) -> tuple[Run, ...]:
    prompts, statuses = (file[f"runs/{name}"].asstr()[:] for name in ("prompt", "status"))
    return tuple(Run(p, int(s), t) for p, s, t in zip(prompts, file["runs/seed"][:], statuses, strict=True))
