"""The HDF5 file of a profile. The only package that imports h5py."""

from dicache.profiler.storage.layout import RunRecord, shapes
from dicache.profiler.storage.merging import merge
from dicache.profiler.storage.reading import array_shapes, has_priors, header, load, load_prior
from dicache.profiler.storage.writing import TABLE, Addition, PriorShape, adding, alone, append, create, remove

__all__ = [
    "TABLE",
    "Addition",
    "PriorShape",
    "RunRecord",
    "adding",
    "alone",
    "append",
    "array_shapes",
    "create",
    "has_priors",
    "header",
    "load",
    "load_prior",
    "merge",
    "remove",
    "shapes",
]
