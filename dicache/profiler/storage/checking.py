"""What a profile's file may hold, whoever made it: nothing outside of itself, and no more than it says.

HDF5 can point into other files, and its filters can make much of little. A profile has datasets of known kinds in
groups of one level, and measured rows that are each one chunk of shuffled and deflated numbers. These are inflated
here, to the size that they must have and no further.
"""

import zlib
from typing import Any

import h5py
import numpy as np

from dicache.anatomy.memory import host_memory
from dicache.profiler.profiles import ProfileError

MEASURED_FILTERS = [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE]
DEFLATED = 64  # bytes that numbers may grow by at most when they are deflated, beside a small share
RUNS = {"prompt": "O", "seed": "i", "status": "O"}  # kind of number or text


def check_file(file: Any) -> None:
    """Raise ProfileError unless all in a file is of the kinds that a profile has."""
    for name, item in _members(file):
        if isinstance(item, h5py.Group):
            for inner, dataset in _members(item):
                _check_dataset(f"{name}/{inner}", dataset)
        else:
            _check_dataset(name, item)


def numbers_of(file: Any, name: str) -> Any:
    """Return one of a profile's datasets.

    Raises:
        ProfileError: If what has its name is a group.
    """
    found = file[name]
    if not isinstance(found, h5py.Dataset):
        raise ProfileError(f"its {name} is no array of numbers or texts")
    return found


def check_room(name: str, size: int) -> None:
    """Raise ProfileError if so many bytes do not fit into memory."""
    if size > (free := host_memory()):
        raise ProfileError(f"its {name} takes {size:.3g} bytes of memory, and {free:.3g} are free")


def measured_rows(dataset: Any) -> np.ndarray:
    """Return all rows of a dataset of measurements."""
    check_room(dataset.name, dataset.nbytes)
    try:
        rows = np.empty(dataset.shape, dataset.dtype)
    except MemoryError:  # of a process that may take less than there is
        raise ProfileError(
            f"its {dataset.name} takes {dataset.nbytes:.3g} bytes of memory, more than can be had"
        ) from None
    for place in range(len(rows)):
        rows[place] = inflated(dataset, place)[0]
    return rows


def row_size(dataset: Any) -> int:
    """Return how many bytes a row of a dataset of measurements has."""
    size: int = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:], dtype=object))
    return size


def inflated(dataset: Any, place: int) -> tuple[np.ndarray, bytes]:
    """Return one row of a dataset of measurements, a chunk, inflated to its size and no further, and as it is stored.

    There must be room for it.
    """
    shape, kind, size = dataset.shape[1:], dataset.dtype, row_size(dataset)
    at = (place, *[0] * len(shape))
    if (stored := dataset.id.get_chunk_info_by_coord(at).size) > size + size // 500 + DEFLATED:
        raise ProfileError(f"row {place} of its {dataset.name} takes {stored} bytes for its {size}")
    left_out, deflated = dataset.id.read_direct_chunk(at)
    inflating = zlib.decompressobj()
    try:
        shuffled = b"" if left_out else inflating.decompress(deflated, size + 1)
    except zlib.error as error:
        raise ProfileError(f"row {place} of its {dataset.name} cannot be inflated ({error})") from None
    if len(shuffled) != size or not inflating.eof:
        raise ProfileError(f"row {place} of its {dataset.name} has not the {size} bytes that it should have")
    if inflating.unused_data:
        raise ProfileError(f"row {place} of its {dataset.name} takes {len(deflated)} bytes for its {size}")
    by_significance = np.frombuffer(shuffled, np.uint8).reshape(kind.itemsize, -1)
    return np.ascontiguousarray(by_significance.T).view(kind).reshape(shape), deflated


def texts(dataset: Any) -> list[str]:
    """Return a column of texts, each of which a file holds anew."""
    found, left = [], dataset.file.id.get_filesize()
    for place in range(len(dataset)):
        data = dataset[place]
        left -= len(data)
        if left < 0:
            raise ProfileError(f"its {dataset.name} is longer than the file")
        try:
            found.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            raise ProfileError(f"row {place} of its {dataset.name} is not text") from None
    return found


def _members(group: Any) -> list[tuple[str, Any]]:
    names = list(group)
    for name in names:
        if not isinstance(name, str):  # HDF5's names are bytes, which h5py cannot look up where they are not UTF-8
            raise ProfileError(f"the name {name!r} in it is not text")
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ProfileError(f"{name} in it is a link, which may lead to another file")
    return [(name, group[name]) for name in names]


def _check_dataset(name: str, item: Any) -> None:
    if not isinstance(item, h5py.Dataset) or not item.shape:
        raise ProfileError(f"{name} in it is no array of numbers or texts")
    try:
        kind_found = item.dtype.kind
    except (TypeError, ValueError) as error:  # of HDF5's types, more than NumPy has
        raise ProfileError(f"its {name} is of numbers that cannot be read ({error})") from None
    if item.is_virtual or item.external:
        raise ProfileError(f"the numbers of its {name} lie in another file")
    settings = item.id.get_create_plist()
    filters = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
    folder, _, column = name.partition("/")
    if folder in ("runs", "priors"):
        kind = RUNS.get(column, "?") if folder == "runs" else "f"
        text = kind != "O" or h5py.check_string_dtype(item.dtype) is not None
        column_too = folder == "priors" or item.ndim == 1
        if kind_found != kind or not text or not column_too or filters or item.nbytes > item.id.get_storage_size():
            raise ProfileError(f"its {name} is not stored as a profile's {folder} are")
    elif kind_found != "f" or filters != MEASURED_FILTERS or item.chunks != (1, *item.shape[1:]):
        raise ProfileError(
            f"its {name} is not stored as what a profile measures is: a row a run, shuffled and deflated"
        )
