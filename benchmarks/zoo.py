"""How good the bundled model is: `python benchmarks/zoo.py`.

Judges uncached samples: the share that shows the digit that was asked for, and how much the digits of one class differ
beside real ones. Writes the numbers and a grid to look at.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dicache.cli.command import table
from dicache.models import zoo
from dicache.models.images import save_png
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions, sample
from dicache.models.zoo import digits
from dicache.models.zoo.judge import load_judge, variety

BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    judge = load_judge(zoo.folder("digits"))
    _, held_out = digits.load()
    real = held_out.images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    known = judge.accuracy(real, held_out.labels.numpy())
    pipeline = load("digits")
    conditions = default_conditions(pipeline, options.samples)
    labels = np.array([int(condition) for condition in conditions])
    rows = []
    for guidance in (4.0, 1.5):
        starts = tqdm(range(0, options.samples, BATCH), desc=f"guidance {guidance}", leave=False)
        sampling = Sampling(steps=options.steps, guidance=guidance)
        images = np.concatenate(
            [
                sample(
                    pipeline,
                    conditions[start : start + BATCH],
                    range(options.seed + start, options.seed + start + len(conditions[start : start + BATCH])),
                    sampling,
                )
                for start in starts
            ]
        )
        varies = variety(images.mean(axis=3), labels) / judge.variety
        cells = (judge.accuracy(images, labels), varies, judge.frechet(images))
        rows.append([f"guidance {guidance}", *(f"{value:.3f}" for value in cells)])
        lines = [np.concatenate(list(images[row : row + 10]), axis=1) for row in range(0, min(100, len(images)), 10)]
        save_png(np.concatenate(lines), options.output / f"digits-guidance-{guidance}.png")
    held = (known, variety(real.mean(axis=3), held_out.labels.numpy()) / judge.variety, judge.frechet(real))
    rows.append(["held-out real digits", *(f"{value:.3f}" for value in held)])
    text = table([f"{options.samples} samples, {options.steps} steps", "accuracy", "variety", "frechet"], rows)
    print(text)  # noqa: T201
    (options.output / "zoo.txt").write_text(text + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
