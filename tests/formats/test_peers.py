"""What is exported runs in cache-dit and SmoothCache themselves, twice in a row, as it is replayed here.

They are installed, pinned, into an environment of their own on first use (`benchmarks.peers`).
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from benchmarks.peers import ROOT, python
from dicache.formats import Losses, export, find
from dicache.formats.scm_presets import PRESETS, preset
from dicache.models.loading import load
from dicache.profiler.describing import survey_pipeline
from dicache.runtime import apply
from dicache.schedules import FirstBlockPolicy, Plan, Rule, Schedule
from tests.formats.running import SAMPLING, STEPS, Made, farthest, generations

ALL = list(range(STEPS))


class Job(NamedTuple):
    """A schedule, as a plan's rules or a policy, and the format and engine that it is to run in."""

    format: str
    rules: tuple[Rule, ...] = ()
    policy: FirstBlockPolicy | None = None
    engine: str = ""
    lossy: bool = False


JOBS: Mapping[str, Job] = {
    "inner": Job("cache-dit", (Rule("skip", "C.CC..C.", "2-9"),)),
    "body": Job("cache-dit", (Rule("skip", "C.CC..C."),)),
    "foretold": Job("cache-dit", (Rule("skip", "CCCC.C..", "1-11", predictor="taylor", order=1),)),
    "early": Job("cache-dit", (Rule("skip", "CC.C.C..", "1-11", predictor="taylor", order=1),), lossy=True),
    "dynamic": Job("cache-dit", policy=FirstBlockPolicy(0.3, 2, 1, first_steps=2, last_steps=1, max_continuous=2)),
    "transformer": Job("cache-dit", (Rule("skip", "C.CC..C.", "1-11"),), engine="cache-dit, transformer"),
    "branches": Job("smoothcache", (Rule("reuse", "C.CC..C.", "0-5", "attn"), Rule("reuse", "C..C..C.", "*", "mlp"))),
}


class Ran(NamedTuple):
    """A job in the other project, what that loses, and the job replayed here."""

    there: Made
    losses: Losses
    here: Made


def both(folder: Path) -> dict[str, Ran]:
    """Run all jobs in their projects and here."""
    with torch.no_grad():
        pipeline = load("digits")
        anatomy, target, steps = survey_pipeline(pipeline, SAMPLING)
        jobs, losses, here = {}, {}, {}
        for name, job in JOBS.items():
            plan = Plan(STEPS, job.rules) if job.policy is None else None
            schedule = Schedule("drawn", {}, anatomy, target, steps, plan, job.policy)
            made = export(schedule, find(job.format), lossy=job.lossy)
            file = folder / f"{name}{find(job.format).suffix}"
            file.write_text(made.text)
            jobs[name], losses[name] = (job.engine or job.format, str(file)), made.losses
            with apply(pipeline, schedule):
                here[name] = generations(pipeline)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(python()), "-m", "tests.formats.in_peers", str(folder)]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return {name: Ran(_read(folder / f"{name}.npz"), losses[name], here[name]) for name in JOBS}


def _read(path: Path) -> Made:
    found: Any = np.load(path)
    return list(found["images"]), json.loads(str(found["steps"]))


# One test, so that one process makes the environment and runs the jobs.
def test_the_same_steps_are_computed_and_the_same_images_made(tmp_path: Path, subtests: pytest.Subtests) -> None:
    ran = both(tmp_path)
    for name in ("inner", "foretold", "dynamic", "transformer", "branches"):
        with subtests.test(name):
            (images, steps), losses, (same, wanted) = ran[name]
            assert losses == Losses()
            assert steps == wanted
            assert 0 < len(wanted[0][2]) < STEPS
            assert farthest(images, same) == 0
    with subtests.test("a mask of all blocks computes the first at every step, and that is said"):
        (images, steps), losses, (same, wanted) = ran["body"]
        assert "the first block runs at every step" in "".join(losses.stated)
        masked = [0, 2, 3, 6]
        assert wanted == [[masked] * 6] * 2
        assert steps == [[ALL, ALL, *[masked] * 4]] * 2
        assert 0 < farthest(images, same) < 0.05
    with subtests.test("what is foretold otherwise is refused without --lossy"):
        (images, steps), losses, (same, wanted) = ran["early"]
        assert losses.beyond == [
            "cache-dit takes no differences before step 3, so that step 2 would be foretold with a lower order than 1"
        ]
        assert steps == wanted
        assert 0 < farthest(images, same) < 0.1
    with subtests.test("the named masks are those of cache-dit"):
        mine = [preset(name, steps) for steps in (4, 6, *range(8, 61)) for name in PRESETS]
        assert json.loads((tmp_path / "presets.json").read_text()) == mine
