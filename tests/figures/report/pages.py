"""A profile, schedules and runs made up of known numbers, and the page of them."""

from dataclasses import replace

import numpy as np

from dicache.evaluate.evaluation import Replayed
from dicache.evaluate.references import Trajectory
from dicache.figures.pareto import Measured, Point, Series
from dicache.figures.report import report
from dicache.figures.report.achieved import Ran
from dicache.profiler import Profile, Run
from dicache.schedules import Rule, Schedule
from tests.figures import synthetic

RUNS, STEPS, BLOCKS = 4, 6, 3
HOSTILE = "<script>window.hacked = true</script>\"'><img src=x onerror='window.hacked = true'>&amp;"
LONG = "x" * 300


def profile() -> Profile:
    """Return four runs, the last of which failed, of two passes and three blocks with attention and MLP."""
    random = np.random.default_rng(0)
    shape = RUNS - 1, 2, STEPS, BLOCKS
    deltas = random.normal(size=(*shape, 7))
    before = np.full_like(deltas, np.nan)
    before[:, :, 1:] = deltas[:, :, :-1]
    both = np.concatenate([deltas, before], axis=3)
    residual = random.normal(size=(RUNS - 1, STEPS, 9))
    cosine = random.uniform(0.5, 1, shape)
    cosine[:, :, 0] = np.nan
    changes = {name: random.uniform(0.1, 0.5, (RUNS - 1, 2, STEPS - 1)) for name in ("input", "output")}
    made = synthetic.profile(cosine, random.uniform(0.5, 1, (*shape, 2, 2)), changes)
    grams = {"delta/gram": both @ both.swapaxes(-1, -2), "body/gram": residual @ residual.swapaxes(-1, -2)}
    runs = (*(Run(HOSTILE, i) for i in range(RUNS - 1)), Run(LONG, 7, "failed at step 3 in 1.mlp"))
    return replace(made, runs=runs, arrays={**made.arrays, **grams})


def schedules() -> list[tuple[str, Schedule]]:
    """Return one that reuses the MLP of the last two blocks, and one that skips these blocks, with names that try."""
    return [
        (HOSTILE, synthetic.planned("mask", BLOCKS, Rule("reuse", "CC.C.C", blocks="1-2", branch="mlp"))),
        (LONG, synthetic.planned("delta-cache", BLOCKS, Rule("skip", "C.CC.C", blocks="1-2"))),
    ]


def ran() -> Ran:
    random = np.random.default_rng(1)
    uncached = random.random((2, 16, 16, 3))
    cached = [
        Replayed(
            Trajectory(np.clip(uncached + 0.1, 0, 1), np.empty(0)),
            macs_fraction=0.8,
            computed_each=(4.0,),
            steps_each=({"cond": "CC.C.C", "uncond": letters},) * 2,
        )
        for letters in ("CC.C.C", "CCCC.C")
    ]
    return Ran((HOSTILE, LONG), (1000, 1001), uncached, cached)


MEASURED = Measured(
    "digits",
    8,
    (
        Series(HOSTILE, (Point(0.7, 40, 39, 41, 1.4), Point(0.5, 35, 34, 36, None))),
        Series("fewer steps", (Point(0.5, 38, 37, 39, 2.0),), "steps"),
    ),
)


def page() -> str:
    return report(profile(), schedules(), file=f"{HOSTILE}.h5", measured=MEASURED, ran=ran())
