"""How good the bundled models are: `python benchmarks/zoo.py`, and `python benchmarks/zoo.py --model scenes`.

Judges uncached samples. Of `digits`, the share that shows the digit that was asked for, and how much the digits of one
class differ beside real ones; of `scenes`, the share that shows each attribute of captions with held-out combinations.
Writes the numbers, and of `digits` a grid to look at.
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
from dicache.models.zoo.scene_data import parse
from dicache.models.zoo.scene_judge import load_judge as load_scene_judge

BATCH = 50


def scenes(samples: int, steps: int, seed: int) -> str:
    """Return the shares of held-out captions that are shown, attribute by attribute, as a table."""
    pipeline, judge = load("scenes"), load_scene_judge(zoo.folder("scenes"))
    captions = default_conditions(pipeline, samples)
    starts = tqdm(range(0, samples, BATCH), desc="scenes", leave=False)
    made = [
        sample(
            pipeline, captions[i : i + BATCH], range(seed + i, seed + i + len(captions[i : i + BATCH])), Sampling(steps)
        )
        for i in starts
    ]
    verdict = judge.judge(np.concatenate(made), captions)
    two = np.array([parse(caption).second is not None for caption in captions])
    rows = []
    for name, chosen in (("all", two | ~two), ("two objects", two), ("one object", ~two)):
        right = {**vars(verdict), "everything": verdict.everything}
        rows.append([name, str(int(chosen.sum())), *(f"{values[chosen].mean():.3f}" for values in right.values())])
    return table([f"{steps} steps, default guidance", "n", *right], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", choices=("digits", "scenes"), default="digits")
    parser.add_argument("--samples", type=int, help="[default: 500 digits, 300 scenes]")
    parser.add_argument("--steps", type=int, help="[default: 50 of digits, 20 of scenes]")
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    usual = {"digits": (500, 50), "scenes": (300, 20)}[options.model]
    options.samples, options.steps = options.samples or usual[0], options.steps or usual[1]
    if options.model == "scenes":
        text = scenes(options.samples, options.steps, options.seed)
        print(text)  # noqa: T201
        (options.output / "zoo-scenes.txt").write_text(text + "\n")
        return
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
