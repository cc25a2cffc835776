"""Judges of what a bundled model makes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dicache.models import zoo
from dicache.models.names import find
from dicache.models.sampling import class_id

JUDGED_AS = "judged_as.txt"  # in a model's folder: the name of the bundled model whose judge reads its pictures
FRECHET_NEEDS = 100  # images; the covariance of fewer features than these says nothing


def judges_of(name: str, pipeline: Any, conditions: Sequence[str]) -> dict[str, Callable[[np.ndarray], float]]:
    """Return what can be judged of images made from these conditions: name -> a function of all images.

    `accuracy` is the share of images that show what was asked for, given where the judge can read all conditions;
    `frechet` the distance of their features from those of the real data, given for 100 images or more, and not for
    fewer than there are features. Models that were not trained here have no judges.
    """
    folder = Path(find(name).location)
    if (folder / JUDGED_AS).is_file():
        folder = zoo.folder((folder / JUDGED_AS).read_text().strip())
    judge: Any
    asked: Any
    if (folder / "judge.safetensors").is_file():
        from dicache.models.zoo.judge import load_judge

        judge, asked = load_judge(folder), np.array([class_id(pipeline, condition) for condition in conditions])
    elif (folder / "scene_judge.safetensors").is_file():
        from dicache.models.zoo import scene_data, scene_judge

        judge = scene_judge.load_judge(folder)
        asked = list(conditions) if all(map(scene_data.is_caption, conditions)) else None
    elif (folder / "clip_judge.safetensors").is_file():
        from dicache.models.zoo import clip_data, clip_judge

        judge = clip_judge.load_judge(folder)
        asked = list(conditions) if all(map(clip_data.is_caption, conditions)) else None
    else:
        return {}
    judges: dict[str, Callable[[np.ndarray], float]] = {}
    if asked is not None:
        judges["accuracy"] = lambda images: judge.accuracy(images, asked)
    if len(conditions) >= max(FRECHET_NEEDS, len(judge.mean)):
        judges["frechet"] = judge.frechet
    return judges
