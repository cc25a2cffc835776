"""What measuring costs: `python benchmarks/profiling.py`.

Runs of one image with and without recorders take turns on the thread's CPU clock; each round gives a ratio, of which
the median and the quartiles are told. A second run without recorders shows the noise. Loading, surveying and writing
the file are not in it; the last row adds what one run costs to write.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

import dicache
from dicache.anatomy import survey
from dicache.cli.command import table
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions, sample
from dicache.profiler import Run, storage
from dicache.profiler.first_blocks import MOST_LAGS
from dicache.profiler.profiling import profile_pipeline, usual_decision_block
from dicache.profiler.recorder import Recorder
from dicache.runtime.apply import denoiser


def measure(model: str, steps: int, rounds: int) -> dict[str, list[float]]:
    """Return, for each variant, its seconds divided by those of the plain run of the same round."""
    pipeline = load(model, device="cpu")
    [condition] = default_conditions(pipeline, 1)
    sampling = Sampling(steps=steps)
    network = denoiser(pipeline)
    anatomy = survey(network)
    everything = {key: range(steps) for key in anatomy.sites}
    first: dict[str, Any] = {"first_blocks": (1,), "first_block_lags": min(MOST_LAGS, steps - 1)}
    decision: dict[str, Any] = {"decision_blocks": [usual_decision_block(anatomy)]}

    def run() -> float:
        start = time.thread_time()
        sample(pipeline, [condition], [0], sampling)
        return time.thread_time() - start

    def recorded(lags: int, priors: bool = False, **watched: Any) -> Callable[[], float]:
        def once() -> float:
            with Recorder(pipeline, network, anatomy, lags, everything if priors else None, **watched):
                sample(pipeline, [condition], [0], Sampling(steps=2))  # sets up the buffers, as the first of many runs
                return run()

        return once

    with tempfile.TemporaryDirectory() as folder:
        path = profile_pipeline(pipeline, model, Path(folder) / "p.h5", [condition], sampling=sampling, progress=False)
        provenance, _ = storage.header(path)

        def written() -> float:
            with Recorder(pipeline, network, anatomy, 3, **first, **decision) as recorder:
                sample(pipeline, [condition], [0], Sampling(steps=2))
                start = time.thread_time()
                sample(pipeline, [condition], [0], sampling)
                storage.append(path, recorder.record(Run(condition, 0), provenance))
                return time.thread_time() - start

        variants = {
            "plain again": run,
            "1 lag": recorded(1),
            "3 lags": recorded(3),
            "3 lags, first block": recorded(3, **first),
            "3 lags, decision block": recorded(3, **decision),
            "as profile does": recorded(3, **first, **decision),
            "as profile does, priors": recorded(3, priors=True, **first, **decision),
            "as profile does, with the writing": written,
        }
        ratios: dict[str, list[float]] = {name: [] for name in variants}
        for turn in tqdm(range(-1, rounds), leave=False):
            plain = run()
            order = list(variants)[turn % len(variants) :] + list(variants)[: turn % len(variants)]
            for name in order:
                ratio = variants[name]() / plain
                if turn >= 0:
                    ratios[name].append(ratio)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "profiling.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ratios = measure(options.model, options.steps, options.rounds)
    quartiles = {name: np.percentile(values, [25, 50, 75]).round(3).tolist() for name, values in ratios.items()}
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": 1,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "dicache": dicache.__version__,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": options.model, "steps": options.steps, "rounds": options.rounds, "machine": machine}
    options.output.write_text(json.dumps({**content, "quartiles": quartiles}, indent=2) + "\n")
    rows = [[name, *(f"{value:.3f}" for value in values)] for name, values in quartiles.items()]
    text = table(["a run, as a multiple of a plain one", "25 %", "median", "75 %"], rows)
    options.output.with_suffix(".txt").write_text(text + "\n")
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
