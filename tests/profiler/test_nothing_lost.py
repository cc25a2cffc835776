"""Profiles whose writer is killed, finds the disk full, or is not alone."""

import errno
import fcntl
import itertools
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from dicache.profiler import ProfileError, Run, storage
from tests.profiler.test_merging import PROVENANCE, RUNS, add, assert_same, write

FORK = multiprocessing.get_context("fork")
MOST = 4  # runs that a writer finishes before it is killed while it writes the next


def write_on(path: Path, finished: Connection) -> None:
    """Add runs without an end, and say after each that it is finished."""
    for seed in itertools.count(len(storage.header(path)[1])):
        add(path, Run(f"prompt {seed % 3}", seed))
        finished.send(seed)


def killed_again_and_again(folder: Path, kills: int, seed: int = 0) -> list[int]:
    """Kill a writer at random moments, check that the profile holds all that was finished, and compare it in the end.

    Returns:
        How many runs there were after each kill.
    """
    source, kept = random.Random(seed), [1]
    path = write(folder / "p.h5", [Run("prompt 0", 0)])
    for _ in range(kills):
        ours, theirs = FORK.Pipe(duplex=False)
        child = FORK.Process(target=write_on, args=(path, theirs))
        begun, left_alone = time.monotonic(), source.randint(0, MOST)
        child.start()
        for _ in range(left_alone):
            assert ours.poll(60), "no run was finished in a minute"
            ours.recv()
        time.sleep(source.random() * (time.monotonic() - begun) / max(left_alone, 1))
        child.kill()
        child.join()
        found = storage.load(path)
        kept.append(len(found.runs))
        assert all(len(values) == kept[-1] for values in found.arrays.values())
        assert kept[-1] >= kept[-2] + left_alone
    add(path, Run(f"prompt {kept[-1] % 3}", kept[-1]))
    undisturbed = [Run(f"prompt {seed % 3}", seed) for seed in range(kept[-1] + 1)]
    assert_same(path, write(folder / "whole.h5", undisturbed))
    return kept[1:]


def test_a_profile_whose_writer_is_killed_equals_an_undisturbed_one(tmp_path: Path) -> None:
    kept = killed_again_and_again(tmp_path, kills=5)
    assert kept[-1] > 1
    assert not (tmp_path / ".p.h5.part").exists()


def on_a_disk_of(size: int, act: Callable[[], object]) -> str:
    """Act in a process that can write no file above so many bytes; return the error that it ends with."""
    ours, theirs = FORK.Pipe()

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            act()
            theirs.send("")
        except ProfileError as error:
            theirs.send(str(error))

    child = FORK.Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode == 0  # HDF5 itself breaks down, some time after the first write that fails
    return str(ours.recv())


TABLES = storage.TABLE * len(storage.shapes(PROVENANCE))


@pytest.mark.parametrize(("room", "runs"), [(0, 2), (1, 2), (5000, 2), (TABLES, 2), (TABLES + 10_000, 3)])
def test_a_full_disk_is_said_in_a_line_and_takes_nothing_that_was_written(room: int, runs: int, tmp_path: Path) -> None:
    path = write(tmp_path / "p.h5", RUNS[:2])
    most = path.stat().st_size + room

    def fill() -> None:
        for run in RUNS[2:]:
            add(path, run)

    said = on_a_disk_of(most, fill)
    assert said.startswith(f"{path} cannot be written (File too large); what it held before is untouched: make room on")
    assert os.listdir(tmp_path) == ["p.h5"]
    done = len(storage.load(path).runs)
    assert done >= runs
    for run in RUNS[done:]:
        add(path, run)
    assert_same(path, write(tmp_path / "whole.h5", RUNS))


def test_nothing_is_begun_or_joined_on_a_full_disk(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.h5", RUNS[:4]), write(tmp_path / "two.h5", RUNS[4:])
    before = one.read_bytes()
    assert "one.h5 cannot be written (File too large)" in on_a_disk_of(
        one.stat().st_size + 1000, lambda: storage.merge([one, two], one) and None
    )
    assert "new.h5 cannot be written (File too large)" in on_a_disk_of(
        9000, lambda: write(tmp_path / "new.h5", []) and None
    )
    assert one.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["one.h5", "two.h5"]


def test_a_profile_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    path = write(tmp_path / "p.h5", RUNS[:1])
    with storage.alone(path):
        said = on_a_disk_of(10**9, lambda: storage.merge([path], path))
    assert said == f"{path} is being written already; wait for that, or choose another -o"
    assert os.listdir(tmp_path) == ["p.h5"]
    with storage.alone(path):
        pass


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError, match=r"p\.h5 cannot be written \(File exists\); choose another -o"):
        storage.merge([write(tmp_path / "p.h5", RUNS[:1])], tmp_path / "file" / "p.h5")
    with (
        pytest.raises(ProfileError, match=r"p\.h5 cannot be written \(.*\); choose another -o"),
        storage.alone(Path("/proc/p.h5")),
    ):
        pass


@pytest.mark.parametrize("locking", ["TRUE", "FALSE"])
def test_another_process_is_kept_out_whatever_hdf5_is_told_of_locks(locking: str, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dicache.profiler import ProfileError, storage\n"
        "try:\n"
        "    with storage.alone(Path(sys.argv[1])): print('in', flush=True); sys.stdin.readline()\n"
        "except ProfileError as error: print(error)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "p.h5")]
    env = {**os.environ, "HDF5_USE_FILE_LOCKING": locking}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    with subprocess.Popen(words, **pipes) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        second = subprocess.run(words, input="", capture_output=True, text=True, env=env, check=True)
        assert "is being written already" in second.stdout
        first.communicate("\n")
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_written_to_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with storage.alone(tmp_path / "p.h5"):
        write(tmp_path / "p.h5", RUNS[:1])
    assert [file.name for file in tmp_path.iterdir()] == ["p.h5"]
