"""How long a large profile takes to read and to fit: `python benchmarks/calibrating.py`.

A small model of as many blocks as DiT-XL/2 is profiled over a few runs, and each is written many times, with all that
is measured scaled by a factor of its own. Every method then starts from the file: what it reads is in its time. `auto`
and `l2c`, and searches, run the model itself and are not here.
"""

import argparse
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from tqdm import tqdm

import dicache
from benchmarks.loops import make_model
from dicache.calibrate.adacache import AdaCache
from dicache.calibrate.delta_dit import DeltaDit, ordered
from dicache.calibrate.dp import Dp
from dicache.calibrate.eoc import Eoc
from dicache.calibrate.first_block import FirstBlock
from dicache.calibrate.fora import Fora
from dicache.calibrate.freezing import freeze
from dicache.calibrate.magcache import MagCache
from dicache.calibrate.methods import planned_schedule
from dicache.calibrate.smoothcache import SmoothCache
from dicache.calibrate.teacache import TeaCache
from dicache.cli.command import table
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions
from dicache.profiler import Profile, Run, storage
from dicache.profiler.describing import survey_pipeline
from dicache.profiler.profiling import profile_pipeline
from dicache.schedules import Schedule

MEASURED = 4  # runs that are really made
SHAPE = (28, 2, 32, 8)  # layers, heads, width, tokens a side


def write(path: Path, runs: int, steps: int) -> Schedule:
    """Write a profile of so many runs, and return a plan of FORA for the model."""
    pipeline = load("digits", device="cpu")
    pipeline.register_modules(transformer=make_model(*SHAPE))
    sampling = Sampling(steps=steps)
    base = planned_schedule(Fora(2), *survey_pipeline(pipeline, sampling))
    small = path.with_name("small.h5")
    conditions = default_conditions(pipeline, MEASURED)
    profile_pipeline(pipeline, "digits", small, conditions, sampling=sampling, priors=base, progress=False)
    profile = storage.load(small)
    shutil.copyfile(small, path)
    generator = np.random.default_rng(0)
    with storage.adding(path) as addition:
        for run in tqdm(range(MEASURED, runs), leave=False):
            factor = generator.lognormal(sigma=0.1)
            arrays = {name: factor * rows[run % MEASURED] for name, rows in profile.arrays.items()}
            addition.write(storage.RunRecord(Run(str(run), run), arrays))
    return base


def methods(base: Schedule, prior: Callable[[str], Any]) -> dict[str, Callable[[Profile], Any]]:
    """Return what each row of the table fits."""
    teacache = TeaCache(target_speedup=1.8)
    return {
        "teacache": teacache.calibrate,
        "teacache, by the steps": TeaCache(target_speedup=1.8, foretell="steps").calibrate,
        "first-block": FirstBlock(target_speedup=1.5).calibrate,
        "adacache": AdaCache(target_speedup=1.8).calibrate,
        "smoothcache": SmoothCache(0.15).calibrate,
        "magcache": MagCache().calibrate,
        "delta-dit, order of the profile": partial(ordered, DeltaDit(blocks=21, boundary=base.steps // 2)),
        "dp of all blocks, Taylor": Dp(steps_computed=20).calibrate,
        "dp of branches, Taylor": Dp(steps_computed=20, granularity="branch").calibrate,
        "dp of all blocks, forecast": Dp(steps_computed=20, predictor="forecast").calibrate,
        "dp of branches, forecast": Dp(steps_computed=20, predictor="forecast", granularity="branch").calibrate,
        "eoc": lambda profile: Eoc().calibrate(profile, base, prior),
        "teacache, frozen": lambda profile: freeze(teacache.calibrate(profile), profile),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--profile", type=Path, help="where to keep the profile, or one that is kept")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "calibrating.txt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = options.profile or Path(folder) / "p.h5"
        plan = path.with_suffix(".json")
        if not path.exists():
            write(path, options.runs, options.steps).save(plan)
        base = Schedule.load(plan)
        rows = []
        for name, fit in methods(base, partial(storage.load_prior, path)).items():
            start = time.thread_time()
            profile = storage.load(path)
            fit(profile)
            whole = time.thread_time() - start
            start = time.thread_time()
            fit(profile)
            rows.append([name, f"{whole:.2f}", f"{time.thread_time() - start:.2f}"])
        total = f"{sum(float(row[1]) for row in rows):.2f}"
        start = time.thread_time()
        profile = storage.load(path)
        read = sum(profile.arrays[name].nbytes for name in profile.arrays) / 1e6
        reading = time.thread_time() - start
        anatomy = profile.anatomy
        text = (
            f"{len(profile.runs)} runs x {profile.steps} steps x {len(anatomy.sites)} sites, "
            f"{path.stat().st_size / 1e6:.0f} MB; python {platform.python_version()}, numpy {np.__version__}, "
            f"h5py {h5py.__version__}, dicache {dicache.__version__}\n\n"
            + table(["seconds of the thread", "with reading", "again"], [*rows, ["all of them", total, ""]])
            + f"\n\nTo read every array of the file, {read:.0f} MB, takes {reading:.2f} s."
        )
    print(text)  # noqa: T201
    options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
