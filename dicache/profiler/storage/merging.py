"""Join profiles of the same model and settings to one, as if it had been made in one go."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dicache.profiler.profiles import ProfileError, Provenance, Run
from dicache.profiler.storage.checking import check_room, inflated, numbers_of, row_size
from dicache.profiler.storage.layout import shapes
from dicache.profiler.storage.reading import header_of, of_file, opened
from dicache.profiler.storage.writing import PriorShape, alone, writing

Rows = list[tuple[Run, int, int]]  # of the joined file: the run, the file that it is from, its place there


def merge(files: Sequence[Path], output: Path) -> tuple[Run, ...]:
    """Write the runs of several profiles into one, in the order of their seeds; what was at `output` is replaced.

    Per-run rows are those of the files, bit for bit; the means of priors are weighed by their counts. A run that is in
    several files, with the same numbers, is taken once.

    Args:
        files: Of one model and settings, in any order.
        output: The file to write; it may be one of them.

    Returns:
        The runs of the new file.

    Raises:
        ProfileError: If the files differ in model or settings, hold other numbers of the same run, or hold priors of
            which some runs are in several of them.
    """
    with alone(output), ExitStack() as stack:
        sources = [stack.enter_context(Source(file)) for file in files]
        headers = [source.header for source in sources]
        first = headers[0][0]
        for file, (provenance, _) in zip(files, headers, strict=True):
            if differing := first.differences(provenance):
                raise ProfileError(
                    f"{file} cannot be joined with {files[0]}: it was made with another {', '.join(differing)}; needed "
                    "profiles of one model and one set of settings"
                )
        used, rows = _rows(sources, [runs for _, runs in headers], shapes(first))
        priors = _priors(sources)
        room = sum(file.stat().st_size for file in files)
        with writing(output, first, priors, room=room) as made:
            _copy_rows(sources, rows, made, first)
            for key in priors:
                _average([sources[place] for place in used], key, made["priors"][key])
    return tuple(run for run, _, _ in rows)


class Source:
    """A profile that is joined with others. What goes wrong in it says so.

    Args:
        path: Its file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with of_file(path):
            self._file = opened(path)

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def header(self) -> tuple[Provenance, tuple[Run, ...]]:
        """What it was made of, and its runs."""
        with of_file(self.path):
            return header_of(self.path, self._file)

    def check_rows(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ProfileError unless the rows of what has a name are of a shape, and a few of them fit into memory."""
        with of_file(self.path):
            numbers = numbers_of(self._file, name)
            if (found := numbers.shape[1:]) != shape:
                raise ProfileError(
                    f"{self.path} cannot be joined: a row of its {name} is of shape {found}, needed {shape}"
                )
            check_room(name, 2 * row_size(numbers))

    def row(self, name: str, place: int) -> tuple[np.ndarray, bytes]:
        """Return a row of what was measured, and as it is stored."""
        with of_file(self.path):
            return inflated(numbers_of(self._file, name), place)

    @property
    def priors(self) -> dict[str, PriorShape]:
        """The steps and the shape of each site's priors."""
        found: dict[str, PriorShape] = {}
        with of_file(self.path):
            priors = self._file.get("priors", {})
            if isinstance(priors, h5py.Dataset):
                raise ProfileError("its priors are no group")
            for key, dataset in priors.items():
                steps = np.array(dataset.attrs["steps"])
                if dataset.ndim != 4 or steps.shape != dataset.shape[1:2]:
                    raise ProfileError(f"the prior of {key} is not of as many steps as it says")
                found[key] = steps.tolist(), (dataset.shape[0], *dataset.shape[2:])
        return found

    def counts(self, key: str) -> np.ndarray:
        """Return how many runs the priors of a site are means of, (parts, steps)."""
        with of_file(self.path):
            dataset = self._file["priors"][key]
            counts = np.array(dataset.attrs["counts"])
            if counts.shape != dataset.shape[:2] or counts.dtype.kind not in "iu" or (counts < 0).any():
                raise ProfileError(f"the prior of {key} is not of as many parts and steps as it says")
            return counts

    def prior(self, key: str, part: int, step: int) -> np.ndarray:
        """Return the mean output of a site in one part at one of its steps, (tokens, channels)."""
        with of_file(self.path):
            return np.array(self._file["priors"][key][part, step], np.float64)


def _rows(
    sources: Sequence[Source], runs: Sequence[Sequence[Run]], names: dict[str, tuple[int, ...]]
) -> tuple[list[int], Rows]:
    """Return the files that hold runs of their own, and the rows of the joined file."""
    for source in sources:
        for name, shape in names.items():
            source.check_rows(name, shape)
    taken: dict[tuple[int, str], tuple[Run, int, int]] = {}
    used = []
    for place in sorted(range(len(sources)), key=lambda place: -len(runs[place])):
        source = sources[place]
        again = [(run, row) for row, run in enumerate(runs[place]) if run.key in taken]
        for run, row in again:
            other, file, there = taken[run.key]
            if run != other or not _equal(source, row, sources[file], there, names):
                raise ProfileError(
                    f"run {run.prompt!r} with seed {run.seed} has other numbers in {source.path} than in "
                    f"{sources[file].path}; leave one of the files out"
                )
        if again and len(again) < len(runs[place]) and source.priors:
            raise ProfileError(
                f"{source.path} has {len(again)} runs that another file has as well, and its priors are means of "
                "these and of others; make the runs again, each in one file"
            )
        if len(again) < len(runs[place]):
            used.append(place)
        for row, run in enumerate(runs[place]):
            taken.setdefault(run.key, (run, place, row))
    return used, [taken[key] for key in sorted(taken)]


def _equal(one: Source, row: int, other: Source, there: int, names: dict[str, tuple[int, ...]]) -> bool:
    return all(np.array_equal(one.row(name, row)[0], other.row(name, there)[0], equal_nan=True) for name in names)


def _copy_rows(sources: Sequence[Source], rows: Rows, made: Any, provenance: Provenance) -> None:
    for name in ("prompt", "seed", "status"):
        made[f"runs/{name}"].resize(len(rows), axis=0)
        made[f"runs/{name}"][:] = [getattr(run, name) for run, _, _ in rows]
    for name in shapes(provenance):
        into = made[name]
        into.resize(len(rows), axis=0)
        for place, (_, source, row) in enumerate(rows):
            numbers, stored = sources[source].row(name, row)
            if numbers.dtype == into.dtype:  # what is stored as it will be is not deflated again
                into.id.write_direct_chunk((place, *[0] * numbers.ndim), stored)
            else:
                into[place] = numbers


def _priors(sources: Sequence[Source]) -> dict[str, PriorShape]:
    """Return the sites, steps and shapes of the priors, which must be the same in all files."""
    first, *others = sources
    for source in others:
        if source.priors != first.priors:
            raise ProfileError(
                f"{source.path} and {first.path} hold priors of other sites or shapes, and cannot be joined"
            )
    return first.priors


def _average(sources: Sequence[Source], key: str, into: Any) -> None:
    """Write the mean of means, weighed by the number of runs that each is of."""
    if not sources:  # none of the files has a run
        return
    counts = np.array([source.counts(key) for source in sources])  # (files, parts, steps)
    for part, step in np.ndindex(counts.shape[1:]):
        total = np.zeros(into.shape[2:])
        for source, count in zip(sources, counts[:, part, step], strict=True):
            if count:  # what no run was added to is not written
                total += count * source.prior(key, part, step)
        into[part, step] = total / max(counts[:, part, step].sum(), 1)
    into.attrs["counts"] = counts.sum(axis=0)
