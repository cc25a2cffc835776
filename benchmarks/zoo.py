"""How good the bundled models are: `python benchmarks/zoo.py`, and the same with `--model scenes` or `--model flow`.

Judges uncached samples. Of `digits`, the share that shows the digit that was asked for, and how much the digits of one
class differ beside real ones; of `scenes` and `flow`, the share that shows each attribute of captions with held-out
combinations. Writes the numbers, and a grid to look at: of the latter two where `--grid` says.
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
from dicache.models.zoo.scene_judge import load_judge as load_judge_of_scenes

BATCH = 50


def scenes(model: str, samples: int, steps: int, seed: int, grid: Path | None) -> str:
    """Return the shares of held-out captions that are shown, attribute by attribute, as a table; save the first 48."""
    pipeline, judge = load(model), load_judge_of_scenes(zoo.folder("scenes"))
    captions = default_conditions(pipeline, samples)
    sampling = Sampling(steps).usual_for(model).resolved(pipeline)
    made = np.concatenate(
        [
            sample(pipeline, captions[i : i + BATCH], range(seed + i, seed + min(i + BATCH, samples)), sampling)
            for i in tqdm(range(0, samples, BATCH), desc=model, leave=False)
        ]
    )
    verdict = judge.judge(made, captions)
    two = np.array([parse(caption).second is not None for caption in captions])
    rows = []
    for name, chosen in (("all", two | ~two), ("two objects", two), ("one object", ~two)):
        right = {**vars(verdict), "everything": verdict.everything}
        rows.append([name, str(int(chosen.sum())), *(f"{values[chosen].mean():.3f}" for values in right.values())])
    if grid is not None:
        lines = [np.concatenate(list(made[row : row + 12]), axis=1) for row in range(0, 48, 12)]
        save_png(np.concatenate(lines).repeat(3, axis=0).repeat(3, axis=1), grid)
    return table([f"{steps} steps, guidance {sampling.guidance:g}", "n", *right], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", choices=("digits", "scenes", "flow"), default="digits")
    parser.add_argument("--samples", type=int, help="[default: 500 of digits, 300 of the others]")
    parser.add_argument("--steps", type=int, help="[default: 50 of digits, 20 of the others]")
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--grid", type=Path, help="Where to draw the first 48 pictures of scenes or flow.")
    options = parser.parse_args()
    usual = (500, 50) if options.model == "digits" else (300, 20)
    options.samples, options.steps = options.samples or usual[0], options.steps or usual[1]
    if options.model != "digits":
        text = scenes(options.model, options.samples, options.steps, options.seed, options.grid)
        print(text)  # noqa: T201
        (options.output / f"zoo-{options.model}.txt").write_text(text + "\n")
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
