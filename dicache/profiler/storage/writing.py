"""Write a profile.

Each run is added to a copy that then takes the file's place: whoever reads, or comes after a crash at any moment, finds
a whole file with all runs that were finished.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

from dicache.profiler.priors import Prior, Priors
from dicache.profiler.profiles import FORMAT, ProfileError, Provenance
from dicache.profiler.storage.layout import RunRecord, shapes

ALIGNED = 4096  # bytes: whole pages of memory, for the means that are changed in place
TABLE = 10_000  # bytes of HDF5's own for each dataset
DEFLATED = 1.001  # of its size, that a row takes at most which deflate cannot make smaller
ZEROS = bytes(2**20)
PriorShape = tuple[Sequence[int], Sequence[int]]


def create(path: Path, provenance: Provenance, priors: Mapping[str, PriorShape] | None = None) -> None:
    """Write a profile without runs, in place of whatever was there.

    Args:
        path: Of the file.
        provenance: Where it comes from.
        priors: Sites whose mean outputs are kept, with their steps and the shape of an output: (parts of all passes,
            tokens, channels).
    """
    with writing(path, provenance, priors):
        pass


@contextmanager
def writing(
    path: Path, provenance: Provenance, priors: Mapping[str, PriorShape] | None = None, *, room: int = 0
) -> Iterator[Any]:
    """Begin a profile without runs; it takes the place of what was there when the block is left without an error.

    Args:
        path: Of the file.
        provenance: Where it comes from.
        priors: As `create` takes them.
        room: Bytes on the disk that will be needed besides.

    Yields:
        The open file.

    Raises:
        ProfileError: If there is no such room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as part, ExitStack() as stack:
        means = [4 * len(steps) * math.prod(output) for steps, output in (priors or {}).values()]
        _reserve(path, part, room + sum(means) + TABLE * (len(shapes(provenance)) + len(means)))
        file = h5py.File(part, "w", alignment_threshold=ALIGNED, alignment_interval=ALIGNED)
        stack.enter_context(file)
        file.attrs["format"] = FORMAT
        file.attrs["provenance"] = json.dumps(provenance.to_json())
        text = h5py.string_dtype()
        for name, kind in (("prompt", text), ("seed", np.int64), ("status", text)):
            file.create_dataset(f"runs/{name}", shape=(0,), maxshape=(None,), dtype=kind, chunks=(64,))
        for name, shape in shapes(provenance).items():
            file.create_dataset(
                name,
                shape=(0, *shape),
                maxshape=(None, *shape),
                chunks=(1, *shape),
                dtype=np.float64,
                compression="gzip",
                shuffle=True,
            )
        for key, prior in (priors or {}).items():
            _create_prior(file.require_group("priors"), key, prior)
        yield file


NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # a file system that has none; HDF5 goes on without


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes from writing a profile while the block runs.

    Raises:
        ProfileError: If another one does, or its folder cannot be written to.
    """
    lock = _lock_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        holding = _locked(lock)
    except OSError as error:
        if error.errno in (None, errno.EAGAIN):  # none: it is open in this process
            raise ProfileError(f"{path} is being written already; wait for that, or choose another -o") from None
        raise ProfileError(f"{path} cannot be written ({os.strerror(error.errno)}); choose another -o") from None
    with holding:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _locked(lock: Path) -> Any:
    """Return a file that is locked until it is closed or the process ends.

    Raises:
        OSError: If it is locked already.
    """
    if fcntl is None:
        return h5py.File(lock, "w")  # locked by HDF5, if that is not told not to
    holding = lock.open("ab")
    try:
        fcntl.flock(holding, fcntl.LOCK_EX | fcntl.LOCK_NB)
        removed = not lock.exists() or not os.path.samestat(os.fstat(holding.fileno()), lock.stat())
        if removed:  # by whoever held it until now
            raise BlockingIOError(errno.EAGAIN, "locked")
    except OSError as error:
        holding.close()
        if error.errno in NO_LOCKS:
            return h5py.File(lock, "w")
        raise
    return holding


def append(path: Path, record: RunRecord) -> None:
    """Add one run to a profile."""
    with adding(path) as addition:
        addition.write(record)


@contextmanager
def adding(path: Path) -> Iterator["Addition"]:
    """Begin a run, which is in the profile when the block is left without an error.

    Raises:
        ProfileError: If the profile holds priors in the form of an older version.
    """
    with _replacing(path) as part:
        yield Addition(path, part)


class Addition:
    """A copy of a profile, to which a run is added; made when it is first needed."""

    def __init__(self, path: Path, part: Path) -> None:
        self._path, self._part = path, part

    @cached_property
    def priors(self) -> Priors:
        """Takes the outputs of the run, where the profile holds priors."""
        return self._copy()

    def drop(self) -> None:
        """Take the profile as it was, without what was added since."""
        self.priors = self._copy()

    def write(self, record: RunRecord) -> None:
        """Add what was recorded. The outputs of a run that failed are no part of the priors."""
        priors = self.priors if record.run.ok else self._copy()
        priors.flush()
        rows = sum(array.nbytes for array in record.arrays.values())
        _reserve(self._path, self._part, math.ceil(DEFLATED * rows) + TABLE * len(record.arrays))
        with h5py.File(self._part, "r+") as file:
            columns = {f"runs/{name}": value for name, value in vars(record.run).items()}
            for name, value in {**columns, **record.arrays}.items():
                dataset = file[name]
                dataset.resize(len(dataset) + 1, axis=0)
                dataset[-1] = value
            for key, prior in priors.sites.items():
                file[f"priors/{key}"].attrs["counts"] = prior.counts

    def _copy(self) -> Priors:
        with _said(self._path):
            shutil.copyfile(self._path, self._part)
        sites = {}
        with h5py.File(self._part, "r") as file:
            for key, dataset in file.get("priors", {}).items():
                start = dataset.id.get_offset()
                if start is None:
                    raise ProfileError(f"{self._path} holds priors in the form of an older version; choose another -o")
                means = torch.from_numpy(np.memmap(self._part, np.float32, "r+", start, dataset.shape))
                steps = tuple(int(step) for step in dataset.attrs["steps"])
                sites[key] = Prior(steps, dataset.attrs["counts"][:], means)
        return Priors(sites)


def _create_prior(group: Any, key: str, shape: PriorShape) -> None:
    """Make room for the mean outputs of a site, in one piece, so that they can be changed in place."""
    steps, (parts, *output) = shape
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple((parts, len(steps), *output))
    h5py.h5d.create(group.id, key.encode(), h5py.h5t.IEEE_F32LE, space, settings)
    group[key].attrs["steps"] = steps
    group[key].attrs["counts"] = np.zeros((parts, len(steps)), np.int64)


def remove(path: Path) -> None:
    """Remove a profile, and what a process left beside it that was killed while it wrote."""
    for file in (path, _part_of(path), _lock_of(path)):
        file.unlink(missing_ok=True)


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    part = _part_of(path)
    try:
        yield part
        with _said(path), part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _reserve(path: Path, part: Path, size: int) -> None:
    """See that so many bytes fit behind a file: HDF5, which cuts them off again, breaks down on a full disk."""
    with _said(path), part.open("ab") as file:
        for start in range(0, size, len(ZEROS)):
            file.write(ZEROS[: size - start])
        file.flush()


@contextmanager
def _said(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ProfileError(
            f"{path} cannot be written ({error.strerror}); what it held before is untouched: make room on the disk, "
            "and go on with --resume"
        ) from error
