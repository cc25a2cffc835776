"""Searches that are killed, and that several processes share."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from dicache.calibrate import CalibrationError
from dicache.calibrate.studies import _storage
from dicache.calibrate.workers import SILENCE, Worker
from tests.calibrate.searched import Judge, find, work

TRIALS = 14
RAN = (TrialState.COMPLETE, TrialState.PRUNED)


PROCESSES = multiprocessing.get_context("forkserver")  # which has imported all once, and runs no threads
PROCESSES.set_forkserver_preload(["tests.calibrate.searched"])


def begin(storage: str, log: Path, trials: int = TRIALS, delay: float = 0.02) -> ForkServerProcess:
    worker = PROCESSES.Process(target=work, args=(storage, trials, delay, log))
    worker.start()
    return worker


def end(worker: ForkServerProcess, log: Path) -> dict[str, Any]:
    worker.join(60)
    assert worker.exitcode == 0
    found: dict[str, Any] = json.loads(log.with_suffix(".json").read_text())
    return found


def ran(storage: str) -> list[optuna.trial.FrozenTrial]:
    study = optuna.load_study(storage=_storage(storage), study_name="masks")
    return [trial for trial in study.trials if "ran" in trial.user_attrs and trial.state in RAN]


def what(trial: optuna.trial.FrozenTrial) -> tuple[Any, ...]:
    return trial.state, trial.params, trial.values, trial.user_attrs["each"], trial.user_attrs["executes"]


@pytest.mark.parametrize(("ending", "kills"), [("s.db", 4), ("s.journal", 2)])
def test_a_search_that_is_killed_again_and_again_does_each_trial_once(tmp_path: Path, ending: str, kills: int) -> None:
    storage = str(tmp_path / ending) if ending.endswith("journal") else f"sqlite:///{tmp_path / ending}"
    undisturbed = f"journal:{tmp_path}/whole"
    want = find(undisturbed, TRIALS, Judge())
    moments = random.Random(0)
    log, killed = tmp_path / "log", 0
    for _ in range(kills):
        worker = begin(storage, log)
        before = len(log.read_text().splitlines()) if log.exists() else 0
        while worker.is_alive() and (not log.exists() or len(log.read_text().splitlines()) < before + 1):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.12))  # in the midst of a trial, or between two
        worker.kill()
        worker.join()
        killed += worker.exitcode == -signal.SIGKILL
    assert killed == kills
    assert end(begin(storage, log), log) == want.to_json()
    assert [what(trial) for trial in ran(storage)] == [what(trial) for trial in ran(undisturbed)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server that is there for these tests alone."""
    pytest.importorskip("psycopg")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").exists() else []
    initdb = shutil.which("initdb", path=os.pathsep.join([*map(str, reversed(found)), os.environ.get("PATH", "")]))
    if initdb is None:
        pytest.skip("PostgreSQL is not installed; the journal file is tested the same way")
    home = Path(tempfile.mkdtemp(prefix="dicache-postgres-"))  # pytest's own folders are closed to other users
    own: dict[str, Any] = {}
    if os.geteuid() == 0:  # it refuses to run as root
        os.chown(home, 65534, 65534)
        own = {"user": 65534, "group": 65534, "extra_groups": []}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, bin_ = home / "data", Path(initdb).resolve().parent
    subprocess.run(
        [
            str(bin_ / "initdb"),
            "-D",
            str(data),
            "-U",
            "dicache",
            "-A",
            "trust",
            "--no-sync",
            "--no-locale",
            "-E",
            "UTF8",
        ],
        check=True,
        capture_output=True,
        cwd=home,
        **own,
    )
    options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [str(bin_ / "pg_ctl"), "-D", str(data), "-w"]
    subprocess.run(
        [*control, "-l", str(home / "log"), "-o", options, "start"],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=home,
        **own,
    )
    yield f"postgresql://dicache@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL, cwd=home, **own)
    shutil.rmtree(home)


@pytest.mark.parametrize("kind", ["postgresql", "journal", "sqlite"])
def test_two_processes_share_a_study_and_do_no_trial_twice(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    storage = {"journal": f"journal:{tmp_path}/j", "sqlite": f"sqlite:///{tmp_path}/s.db"}.get(kind)
    storage = storage or request.getfixturevalue("server")
    logs = [tmp_path / "a", tmp_path / "b"]
    workers = [begin(storage, log, delay=0.1) for log in logs]
    first, second = (end(worker, log) for worker, log in zip(workers, logs, strict=True))
    for found in (first, second):
        assert found.pop("not_run") <= 1  # one that the other was still at when this one ended
    assert first == second
    trials = ran(storage)
    assert len(trials) == first["trials"] == TRIALS
    assert len({trial.user_attrs["executes"] for trial in trials}) == TRIALS
    assert len({trial.user_attrs["worker"]["pid"] for trial in trials}) == 2
    judged = [log.read_text().splitlines() for log in logs]
    assert all(judged)
    assert len({*judged[0], *judged[1]}) == len(judged[0]) + len(judged[1])


def test_a_worker_goes_on_with_what_one_that_was_killed_left(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/s.db"
    slow = begin(storage, tmp_path / "slow", delay=60)
    while not (tmp_path / "s.db").exists() or not _running(storage):
        assert slow.is_alive()
        time.sleep(0.05)
    quick = begin(storage, tmp_path / "quick", trials=3, delay=0)
    time.sleep(0.5)
    slow.kill()
    slow.join()
    assert end(quick, tmp_path / "quick")["trials"] == 3
    assert [trial.state for trial in ran(storage)] == [TrialState.COMPLETE] * 3


def _running(storage: str) -> bool:
    try:
        study = optuna.load_study(storage=storage, study_name="masks")
    except Exception:  # it is just being made
        return False
    return any(trial.state is TrialState.RUNNING for trial in study.trials)


def test_a_worker_elsewhere_is_gone_when_it_gives_no_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    worker = Worker()
    there = {"name": "x", "place": "another machine", "pid": os.getpid(), "since": "1"}

    def gone(beat: int) -> bool:
        attrs = {"worker": there, "beat": beat}
        return worker.is_gone(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attrs))

    assert not gone(1)
    now += SILENCE + 1
    assert not gone(2)
    now += SILENCE - 1
    assert not gone(2)
    now += 2
    assert gone(2)


def test_a_trial_that_is_stopped_keeps_what_it_was_judged_on(tmp_path: Path) -> None:
    storage = f"journal:{tmp_path}/j"
    found = find(storage, 20, Judge())
    stopped = [trial for trial in ran(storage) if trial.state is TrialState.PRUNED]
    assert found.pruned == len(stopped) > 0
    for trial in stopped:
        told = trial.user_attrs
        assert len(told["each"]) in (2, 4)
        assert told["expected_psnr"] < told["beaten_by"]["psnr"]
        assert told["beaten_by"]["macs_fraction"] <= told["macs_fraction"] + 5e-5
        assert trial.params not in [tried.parameters for tried in found.front]
    judged = sum(len(trial.user_attrs["each"]) * trial.user_attrs["macs_fraction"] for trial in ran(storage))
    assert found.spent == pytest.approx(judged)


def test_a_line_that_was_half_written_is_no_part_of_a_journal(tmp_path: Path) -> None:
    storage = f"journal:{tmp_path}/j"
    want = find(storage, 5, Judge())
    with (tmp_path / "j").open("ab") as file:
        file.write(b'{"op_code": 5, "worker_')
    assert find(storage, 5, Judge()) == want
    assert find(storage, 6, Judge()).trials == 6


def test_without_the_driver_of_postgresql_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match=r"psycopg, which is not installed: pip install 'dicache\[postgresql\]'"):
        find("postgresql://somebody@somewhere/db", 3, Judge())
