"""Where the trials of a search are kept: Optuna's studies, in a database or a journal file.

`optuna-dashboard STORAGE` shows them.
"""

import importlib.util
import json
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from dicache.calibrate.methods import Axis, Between, CalibrationError

DIGESTED = ("conditions", "scheduler_config", "profile", "base")  # of an identity: names that say nothing to a reader
METRICS = ("macs_fraction", "psnr")
DIRECTIONS: tuple[Literal["minimize", "maximize"], ...] = ("minimize", "maximize")
JOURNAL = "journal:"
JOURNAL_ENDINGS = (".log", ".journal")
LOCK_PATIENCE = 10  # seconds after which the lock of a process that was killed is broken; appending takes milliseconds
ATTEMPTS = 5  # at a database whose tables another worker is making just now
HALF_MADE = (
    "already exists|duplicate key|UNIQUE constraint|no such table|relation .* does not exist|table schema|locked"
)
POSTGRES = "postgresql+psycopg:"


def open_study(storage: str, name: str, where: str, identity: Mapping[str, Any]) -> optuna.Study:
    """Return a study, begun or resumed.

    Args:
        storage: `sqlite:///FILE`, `postgresql://...` or another URL that SQLAlchemy knows; or a journal file, as
            `journal:FILE` or a path that ends in .log or .journal.
        name: Of the study in it.
        where: The storage in words, for messages.
        identity: All that the scores depend on.

    Raises:
        CalibrationError: If the storage cannot be used, or holds another search by this name.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    wanted = json.loads(json.dumps(identity))
    try:
        study = _created(storage, name)
        if study.user_attrs.get("identity") is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(METRICS))
            study.set_user_attr("identity", wanted)
        begun = study.user_attrs["identity"]
    except CalibrationError:
        raise
    except Exception as error:  # of the database and its driver, whichever they are
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(f"{where} cannot be used for a search: {said}") from error
    differing = [key for key in sorted({*begun, *wanted}) if begun.get(key) != wanted.get(key)]
    if differing:
        told = [
            f"other {key}" if key in DIGESTED else f"{key} {_brief(begun.get(key))}, now {_brief(wanted.get(key))}"
            for key in differing
        ]
        raise CalibrationError(
            f"{where} holds a search with other settings: {'; '.join(told)}. Search with those again to go on with it, "
            "or choose another --output or --storage"
        )
    return study


def _created(storage: str, name: str) -> optuna.Study:
    for attempt in range(ATTEMPTS):
        try:
            return optuna.create_study(
                storage=_storage(storage),
                study_name=name,
                directions=DIRECTIONS,
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(),  # what is tried is decided elsewhere: see `drawing`
            )
        except Exception as error:
            making = re.search(HALF_MADE, str(error))
            if making is None or attempt == ATTEMPTS - 1:
                raise
            time.sleep(1)
    raise AssertionError


def _storage(storage: str) -> BaseStorage:
    if is_journal(storage):
        return _journal(Path(storage.removeprefix(JOURNAL)))
    if storage.startswith(("postgresql:", "postgres:", POSTGRES)):
        if importlib.util.find_spec("psycopg") is None:
            raise CalibrationError(
                "a search in PostgreSQL needs its driver psycopg, which is not installed: "
                "pip install 'dicache[postgresql]'"
            )
        storage = POSTGRES + storage.partition(":")[2]
    return RDBStorage(storage)


def is_journal(storage: str) -> bool:
    return storage.startswith(JOURNAL) or (storage.endswith(JOURNAL_ENDINGS) and "://" not in storage)


def _journal(path: Path) -> JournalStorage:
    """Return a journal file, without the line that a process that was killed may have left half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(path), JournalFileSymlinkLock(str(path), LOCK_PATIENCE))
    if not _whole(path):
        lock = JournalFileSymlinkLock(str(path), LOCK_PATIENCE)
        lock.acquire()
        try:
            if not _whole(path):
                with path.open("r+b") as file:
                    file.truncate(file.read().rfind(b"\n") + 1)
        finally:
            lock.release()
    return JournalStorage(backend)


def _whole(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        value = {key: part for key, part in value.items() if part is not None}
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def distribution(name: str, axis: Axis) -> BaseDistribution:
    """Return what Optuna calls an axis.

    Raises:
        CalibrationError: If nothing is on it.
    """
    if isinstance(axis, Between):
        return FloatDistribution(axis.low, axis.high, log=axis.log)
    if not axis:
        raise CalibrationError(f"there is nothing to choose from for {name}; are there too few steps?")
    if isinstance(axis, range):
        return IntDistribution(axis[0], axis[-1], step=axis.step)
    return CategoricalDistribution(axis)


def axes_json(axes: Mapping[str, Axis]) -> dict[str, list[Any]]:
    """Return what is varied: a list of names, or the smallest and the largest number."""
    return {
        name: [axis.low, axis.high]
        if isinstance(axis, Between)
        else [axis[0], axis[-1]]
        if isinstance(axis, range) and axis
        else list(axis)
        for name, axis in axes.items()
    }


def versions() -> dict[str, str]:
    """Return those of what a search depends on."""
    import diffusers

    import dicache

    return {
        "dicache": dicache.__version__,
        "optuna": optuna.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
