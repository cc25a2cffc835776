"""What a profile needs of memory and disk, found out before it is made."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from dicache.profiler import storage
from dicache.profiler.profiles import ProfileError, Provenance
from dicache.profiler.recorder import Recorder


@dataclass(frozen=True)
class Need:
    """What a profile needs, as it was measured in the first step of a run.

    Attributes:
        device: Bytes on the model's device, beside model and activations.
        host: Bytes of main memory.
        disk: Bytes of the finished file at most; while a run is added, its copy needs as much again.
    """

    device: int
    host: int
    disk: int

    def __str__(self) -> str:
        parts = {"on the model's device": self.device, "of main memory": self.host, "on disk at most": self.disk}
        return ", ".join(f"{byte_size(size)} {where}" for where, size in parts.items())


def byte_size(size: float) -> str:
    """Write a number of bytes: `31.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def need_of(recorder: Recorder, provenance: Provenance, runs: int) -> Need:
    steps = len(provenance.target.timesteps or ())
    shapes = storage.shapes(provenance)
    rows = sum(8 * math.prod(shape) for shape in shapes.values())
    priors = sum(4 * len(kept) * math.prod(shape) for kept, shape in recorder.priors.values())
    tables = storage.TABLE * (len(shapes) + len(recorder.priors))
    return Need(recorder.bytes, steps * recorder.bytes_a_step, runs * rows + priors + tables)


def check_need(need: Need, max_memory: int | None, output: Path) -> None:
    most = max(need.device, need.host)
    if max_memory is not None and most > max_memory:
        raise ProfileError(
            f"needs {need}, which is above the {byte_size(max_memory)} of --max-memory; take fewer --lags, "
            "--priors-for in the place of --priors, or a smaller size"
        )
    folder = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if 2 * need.disk > free:
        raise ProfileError(
            f"needs {byte_size(2 * need.disk)} in {folder} while it writes, found {byte_size(free)} free"
        )
