"""The HDF5 file of a profile. The only module that imports h5py.

Each run is added to a copy that then takes the file's place: whoever reads, or comes after a crash at any moment, finds
a whole file with all runs that were finished.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from dicache.anatomy import AnatomyError
from dicache.profiler.priors import Prior, Priors
from dicache.profiler.profiles import FORMAT, RATES, RESIDUALS, Profile, ProfileError, Provenance, Run
from dicache.schedules import ScheduleError

SITE_STATISTICS = ("diff_l1", "abs_l1", "dot", "norm2")
TEACACHE_SIGNALS = ("input", "residual", "body", "output")
ALIGNED = 4096  # bytes: whole pages of memory, for the means that are changed in place
MAGNITUDES = ("ratio", "ratio_deviation", "cosine_distance")
PriorShape = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class RunRecord:
    """The rows of one run.

    Attributes:
        run: Which.
        arrays: Every dataset without its runs axis.
    """

    run: Run
    arrays: Mapping[str, np.ndarray]


def shapes(provenance: Provenance) -> dict[str, tuple[int, ...]]:
    """Return the shape of each dataset of a profile, without its runs axis."""
    anatomy, steps = provenance.anatomy, len(provenance.target.timesteps or ())
    contexts, blocks, sites = len(provenance.contexts), len(anatomy.blocks), len(anatomy.sites)
    branches = len({key.partition(".")[2] for key in anatomy.sites})
    decisions = (contexts, steps, len(provenance.decision_blocks), len(RESIDUALS))
    motion = {"diff_l1": (*decisions, RATES), "abs_l1": decisions, "between_frames": decisions}
    return {
        **{f"sites/{name}": (contexts, steps, sites, provenance.lags) for name in SITE_STATISTICS},
        "delta/gram": (contexts, steps, 2 * blocks, 2 * blocks),
        "delta/cosine": (contexts, steps, blocks),
        **{f"teacache/{name}": (contexts, steps, 2) for name in (*TEACACHE_SIGNALS, *provenance.time_signals)},
        "magnitude": (contexts, steps, len(MAGNITUDES)),
        **_first_block_shapes(provenance, contexts, steps),
        "body/weights": (steps, sum(provenance.parts)),
        "body/gram": (steps, steps),
        "body/output": (steps, steps),
        "body/branches": (branches, steps, steps),
        **({f"motion/{name}": shape for name, shape in motion.items()} if provenance.decision_blocks else {}),
    }


def _first_block_shapes(provenance: Provenance, contexts: int, steps: int) -> dict[str, tuple[int, ...]]:
    counts = len(provenance.first_blocks)
    if not counts:
        return {}
    size = (contexts, steps, counts)
    return {"first_block/size": size, "first_block/change": (*size, provenance.first_block_lags)}


def create(path: Path, provenance: Provenance, priors: Mapping[str, PriorShape] | None = None) -> None:
    """Write a profile without runs, in place of whatever was there.

    Args:
        path: Of the file.
        provenance: Where it comes from.
        priors: Sites whose mean outputs are kept, with their steps and the shape of an output: (parts of all passes,
            tokens, channels).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        _replacing(path) as part,
        h5py.File(part, "w", alignment_threshold=ALIGNED, alignment_interval=ALIGNED) as file,
    ):
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
        with h5py.File(self._part, "r+") as file:
            columns = {f"runs/{name}": value for name, value in vars(record.run).items()}
            for name, value in {**columns, **record.arrays}.items():
                dataset = file[name]
                dataset.resize(len(dataset) + 1, axis=0)
                dataset[-1] = value
            for key, prior in priors.sites.items():
                file[f"priors/{key}"].attrs["counts"] = prior.counts

    def _copy(self) -> Priors:
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


def load(path: str | os.PathLike[str]) -> Profile:
    """Read a profile. Its arrays are read from the file when they are first asked for.

    Raises:
        ProfileError: If the file is missing, cut off, or not a profile.
    """
    path = Path(path)
    with _reading(path) as file:
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
    with _reading(Path(path)) as file:
        if f"priors/{site}" not in file:
            raise ProfileError(f"{path} has no prior of {site}; profile again with --priors")
        dataset = file[f"priors/{site}"]
        steps = np.array(dataset.attrs["steps"])
        whole = np.flatnonzero((dataset.attrs.get("counts", np.ones((1, len(steps)))) > 0).all(axis=0))
        return tuple(steps[whole].tolist()), dataset[:, whole]


def has_priors(path: str | os.PathLike[str]) -> bool:
    """Return whether a profile has mean outputs of any site."""
    with _reading(Path(path)) as file:
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
            with _reading(self._path) as file:
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
    with _reading(Path(path)) as file:
        return _provenance(path, file), _runs(file)


def array_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every dataset in a profile by its name."""
    found: dict[str, tuple[int, ...]] = {}
    with _reading(Path(path)) as file:
        file.visititems(lambda name, item: found.update({f"/{name}": item.shape}) if hasattr(item, "shape") else None)
    return found


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
        raise ProfileError(f"{path} is not a profile: found format {found!r}, needed {FORMAT!r}; profile again")
    try:
        return Provenance.from_json(json.loads(file.attrs["provenance"]))
    except (KeyError, TypeError, ValueError, AnatomyError, ScheduleError) as error:
        raise ProfileError(f"{path}: its provenance cannot be read ({error}); profile again") from None


def _runs(file: Any) -> tuple[Run, ...]:
    prompts, statuses = (file[f"runs/{name}"].asstr()[:] for name in ("prompt", "status"))
    return tuple(Run(p, int(s), t) for p, s, t in zip(prompts, file["runs/seed"][:], statuses, strict=True))
