"""What measuring costs: `python benchmarks/profiling.py`.

Models of random weights with and without recorders make one denoising step each, in rotating order, on the thread's CPU
clock; per step the median over repetitions is taken, and the steps are summed. A second model without recorders shows
the noise. What is fetched when a run is over is counted as a step more; `written` adds the file, from the copy of the
runs before to the new one. Beside it stands what is held, as `dicache profile` says it before it starts.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

import dicache
from benchmarks.loops import SHAPES, Loop, make_model
from dicache.anatomy import Anatomy, survey
from dicache.cli.command import table
from dicache.profiler import Provenance, Run, storage
from dicache.profiler.profiles import MOST_LAGS
from dicache.profiler.recorder import Recorder
from dicache.profiler.wanted import usual_decision_block
from dicache.schedules import Target


class Measured:
    """A model with a recorder, or without."""

    def __init__(self, size: str, steps: int, anatomy: Anatomy, watched: Mapping[str, Any] | None) -> None:
        model = make_model(*SHAPES[size])
        self.loop = Loop(model, steps)
        self.steps, self.anatomy = steps, anatomy
        pipeline = SimpleNamespace(scheduler=self.loop.scheduler)
        self.recorder = None if watched is None else Recorder(pipeline, model, anatomy, **watched)

    def run(self, path: Path | None) -> Iterator[None]:
        """Make a run, step by step, and a last one that hands out what was recorded."""
        latents, loop = self.loop.start, self.loop
        with storage.adding(path) if path else nullcontext() as addition:
            if self.recorder and addition:
                self.recorder.add_to(addition.priors, self.provenance)
            yield
            loop.scheduler.set_timesteps(self.steps)
            for t in loop.scheduler.timesteps:
                latents = loop.denoise(latents, t, loop.call(latents, t))
                yield
            if self.recorder:
                record = self.recorder.record(Run("", 0), self.provenance)
                if addition:
                    addition.write(record)
        yield

    @property
    def provenance(self) -> Provenance:
        recorder = self.recorder
        assert recorder is not None
        return Provenance(
            "random",
            self.anatomy,
            Target(timesteps=tuple(range(self.steps))),
            {},
            {},
            recorder.lags,
            recorder.contexts,
            recorder.parts,
            decision_blocks=recorder.decision_blocks,
            first_blocks=recorder.first_blocks,
            first_block_lags=recorder.first_block_lags,
        )


def variants(steps: int, anatomy: Anatomy) -> dict[str, dict[str, Any] | None]:
    """Return what the recorders watch, by the name of the row."""
    first = {"first_blocks": (1,), "first_block_lags": min(MOST_LAGS, steps - 1)}
    usual = {**first, "decision_blocks": [usual_decision_block(anatomy)]}
    everything = {key: range(steps) for key in anatomy.sites}
    return {
        "plain": None,
        "plain again": None,
        "1 lag": {"lags": 1},
        "3 lags": {"lags": 3},
        "3 lags, first block": {"lags": 3, **first},
        "as profile does": {"lags": 3, **usual},
        "as profile does, written": {"lags": 3, **usual},
        "as profile does, priors, written": {"lags": 3, "priors": everything, **usual},
    }


def measure(size: str, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return, for each variant, its time as a multiple of the plain one, and the bytes that it holds."""
    anatomy = survey(make_model(*SHAPES[size]))
    watched = variants(steps, anatomy)
    models = {name: Measured(size, steps, anatomy, given) for name, given in watched.items()}
    seconds = np.zeros((rounds + 1, steps + 2, len(models)))
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{index}.h5" for index, name in enumerate(models) if name.endswith("written")}
        for turn in tqdm(range(rounds + 1), leave=False):
            if turn == 1:  # in the first the passes are named and the memory is set up
                for name, path in paths.items():
                    recorder = models[name].recorder
                    storage.create(path, models[name].provenance, recorder.priors if recorder else None)
            runs = [model.run(paths.get(name) if turn else None) for name, model in models.items()]
            for step in range(steps + 2):
                for place in range(len(runs)):
                    index = (place + turn + step) % len(runs)
                    start = time.thread_time()
                    next(runs[index])
                    seconds[turn, step, index] = time.thread_time() - start
    totals = np.median(seconds[1:], axis=0).sum(axis=0)
    found = {}
    for index, (name, model) in enumerate(models.items()):
        recorder = model.recorder
        device = host = 0
        if recorder is not None:
            device = recorder.bytes
            host = steps * recorder.bytes_a_step
        found[name] = {"time": totals[index] / totals[0], "device": device, "host": host}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["digits", "medium"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "profiling.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": 1,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "dicache": dicache.__version__,
    }
    content: dict[str, Any] = {"steps": options.steps, "rounds": options.rounds, "machine": machine, "sizes": {}}
    texts = []
    for size in options.sizes:
        found = content["sizes"][size] = measure(size, options.steps, options.rounds)
        layers, _, width, side = SHAPES[size]
        rows = [
            [name, f"{row['time']:.3f}", f"{row['device'] / 1e6:.1f}", f"{row['host'] / 1e6:.1f}"]
            for name, row in found.items()
        ]
        head = [f"{size}: {layers} x {width} x {side**2}", "time", "MB on device", "MB of main memory"]
        texts.append(table(head, rows))
        print(texts[-1], end="\n\n")  # noqa: T201
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    options.output.with_suffix(".txt").write_text("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    main()
