"""Who works on which trial of a study: several processes share one, and any of them may be killed at any moment."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import optuna
from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial

BEAT = 20.0  # seconds between two signs of life of a worker
SILENCE = 120.0  # seconds without one after which a worker elsewhere counts as gone
POLL = 0.5  # seconds between two looks at what others do

_working: set[str] = set()  # the workers of this process


class Worker:
    """A process that works on a study.

    Each running trial says who runs it. Whether a process of this machine is still there is asked of the system; of one
    elsewhere it is told by its signs of life, a number in the trial that it raises every twenty seconds. Clocks are not
    compared: it is gone if the number stays the same for two minutes of the watcher's own time.
    """

    def __init__(self) -> None:
        self.name = uuid4().hex
        self._heard: dict[int, tuple[Any, float]] = {}  # by trial: the last sign of life, and when it was new

    def __enter__(self) -> "Worker":
        _working.add(self.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _working.discard(self.name)

    def signature(self) -> dict[str, Any]:
        """Return what a trial of this worker says of it."""
        pid = os.getpid()
        return {"name": self.name, "place": _place(), "pid": pid, "since": _since(pid)}

    def is_gone(self, trial: FrozenTrial) -> bool:
        """Whether nobody works on a running trial any more."""
        signature = trial.user_attrs.get("worker")
        if signature is None:  # begun by hand, or by something else than a search
            return True
        if signature["place"] == _place():
            if signature["pid"] == os.getpid() and signature["since"] == _since(os.getpid()):
                return signature["name"] not in _working
            return not _exists(signature["pid"]) or _since(signature["pid"]) != signature["since"]
        beat, now = trial.user_attrs.get("beat"), time.monotonic()
        last, since = self._heard.get(trial.number, (None, now))
        if trial.number not in self._heard or last != beat:
            self._heard[trial.number] = beat, now
            return False
        return now - since > SILENCE

    @contextmanager
    def at_work(self, trial: optuna.Trial) -> Iterator[None]:
        """Give signs of life for a trial."""
        done = threading.Event()

        def beat() -> None:
            count = 0
            while not done.wait(BEAT):
                count += 1
                try:
                    trial.set_user_attr("beat", count)
                except (OptunaError, RuntimeError, OSError):
                    continue  # the storage is busy or away: the next one may get through

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _place() -> str:
    """Return a name for where process numbers mean the same: a boot of a machine, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _since(pid: int) -> str | None:
    """Return when a process began, as process numbers are given again; None where the system does not say."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state == "Z" else fields[18]
