"""The HDF5 file of a profile. The only module that imports h5py.

Each run is added to a copy that then takes the file's place: whoever reads, or comes after a crash at any moment, finds
a whole file with all runs that were finished.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dicache.anatomy import AnatomyError
from dicache.profiler.profiles import FORMAT, Profile, ProfileError, Provenance, Run
from dicache.schedules import ScheduleError

SITE_STATISTICS = ("diff_l1", "abs_l1", "dot", "norm2")
TEACACHE_SIGNALS = ("input", "residual", "body", "output")
DATASETS = (
    *(f"sites/{name}" for name in SITE_STATISTICS),
    "delta/cosine",
    *(f"teacache/{name}" for name in TEACACHE_SIGNALS),
)


@dataclass(frozen=True)
class RunRecord:
    """The rows of one run: `arrays` has every dataset of `DATASETS` without its runs axis."""

    run: Run
    arrays: Mapping[str, np.ndarray]


def create(path: Path, provenance: Provenance) -> None:
    """Write a profile without runs, in place of whatever was there."""
    anatomy, steps = provenance.anatomy, len(provenance.target.timesteps or ())
    head = (len(provenance.contexts), steps)
    shapes: dict[str, tuple[int, ...]] = {
        name: (*head, len(anatomy.sites), provenance.lags) for name in DATASETS if name.startswith("sites/")
    }
    shapes |= {"delta/cosine": (*head, len(anatomy.blocks))}
    shapes |= {name: (*head, 2) for name in DATASETS if name.startswith("teacache/")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as part, h5py.File(part, "w") as file:
        file.attrs["format"] = FORMAT
        file.attrs["provenance"] = json.dumps(provenance.to_json())
        text = h5py.string_dtype()
        for name, kind in (("prompt", text), ("seed", np.int64), ("status", text)):
            file.create_dataset(f"runs/{name}", shape=(0,), maxshape=(None,), dtype=kind, chunks=(64,))
        for name, shape in shapes.items():
            file.create_dataset(
                name,
                shape=(0, *shape),
                maxshape=(None, *shape),
                chunks=(1, *shape),
                dtype=np.float64,
                compression="gzip",
                shuffle=True,
            )


def append(path: Path, record: RunRecord) -> None:
    """Add one run to a profile."""
    with _replacing(path) as part:
        shutil.copyfile(path, part)
        with h5py.File(part, "r+") as file:
            columns = {f"runs/{name}": value for name, value in vars(record.run).items()}
            for name, value in {**columns, **record.arrays}.items():
                dataset = file[name]
                dataset.resize(len(dataset) + 1, axis=0)
                dataset[-1] = value


def load(path: str | os.PathLike[str]) -> Profile:
    """Read a profile.

    Raises:
        ProfileError: If the file is missing, cut off, or not a profile.
    """
    with _reading(Path(path)) as file:
        provenance = _provenance(path, file)
        runs = _runs(file)
        ok = np.array([run.ok for run in runs], dtype=bool)
        arrays = {name: file[name][:][ok] for name in DATASETS}
    return Profile(
        provenance=provenance,
        runs=runs,
        sites={name: arrays[f"sites/{name}"] for name in SITE_STATISTICS},
        delta_cosine=arrays["delta/cosine"],
        teacache={name: arrays[f"teacache/{name}"] for name in TEACACHE_SIGNALS},
    )


def header(path: str | os.PathLike[str]) -> tuple[Provenance, tuple[Run, ...]]:
    """Read where a profile came from and which runs it has, without its measurements.

    Raises:
        ProfileError: If the file is missing, cut off, or not a profile.
    """
    with _reading(Path(path)) as file:
        return _provenance(path, file), _runs(file)


def array_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every dataset in a profile by its name."""
    shapes: dict[str, tuple[int, ...]] = {}
    with _reading(Path(path)) as file:
        file.visititems(lambda name, item: shapes.update({f"/{name}": item.shape}) if hasattr(item, "shape") else None)
    return shapes


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
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
        raise ProfileError(f"{path} is not a profile: found format {found!r}, needed {FORMAT!r}")
    try:
        return Provenance.from_json(json.loads(file.attrs["provenance"]))
    except (KeyError, TypeError, ValueError, AnatomyError, ScheduleError) as error:
        raise ProfileError(f"{path}: its provenance cannot be read ({error}); profile again") from None


def _runs(file: Any) -> tuple[Run, ...]:
    prompts, statuses = (file[f"runs/{name}"].asstr()[:] for name in ("prompt", "status"))
    return tuple(Run(p, int(s), t) for p, s, t in zip(prompts, file["runs/seed"][:], statuses, strict=True))
