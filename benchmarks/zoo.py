"""How good the bundled models are: `python benchmarks/zoo.py --model digits`, or another.

Judges uncached samples: the share that shows what was asked for, attribute by attribute, of captions whose combinations
training never saw; how much the samples differ beside real data; and how far their features are from those of held-out
real data. Writes the numbers to results, and a picture to look at.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dicache.cli.command import table
from dicache.evaluate.quality import precision_recall
from dicache.models import zoo
from dicache.models.images import save_png
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions, sample
from dicache.models.zoo import clip_data, clip_judge, digits, judge, scene_data, scene_judge

BATCH = 50
REAL = 500  # held-out real pictures to compare with


def made_by(model: str, conditions: Sequence[str], sampling: Sampling, seed: int) -> np.ndarray:
    pipeline, made = load(model), []
    for start in tqdm(range(0, len(conditions), BATCH), desc=model, leave=False):
        part = conditions[start : start + BATCH]
        made.append(sample(pipeline, part, range(seed + start, seed + start + len(part)), sampling))
    return np.concatenate(made)


def spread(judged: Any, made: np.ndarray, real: np.ndarray) -> list[str]:
    """Return Frechet distance, precision and recall in the features of a judge."""
    precision, recall = precision_recall(judged.features(made).numpy(), judged.features(real).numpy())
    return [f"{judged.frechet(made):.2f}", f"{precision:.3f}", f"{recall:.3f}"]


def of_digits(_: str, sampling: Sampling, samples: int, seed: int, grid: Path) -> str:
    judged = judge.load_judge(zoo.folder("digits"))
    held_out = digits.load()[1]
    real = held_out.images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    conditions = default_conditions(load("digits"), samples)
    labels = np.array([int(condition) for condition in conditions])
    sets = {
        f"guidance {scale}": made_by("digits", conditions, Sampling(sampling.steps, scale), seed)
        for scale in (4.0, 1.5)
    }
    rows = []
    for name, made in {**sets, "held-out real digits": real}.items():
        shown: np.ndarray = labels if name in sets else held_out.labels.numpy()
        cells = (judged.accuracy(made, shown), judge.variety(made.mean(axis=3), shown) / judged.variety)
        told = spread(judged, made, real) if name in sets else [f"{judged.frechet(real):.2f}", "", ""]
        rows.append([name, str(len(made)), *(f"{value:.3f}" for value in cells), *told])
    draw(sets["guidance 1.5"], 10, grid, rows=10)
    return table([f"{sampling.steps} steps", "n", "accuracy", "variety", *FEATURES], rows)


def of_captions(model: str, sampling: Sampling, samples: int, seed: int, grid: Path) -> str:
    pipeline = load(model)
    captions = default_conditions(pipeline, samples)
    made = made_by(model, captions, sampling, seed)
    judged: Any
    if model == "clips":
        judged = clip_judge.load_judge(zoo.folder("clips"))
        asked = [clip_data.parse(caption) for caption in captions]
        groups = {speed or "still": [clip.speed == speed for clip in asked] for speed in ("slowly", "fast", None)}
        held_out = [clip_data.clip_at(index, held_out=True) for index in range(REAL)]
        real = clip_data.drawn(held_out, seed=1).permute(0, 1, 3, 4, 2).numpy() / 255
    else:
        judged = scene_judge.load_judge(zoo.folder("scenes"))
        two = [scene_data.parse(caption).second is not None for caption in captions]
        groups = {"two objects": two, "one object": [not each for each in two]}
        scenes = [scene_data.scene_at(index, held_out=True) for index in range(REAL)]
        real = scene_data.drawn(scenes, seed=1).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    verdict = judged.judge(made, captions)
    rows = []
    for name, group in {"all": [True] * samples, **groups}.items():
        chosen = np.array(group)
        right = {**vars(verdict), "everything": verdict.everything}
        told = spread(judged, made, real) if chosen.all() else [""] * len(FEATURES)
        rows.append([name, str(chosen.sum()), *(f"{values[chosen].mean():.3f}" for values in right.values()), *told])
    rows.append(["held-out real ones", str(REAL), *[""] * len(right), f"{judged.frechet(real):.2f}", "", ""])
    draw(made, 12, grid)
    return table([f"{sampling.steps} steps, guidance {sampling.guidance:g}", "n", *right, *FEATURES], rows)


def draw(made: np.ndarray, columns: int, path: Path, rows: int = 4) -> None:
    """Write the first pictures, enlarged three times; of clips, one a row, its frames side by side."""
    if made.ndim == 5:
        made, columns, rows = made[:columns].reshape(-1, *made.shape[2:]), made.shape[1], columns
    lines = [np.concatenate(list(made[i : i + columns]), axis=1) for i in range(0, rows * columns, columns)]
    save_png(np.concatenate(lines).repeat(3, axis=0).repeat(3, axis=1), path)


FEATURES = ("frechet", "precision", "recall")
MODELS: dict[str, Callable[[str, Sampling, int, int, Path], str]] = {
    "digits": of_digits,
    "scenes": of_captions,
    "clips": of_captions,
    "flow": of_captions,
}
SAMPLES = {"digits": 500, "clips": 212}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="digits")
    parser.add_argument("--samples", type=int, help="[default: 500 of digits, 212 of clips, 300 of the others]")
    parser.add_argument("--steps", type=int, help="[default: the pipeline's]")
    parser.add_argument("--guidance", type=float, help="[default: the model's; of digits, 4 and 1.5]")
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    name = options.model
    sampling = Sampling(options.steps, options.guidance).usual_for(name).resolved(load(name))
    samples = options.samples or SAMPLES.get(name, 300)
    text = MODELS[name](name, sampling, samples, options.seed, options.output / f"zoo-{name}.png")
    print(text)  # noqa: T201
    (options.output / f"zoo-{name}.txt").write_text(text + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
