"""A search with a judge that answers at once, for processes of its own."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dicache.calibrate.judging import Goal, Score
from dicache.calibrate.methods import Axis
from dicache.calibrate.search import Found, search
from dicache.schedules import Plan, Rule, Schedule, Target
from tests.calibrate.test_fora import TWO_BLOCKS

STEPS, RUNS = 12, 8


class Masks:
    """Any of 12 steps but the first may be skipped: 2048 points, more than are looked at one by one."""

    axes: Mapping[str, Axis] = {f"s{step}": ("C", ".") for step in range(1, STEPS)}
    identity: Mapping[str, Any] = {"method": "masks"}

    def plain(self, max_macs: float | None) -> Mapping[str, Any]:
        return {name: "C."[int(name[1:]) % 2] for name in self.axes}

    def schedule(self, parameters: Mapping[str, Any]) -> Schedule:
        letters = "C" + "".join(parameters[f"s{step}"] for step in range(1, STEPS))
        rules = (Rule("skip", letters),) if "." in letters else ()
        return Schedule("masks", dict(parameters), TWO_BLOCKS, Target(), STEPS, plan=Plan(STEPS, rules))


class Judge:
    """An early skip costs more; each run differs, and so does what it makes of each schedule.

    Attributes:
        delay: Seconds for each part of the runs.
        log: A file to which each schedule is written when the last of its runs is judged.
    """

    def __init__(self, delay: float = 0.0, log: Path | None = None) -> None:
        self.delay, self.log = delay, log

    def __len__(self) -> int:
        return RUNS

    def __call__(self, schedule: Schedule, which: slice = slice(RUNS)) -> Score:
        letters = schedule.table()["0.attn"]
        seed = int("".join("1" if letter == "S" else "0" for letter in letters), 2)
        noise = np.random.default_rng(seed).normal(0, 0.3, RUNS) + np.linspace(0, 4, RUNS)
        lost = sum(2.0 - step / STEPS for step, letter in enumerate(letters) if letter == "S")
        each = tuple((50.0 - lost + noise)[which].tolist())
        time.sleep(self.delay)
        if self.log is not None and which.stop == RUNS:
            with self.log.open("a") as file:
                file.write(letters + "\n")
        return Score(float(np.mean(each)), schedule.macs_fraction(), each)


def find(storage: str, trials: int, judge: Judge, goal: Goal | None = None) -> Found:
    return search(
        Masks(),
        goal or Goal(min_psnr=44.0),
        judge,
        trials=trials,
        storage=storage,
        name="masks",
        where=storage,
        identity={"weights": "f00"},
        progress=False,
    )


def work(storage: str, trials: int, delay: float, log: Path) -> None:
    """Search, and write what was found beside the log."""
    found = find(storage, trials, Judge(delay, log))
    log.with_suffix(".json").write_text(json.dumps(found.to_json()))
