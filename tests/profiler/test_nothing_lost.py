"""Profiles whose writer is killed, finds the disk full, or is not alone."""

import multiprocessing
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dicache.profiler import ProfileError, Run, storage
from tests.profiler.test_merging import PROVENANCE, RUNS, add, assert_same, write

FORK = multiprocessing.get_context("fork")
LONGEST = 3  # times what a run takes, that a writer is left alone


def go_on(path: Path, runs: int) -> None:
    """Add the runs that are missing."""
    for seed in range(len(storage.header(path)[1]), runs):
        add(path, Run(f"prompt {seed % 3}", seed))


def killed_again_and_again(folder: Path, kills: int, runs: int, seed: int = 0) -> list[int]:
    """Kill a writer at random moments, check that the profile holds all that was finished, and finish it.

    Returns:
        How many runs there were after each kill.
    """
    source, since = random.Random(seed), time.monotonic()
    path = write(folder / "p.h5", [Run("prompt 0", 0)])
    run, kept = time.monotonic() - since, [1]
    for _ in range(kills):
        child = FORK.Process(target=go_on, args=(path, runs))
        child.start()
        time.sleep(source.uniform(0, LONGEST * run))
        child.kill()
        child.join()
        found = storage.load(path)
        kept.append(len(found.runs))
        assert all(len(values) == kept[-1] for values in found.arrays.values())
        assert kept[-2] <= kept[-1] < runs
    go_on(path, runs)
    assert_same(path, write(folder / "whole.h5", [Run(f"prompt {seed % 3}", seed) for seed in range(runs)]))
    return kept[1:]


def test_a_profile_whose_writer_is_killed_equals_an_undisturbed_one(tmp_path: Path) -> None:
    kept = killed_again_and_again(tmp_path, kills=5, runs=80)
    assert kept[-1] > 1, "it was killed before it had written a run"
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
