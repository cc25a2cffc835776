"""Read a profile."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dicache.profiler.profiles import FORMAT, Profile, ProfileError, Provenance, Run
from dicache.profiler.storage.checking import check_file, check_room, measured_rows, numbers_of, texts
from dicache.profiler.storage.layout import shapes
from dicache.schedules.documents import parse, shortened, wrong_format


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
            found, needed = numbers_of(file, name).shape, (len(runs), *shape)
            if found != needed:
                raise ProfileError(f"{path}: found {name} of shape {found}, needed {needed}; profile again")
    return Profile(provenance, runs, _Arrays(path, tuple(shapes(provenance)), runs))


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
        counts = np.array(dataset.attrs.get("counts", np.ones((1, len(steps)), np.int64)))
        if dataset.ndim != 4 or steps.shape != dataset.shape[1:2] or counts.shape[1:] != steps.shape:
            raise ProfileError(f"{path}: the prior of {site} is not of as many steps as it says; profile again")
        whole = np.flatnonzero((counts > 0).all(axis=0))
        check_room(dataset.name, 2 * dataset.nbytes)
        return tuple(steps[whole].tolist()), dataset[:, whole]


def has_priors(path: str | os.PathLike[str]) -> bool:
    """Return whether a profile has mean outputs of any site."""
    with reading(Path(path)) as file:
        return "priors" in file


class _Arrays(Mapping[str, np.ndarray]):
    """The datasets of a profile by name, without the rows of failed runs, each read once."""

    def __init__(self, path: Path, names: tuple[str, ...], runs: tuple[Run, ...]) -> None:
        self._path, self._names, self._runs = path, names, runs
        self._ok = np.array([run.ok for run in runs])
        self._read: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._read:
            with reading(self._path) as file:
                if _runs(file) != self._runs:
                    raise ProfileError("runs were added to it since it was loaded; load it again")
                rows = measured_rows(numbers_of(file, name))
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
        return header_of(path, file)


def header_of(path: str | os.PathLike[str], file: Any) -> tuple[Provenance, tuple[Run, ...]]:
    """Read the same of a profile that is open."""
    return _provenance(path, file), _runs(file)


def array_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every dataset in a profile by its name."""
    found: dict[str, tuple[int, ...]] = {}
    with reading(Path(path)) as file:
        file.visititems(lambda name, item: found.update({f"/{name}": item.shape}) if hasattr(item, "shape") else None)
    return found


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Open a profile, whoever made it.

    Raises:
        ProfileError: If it is missing, holds what no profile does, or cannot be read, now or later in the block.
    """
    with of_file(path), opened(path) as file:
        yield file


def opened(path: Path) -> Any:
    """Return a profile, whoever made it, opened; what goes wrong is told by `of_file`."""
    if not path.is_file():
        raise ProfileError(f"{path} does not exist; make a profile with `dicache profile --model ...`")
    file = h5py.File(path, "r")
    try:
        _check_format(file)
        check_file(file)
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def of_file(path: Path) -> Iterator[None]:
    """Say of what goes wrong inside, as a ProfileError, which file it is in."""
    try:
        yield
    except (OSError, KeyError, RuntimeError) as error:
        raise ProfileError(f"{path} cannot be read as a profile ({error}); was it cut off? Profile again") from None
    except ProfileError as error:
        said = shortened(error)
        raise ProfileError(said if said.startswith(str(path)) else f"{path}: {said}") from None


def _check_format(file: Any) -> None:
    found = file.attrs.get("format")
    if not isinstance(found, str) or found != FORMAT:
        said = wrong_format(found, FORMAT, file.attrs.get("dicache"))
        raise ProfileError(f"not a profile: {said}")


def _provenance(path: str | os.PathLike[str], file: Any) -> Provenance:
    try:
        return Provenance.from_json(parse(file.attrs["provenance"], finite=False))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProfileError(f"{path}: its provenance cannot be read ({error}); profile again") from None


def _runs(file: Any) -> tuple[Run, ...]:
    prompts, statuses = (texts(numbers_of(file, f"runs/{name}")) for name in ("prompt", "status"))
    seeds = numbers_of(file, "runs/seed")[:].tolist()
    if not len(prompts) == len(statuses) == len(seeds):
        raise ProfileError(f"it has {len(prompts)} prompts, {len(seeds)} seeds and {len(statuses)} states of runs")
    return tuple(map(Run, prompts, seeds, statuses))
