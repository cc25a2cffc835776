"""How much of the ideal speed-up a schedule reaches: `python benchmarks/replay.py`.

Every variant is a generator that makes one denoising step at a time. They advance in lockstep, in rotating order, on
the thread's CPU clock; per step the median over repetitions is taken and the steps are summed. A second unhooked model
shows the noise.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import dicache
from benchmarks.loops import body_by_hand, branches_by_hand, cached, make_model, plain
from dicache.anatomy import survey
from dicache.calibrate.fora import Fora
from dicache.cli.command import table
from dicache.schedules import Corrections, Plan, Rule, Schedule, Target
from dicache.schedules.corrections import name_of

# name: layers, heads, width, tokens a side
SIZES = {
    "noop": (28, 2, 32, 2),
    "digits": (12, 3, 96, 8),
    "small": (8, 4, 128, 8),
    "medium": (12, 6, 384, 16),
}
Variant = Callable[[], Iterator[Tensor]]


def variants(size: str, steps: int) -> dict[str, Variant]:
    """Return the loops to compare, each on a model of its own."""
    shape = SIZES[size]
    anatomy = survey(make_model(*shape))
    computes = "".join("C" if i % 2 == 0 else "." for i in range(steps))
    plans = {
        "compute all": Plan(steps),
        "FORA N=2": Fora(2, "start").plan(anatomy, steps),
        "body skip N=2": Plan(steps, (Rule("skip", computes),)),
    }
    schedules = {name: Schedule("benchmark", {}, anatomy, Target(), steps, plan) for name, plan in plans.items()}
    schedules["EOC on FORA N=2"] = corrected(schedules["FORA N=2"], tokens=shape[3] ** 2, width=shape[2])
    model = {name: make_model(*shape) for name in ("plain", "again", *schedules, "branches", "body")}
    return {
        "unhooked": lambda: plain(model["plain"], steps),
        "unhooked again": lambda: plain(model["again"], steps),
        **{name: _cached(model[name], steps, schedule) for name, schedule in schedules.items()},
        "FORA N=2 by hand": lambda: branches_by_hand(model["branches"], steps, computes),
        "body skip N=2 by hand": lambda: body_by_hand(model["body"], steps, computes),
    }


def corrected(base: Schedule, *, tokens: int, width: int) -> Schedule:
    """Return a schedule with a correction of every output that it holds, both halves of the batch apart."""
    table = base.table()
    sites = {key: row.replace("R", ".") for key, row in table.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name_of("0", key, step): torch.randn(2, tokens, width, generator=generator).mul_(0.01).numpy()
        for key, row in table.items()
        for step, letter in enumerate(row)
        if letter == "R"
    }
    return replace(base, corrections=Corrections("multiply", 0.01, {"0": 2}, sites, tensors))


def _cached(model: object, steps: int, schedule: Schedule) -> Variant:
    cache = dicache.apply(model, schedule)
    return lambda: cached(model, steps, cache)


@torch.no_grad()
def measure(loops: dict[str, Variant], steps: int, repetitions: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the seconds of one generation of each variant, and its last latents."""
    names = list(loops)
    seconds = np.zeros((repetitions, len(names), steps))
    last: dict[str, Tensor] = {}
    for repetition in tqdm(range(-1, repetitions), leave=False):
        running = [loops[name]() for name in names]
        for step in range(steps):
            for turn in range(len(names)):
                place = (repetition + step + turn) % len(names)
                start = time.thread_time()
                latents = next(running[place])
                spent = time.thread_time() - start
                last[names[place]] = latents
                if repetition >= 0:
                    seconds[repetition, place, step] = spent
        for loop in running:
            assert next(loop, None) is None
    medians = np.median(seconds, axis=0).sum(axis=1)
    return dict(zip(names, medians.tolist(), strict=True)), last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, record = [], []
    for size in options.sizes:
        repetitions = max(3, options.repetitions // (5 if size == "medium" else 1))
        seconds, last = measure(variants(size, options.steps), options.steps, repetitions)
        base = seconds["unhooked"]
        for name in ("FORA N=2", "body skip N=2"):
            difference = (last[name] - last[f"{name} by hand"]).abs().max() / last["unhooked"].abs().max()
            assert difference < 1e-4, f"{size}: {name} is not what is done by hand, {difference}"
            speedup, ideal = base / seconds[name], base / seconds[f"{name} by hand"]
            rows.append([f"{size} {name}", f"{speedup:.2f}", f"{ideal:.2f}", f"{speedup / ideal:.3f}"])
        added = seconds["EOC on FORA N=2"] / seconds["FORA N=2"]
        rows.append([f"{size} EOC on FORA N=2 / FORA N=2", f"{added:.3f}", "-", "-"])
        overhead = [seconds[name] / base for name in ("compute all", "unhooked again")]
        rows.append([f"{size} compute all / noise", *(f"{x:.3f}" for x in overhead), "-"])
        record.append({"size": size, "shape": SIZES[size], "repetitions": repetitions, "seconds": seconds})
    text = table(["", "speed-up", "by hand", "ratio"], rows)
    machine = (
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    )
    print(f"{machine}, one thread, {options.steps} steps\n{text}")  # noqa: T201
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "replay.txt").write_text(f"{machine}, one thread, {options.steps} steps\n{text}\n")
    (options.output / "replay.json").write_text(json.dumps({"machine": machine, "sizes": record}, indent=2) + "\n")


if __name__ == "__main__":
    main()
