"""Give mutated files to the readers of schedules and profiles, guided by what they execute; tell what they let pass.

    python -m benchmarks.fuzzing schedules CORPUS --minutes 30 -o findings.json

A reader may return or raise dicache's own error for its kind of file, in little time and memory; all else is a finding.
Needs `pip install atheris`, which is no dependency of the project. The corpus is a folder of whole files to begin with;
what reaches new code is added to a copy of it.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["dicache.schedules", "dicache.anatomy.parts", "dicache.profiler"]):
    from dicache.profiler import ProfileError, storage
    from dicache.schedules import Schedule, ScheduleError

import h5py
import numpy as np

SECONDS = 10  # of the processor that a small file may take
MEMORY = 3 * 2**30  # bytes of address space beside what is there after the imports
STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    10**18,
    10**400,
    0.5,
    -1e308,
    "",
    "*",
    "C.",
    "0-999999999",
    "..",
    "../../etc/passwd",
    "nul\0",
    "\ud800",
    "\x1b[2J",
    [],
    {},
    [[]],
    ["0"],
    {"0": 1},
)

SOUND: list[bytes] = []  # the files of the corpus, which are changed as often as what was made of them


def mutated_json(content: Any, source: random.Random) -> Any:
    """Return a document in which one value, or one key, is another."""
    holders = [content]
    for holder in holders:
        values = holder.values() if isinstance(holder, dict) else holder
        holders += [value for value in values if isinstance(value, (dict, list)) and value]
    holder = source.choice(holders)
    key: Any = source.choice(list(holder)) if isinstance(holder, dict) else source.randrange(len(holder))
    action = source.randrange(5)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[str(source.choice(STRANGE))] = deepcopy(holder[key])
    elif action == 1:
        holder.insert(key, deepcopy(holder[key]))
    elif action == 2:
        other = source.choice(holders)
        holder[key] = deepcopy(other)
    elif action == 3 and isinstance(holder[key], str) and holder[key]:
        place = source.randrange(len(holder[key]))
        holder[key] = holder[key][:place] + source.choice(".C-0*9") + holder[key][place + source.randrange(2) :]
    else:
        holder[key] = deepcopy(source.choice(STRANGE))
    return content


def mutate_schedule(data: bytes, most: int, seed: int) -> bytes:
    """Change a value of the document, or some bytes."""
    source = random.Random(seed)
    data = source.choice([data, *SOUND])
    try:
        content = json.loads(data)
        if isinstance(content, (dict, list)) and content and source.random() < 0.8:
            for _ in range(source.choice((1, 1, 2))):
                content = mutated_json(content, source)
            return json.dumps(content).encode()
    except (ValueError, IndexError, RecursionError):
        pass
    return bytes(atheris.Mutate(data, most))


def mutate_profile(data: bytes, most: int, seed: int) -> bytes:
    """Change the provenance or a dataset, or some bytes."""
    source = random.Random(seed)
    data = source.choice([data, *SOUND])
    if source.random() < 0.3:
        return bytes(atheris.Mutate(data, most))
    try:
        made = BytesIO(data)
        with h5py.File(made, "r+") as file:
            names: list[str] = []
            file.visit(names.append)
            name = source.choice(names)
            if source.random() < 0.5:
                content = json.loads(file.attrs["provenance"])
                file.attrs["provenance"] = json.dumps(mutated_json(content, source))
            elif source.random() < 0.5 and isinstance(file[name], h5py.Dataset):
                dataset = file[name]
                size = tuple(source.choice((0, 1, length, length + 1)) for length in dataset.shape)
                dataset.resize(size)
            else:
                _replace(file, name, source)
    except Exception:
        return bytes(atheris.Mutate(data, most))
    return made.getvalue()


def _replace(file: Any, name: str, source: random.Random) -> None:
    shape = getattr(file[name], "shape", (1,))
    del file[name]
    choice = source.randrange(7)
    if choice == 0:
        file.create_dataset(name, shape=shape, dtype=source.choice(["i1", "f4", "f8", "S3", "O8", "u8"][:4]))
    elif choice == 1:
        file.create_dataset(name, shape=(10**9, *shape[1:]), chunks=(1, *shape[1:]), dtype="f8")
    elif choice == 2:
        file[name] = h5py.SoftLink(source.choice(["/", "/runs", f"/{name}", "/nowhere"]))
    elif choice == 3:
        file[name] = h5py.ExternalLink("/etc/passwd", "/")
    elif choice == 4:
        file.create_dataset(name, shape=shape, dtype="u1", external=[("/etc/passwd", 0, int(np.prod(shape)))])
    elif choice == 5:
        file.create_group(name)
    else:
        file.create_dataset(name, data=np.full(shape, "x", dtype=h5py.string_dtype()))


def read_schedule(path: Path) -> None:
    schedule = Schedule.load(path)
    schedule.table()
    schedule.to_json()


def read_profile(path: Path) -> None:
    profile = storage.load(path)
    for name in profile.arrays:
        profile.arrays[name].sum()
    storage.array_shapes(path)
    if storage.has_priors(path):
        for site in profile.anatomy.sites:
            storage.load_prior(path, site)
    joined = path.with_name("joined.h5")
    joined.unlink(missing_ok=True)
    storage.merge([path], joined)


KINDS: dict[str, tuple[Callable[[Path], None], type[Exception], Callable[[bytes, int, int], bytes]]] = {
    "schedules": (read_schedule, ScheduleError, mutate_schedule),
    "profiles": (read_profile, ProfileError, mutate_profile),
}


class Inputs:
    """Counts what a reader does with its inputs, and keeps the first of each kind that it should not have done."""

    def __init__(self, kind: str, folder: Path, output: Path) -> None:
        self.read, self.own, _ = KINDS[kind]
        self.file = folder / ("s.json" if kind == "schedules" else "p.h5")
        self.output = output
        self.counts = {"inputs": 0, "read": 0, "refused": 0}
        self.findings: dict[str, dict[str, Any]] = {}
        self.since = time.monotonic()

    def one(self, data: bytes) -> None:
        self.file.write_bytes(data)
        self.counts["inputs"] += 1
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            self.read(self.file)
            self.counts["read"] += 1
        except self.own as error:
            self.counts["refused"] += 1
            if len(str(error)) > 2000:
                self._found("long message", data)
        except BaseException as error:
            self._found(type(error).__name__, data)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if self.counts["inputs"] % 100 == 0:
            self.tell()

    def _found(self, kind: str, data: bytes) -> None:
        trace = traceback.extract_tb(sys.exc_info()[2])
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in trace if "dicache" in frame.filename]
        key = f"{kind} at {places[-1]}"
        found = self.findings.setdefault(key, {"times": 0, "places": places, "said": str(sys.exc_info()[1])[:300]})
        found["times"] += 1
        if found["times"] == 1:
            kept = self.output.with_name(f"{self.output.stem}-{len(self.findings)}{self.file.suffix}")
            kept.write_bytes(data)
            found["file"] = kept.name
            self.tell()

    def tell(self) -> None:
        took = round(time.monotonic() - self.since)
        content = {**self.counts, "seconds": took, "findings": self.findings}
        self.output.write_text(json.dumps(content, indent=2))


def main() -> None:
    """Fuzz."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    reached = folder / "reached"
    reached.mkdir()
    for file in given.corpus.iterdir():
        beside = file.suffix == ".safetensors"
        shutil.copy(file, folder if beside else reached)
        SOUND.extend([] if beside else [file.read_bytes()])
    inputs = Inputs(given.kind, folder, given.output)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGVTALRM, _too_long)
    arguments = [sys.argv[0], f"-max_total_time={round(60 * given.minutes)}", "-max_len=300000", "-timeout=60"]
    arguments += [
        "-rss_limit_mb=0",
        "-print_final_stats=1",
        "-len_control=0",
        f"-artifact_prefix={given.output.parent}/",
        str(reached),
    ]
    atheris.Setup(arguments, inputs.one, custom_mutator=KINDS[given.kind][2])
    atheris.Fuzz()  # ends the process


def _too_long(*_: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


if __name__ == "__main__":
    main()
