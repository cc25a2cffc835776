"""Runs that are spread over processes, against the same runs of one process."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

from dicache.anatomy.spread import RanksError
from dicache.models import launching
from dicache.profiler import ProfileError, shards, storage
from tests.profiler.test_profiling import SAMPLING, profiled
from tests.tiny import dit, pipeline_of

CONDITIONS = [str(i) for i in range(7)]
SOON = 60.0  # seconds, by which each rank must have ended; a rank that waits for ever would reach it
Task = Callable[[int, Path], object]


def together(output: Path, conditions: Sequence[str] = CONDITIONS, **options: bool) -> Path:
    return shards.profile_together(
        pipeline_of(dit), "tiny", output, conditions, sampling=SAMPLING, lags=2, priors=True, progress=False, **options
    )


def make(rank: int, output: Path) -> None:
    together(output, resume=True)


def make_anew(rank: int, output: Path) -> None:
    together(output)


def make_until_it_is_killed(rank: int, output: Path) -> None:
    """Rank 1 dies when it has written two runs of its three, while it makes the third."""
    if rank == 1:
        append = storage.Addition.write

        def write(self: storage.Addition, record: storage.RunRecord) -> None:
            if len(storage.header(shards.shard_of(output, 2, 2))[1]) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            append(self, record)

        storage.Addition.write = write  # type: ignore[method-assign]  # of this process alone
    together(output)


def make_until_all_is_joined(rank: int, output: Path) -> None:
    """Rank 0 dies before it removes what it has joined."""
    storage.remove = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # of this process alone
    together(output)


def make_more(rank: int, output: Path) -> None:
    together(output, [*CONDITIONS, "7", "8"], resume=True)


def work(task: Task, rank: int, count: int, output: Path, meeting: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{meeting}", rank=rank, world_size=count, timeout=timedelta(seconds=SOON)
    )
    try:
        task(rank, output)
        said = "done"
    except (ProfileError, RanksError) as error:
        said = str(error)
    Path(f"{meeting}-{rank}").write_text(said)


def run(task: Task, count: int, output: Path, meeting: Path) -> list[str]:
    """Return what each rank says; nothing of one that was killed."""
    fork = multiprocessing.get_context("fork")  # the parent's imports take longer than all that is done here
    processes = [fork.Process(target=work, args=(task, rank, count, output, meeting)) for rank in range(count)]
    since = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join(SOON)
    assert time.monotonic() - since < SOON
    files = [Path(f"{meeting}-{rank}") for rank in range(count)]
    return [file.read_text() if file.exists() else "" for file in files]


def assert_same(one: Path, two: Path) -> None:
    a, b = storage.load(one), storage.load(two)
    assert a.runs == b.runs
    for name, values in a.arrays.items():
        assert np.array_equal(values, b.arrays[name], equal_nan=True), name
    for site in a.anatomy.sites:
        means, others = (storage.load_prior(file, site)[1] for file in (one, two))
        np.testing.assert_allclose(means, others, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return profiled(tmp_path_factory.mktemp("alone") / "p.h5", CONDITIONS, priors=True)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_ranks_make_the_profile_that_one_process_makes(tmp_path: Path, alone: Path) -> None:
    output = tmp_path / "out" / "p.h5"
    assert run(make_anew, 2, output, tmp_path / "meeting") == ["done", "done"]
    assert_same(output, alone)
    assert names(output.parent) == ["p.h5"]
    again = run(make_anew, 2, output, tmp_path / "again")
    assert again == [f"{output} exists; pass --resume to go on with it, or another -o"] * 2


def test_a_rank_that_is_killed_loses_one_run_and_a_restart_with_more_ranks_makes_what_is_missing(
    tmp_path: Path, alone: Path
) -> None:
    output = tmp_path / "out" / "p.h5"
    said, nothing = run(make_until_it_is_killed, 2, output, tmp_path / "meeting")
    assert "rank 0 of 2 waited in vain for the others: one of them has failed" in said
    assert nothing == ""
    made = {file.name: storage.header(file)[1] for file in shards.shards_of(output)}
    assert {name: len(runs) for name, runs in made.items()} == {"p.h5.1-of-2": 4, "p.h5.2-of-2": 2}
    assert run(make, 3, output, tmp_path / "again") == ["done"] * 3
    assert_same(output, alone)
    assert names(output.parent) == ["p.h5"]


def test_a_rank_that_is_killed_when_all_is_joined_does_not_hinder_the_next_profile(tmp_path: Path, alone: Path) -> None:
    output = tmp_path / "out" / "p.h5"
    run(make_until_all_is_joined, 2, output, tmp_path / "meeting")
    assert len(names(output.parent)) >= 3  # with its shards
    assert run(make_more, 2, output, tmp_path / "again") == ["done"] * 2
    assert names(output.parent) == ["p.h5"]
    assert len(storage.header(output)[1]) == len(CONDITIONS) + 2
    assert storage.load(alone).runs == storage.load(output).runs[: len(CONDITIONS)]


def test_a_rank_makes_no_run_that_is_there(tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Sequence[int]] = []
    monkeypatch.setattr(shards, "profile_pipeline", lambda *args, only, **options: made.append(only))
    monkeypatch.setattr(shards, "_join", lambda *args: None)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "monitored_barrier", lambda timeout: None)
    output = tmp_path / "p.h5"
    profiled(output, CONDITIONS[:2])
    profiled(tmp_path / "p.h5.3-of-4", CONDITIONS, only=[3, 4])
    make(1, output)
    assert made == [[5]]  # of 2, 5 and 6
    output.write_bytes(alone.read_bytes())
    make(1, output)
    assert made == [[5]]


def test_a_rank_that_the_others_do_not_come_to_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launching, "MEETING", timedelta(seconds=1))
    with pytest.raises(RanksError, match="rank 0 of 2 did not find the others"), launching.workers():
        pass
    monkeypatch.delenv("RANK")
    with pytest.raises(RanksError, match=r"rank \? of 2 did not find the others"), launching.workers():
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with launching.workers() as ranks:
        assert (ranks.rank, ranks.count) == (0, 1)


def test_shards_are_told_by_their_names(tmp_path: Path) -> None:
    output = tmp_path / "p[1].h5"
    parts = [shards.shard_of(output, part, 2) for part in (1, 2)]
    for file in (*parts, tmp_path / "p1.h5.1-of-2", tmp_path / "p[1].h5.x-of-2", tmp_path / "p[1].h5"):
        file.touch()
    assert shards.shards_of(output) == parts
    assert [list(launching.part_of(7, part, 3)) for part in (1, 2, 3)] == [[0, 3, 6], [1, 4], [2, 5]]


def test_each_rank_takes_a_gpu_of_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [launching.device_of_rank(name) for name in ("cuda", "cpu", "cuda:0")] == ["cuda:3", "cpu", "cuda:0"]
    monkeypatch.delenv("LOCAL_RANK")
    assert launching.device_of_rank("cuda") == "cuda"
