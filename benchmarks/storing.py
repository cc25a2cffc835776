"""What is kept, stored in fewer bits: what it takes and what it changes: `python -m benchmarks.storing`."""

import argparse

import numpy as np
import torch

import dicache
from benchmarks.bench import RESULTS, Bench
from dicache.calibrate.fora import Fora
from dicache.cli.command import table
from dicache.evaluate.quality import psnr
from dicache.models.sampling import sample
from dicache.runtime.storing import DTYPES
from dicache.schedules import Schedule


def made(bench: Bench, steps: int, schedule: Schedule, dtype: torch.dtype | None) -> tuple[np.ndarray, int]:
    """Return what a schedule makes, (images, ...), and the most bytes that it held for one of them."""
    sampling = bench.sampling(steps)
    with dicache.apply(bench.pipeline, schedule, store_dtype=dtype) as cache:
        images = [sample(bench.pipeline, [c], [seed], sampling)[0] for seed, c in enumerate(bench.conditions)]
        return np.stack(images), cache.stats.peak_bytes_held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits", help="a bundled one [default: digits]")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    bench = Bench(options.model, options.images, rounds=0)
    sampling = bench.sampling(options.steps)
    uncached = np.stack([sample(bench.pipeline, [c], [s], sampling)[0] for s, c in enumerate(bench.conditions)])
    _, schedule = bench.planned(options.steps, "fora", Fora(2))
    whole, most = made(bench, options.steps, schedule, None)
    rows = [["as it was made", f"{most / 1e3:.1f}", f"{np.mean(psnr(whole, uncached)):.2f}", "-"]]
    for dtype in DTYPES:
        images, held = made(bench, options.steps, schedule, dtype)
        figures = [f"{np.mean(psnr(images, other)):.2f}" for other in (uncached, whole)]
        rows.append([str(dtype).removeprefix("torch."), f"{held / 1e3:.1f}", *figures])
    columns = ["stored in", "kB held", "PSNR dB to uncached", "PSNR dB to as it was made"]
    text = (
        f"storing: {options.model}, {options.images} images, {options.steps} steps, every branch computed every second "
        f"step\n\n{table(columns, rows)}\n"
    )
    print(text)  # noqa: T201
    (RESULTS / f"storing-{options.model}.txt").write_text(text)


if __name__ == "__main__":
    main()
