"""Join profiles of the same model and settings to one, as if it had been made in one go."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dicache.profiler.profiles import ProfileError, Provenance, Run
from dicache.profiler.storage.checking import check_room, inflated, measured_row, numbers_of, row_size
from dicache.profiler.storage.layout import shapes
from dicache.profiler.storage.reading import header, reading
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
    headers = [header(file) for file in files]
    first = headers[0][0]
    for file, (provenance, _) in zip(files, headers, strict=True):
        if differing := first.differences(provenance):
            raise ProfileError(
                f"{file} cannot be joined with {files[0]}: it was made with another {', '.join(differing)}; needed "
                "profiles of one model and one set of settings"
            )
    with alone(output), ExitStack() as stack:
        opened = [stack.enter_context(reading(file)) for file in files]
        used, rows = _rows(files, opened, [runs for _, runs in headers], shapes(first))
        priors = _priors(files, opened)
        room = sum(file.stat().st_size for file in files)
        with writing(output, first, priors, room=room) as made:
            _copy_rows(files, opened, rows, made, first)
            for key in priors:
                _average([opened[place]["priors"][key] for place in used], made["priors"][key])
    return tuple(run for run, _, _ in rows)


def _rows(
    files: Sequence[Path], opened: Sequence[Any], runs: Sequence[Sequence[Run]], names: dict[str, tuple[int, ...]]
) -> tuple[list[int], Rows]:
    """Return the files that hold runs of their own, and the rows of the joined file."""
    taken: dict[tuple[int, str], tuple[Run, int, int]] = {}
    used = []
    for place in sorted(range(len(files)), key=lambda place: -len(runs[place])):
        again = [(run, row) for row, run in enumerate(runs[place]) if run.key in taken]
        for run, row in again:
            other, file, there = taken[run.key]
            if run != other or not _equal(opened[place], row, opened[file], there, names):
                raise ProfileError(
                    f"run {run.prompt!r} with seed {run.seed} has other numbers in {files[place]} than in "
                    f"{files[file]}; leave one of the files out"
                )
        if again and len(again) < len(runs[place]) and "priors" in opened[place]:
            raise ProfileError(
                f"{files[place]} has {len(again)} runs that another file has as well, and its priors are means of "
                "these and of others; make the runs again, each in one file"
            )
        if len(again) < len(runs[place]):
            used.append(place)
        for row, run in enumerate(runs[place]):
            taken.setdefault(run.key, (run, place, row))
    return used, [taken[key] for key in sorted(taken)]


def _equal(one: Any, row: int, other: Any, there: int, names: dict[str, tuple[int, ...]]) -> bool:
    return all(
        np.array_equal(
            measured_row(numbers_of(one, name), row), measured_row(numbers_of(other, name), there), equal_nan=True
        )
        for name in names
    )


def _copy_rows(files: Sequence[Path], opened: Sequence[Any], rows: Rows, made: Any, provenance: Provenance) -> None:
    for name in ("prompt", "seed", "status"):
        made[f"runs/{name}"].resize(len(rows), axis=0)
        made[f"runs/{name}"][:] = [getattr(run, name) for run, _, _ in rows]
    for name, shape in shapes(provenance).items():
        into, sources = made[name], [numbers_of(file, name) for file in opened]
        into.resize(len(rows), axis=0)
        for file, source in zip(files, sources, strict=True):
            if source.shape[1:] != shape:
                found = source.shape[1:]
                raise ProfileError(f"{file} cannot be joined: a row of its {name} is of shape {found}, needed {shape}")
            check_room(name, 2 * row_size(source))
        for place, (_, source_place, row) in enumerate(rows):
            numbers, stored = inflated(sources[source_place], row)
            if numbers.dtype == into.dtype:  # what is stored as it will be is not deflated again
                into.id.write_direct_chunk((place, *[0] * numbers.ndim), stored)
            else:
                into[place] = numbers


def _priors(files: Sequence[Path], opened: Sequence[Any]) -> dict[str, PriorShape]:
    """Return the sites, steps and shapes of the priors, which must be the same in all files."""
    found: list[dict[str, PriorShape]] = [
        {
            key: (dataset.attrs["steps"].tolist(), (dataset.shape[0], *dataset.shape[2:]))
            for key, dataset in file.get("priors", {}).items()
        }
        for file in opened
    ]
    for file, priors in zip(files, found, strict=True):
        if priors != found[0]:
            raise ProfileError(f"{file} and {files[0]} hold priors of other sites or shapes, and cannot be joined")
    return found[0]


def _average(sources: Sequence[Any], into: Any) -> None:
    """Write the mean of means, weighed by the number of runs that each is of."""
    counts = np.array([source.attrs["counts"] for source in sources])  # (files, parts, steps)
    for part, step in np.ndindex(counts.shape[1:]):
        total = np.zeros(into.shape[2:])
        for source, count in zip(sources, counts[:, part, step], strict=True):
            if count:  # what no run was added to is not written
                total += count * source[part, step].astype(np.float64)
        into[part, step] = total / max(counts[:, part, step].sum(), 1)
    into.attrs["counts"] = counts.sum(axis=0)
