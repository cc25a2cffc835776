"""Judges of what a bundled model makes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dicache.models.names import find
from dicache.models.sampling import class_id

FRECHET_NEEDS = 100  # images; the covariance of fewer features than these says nothing


def judges_of(name: str, pipeline: Any, conditions: Sequence[str]) -> dict[str, Callable[[np.ndarray], float]]:
    """Return what can be judged of images made from these conditions: name -> a function of all images.

    `accuracy` is the share of images that show what was asked for, given where the judge can read all conditions;
    `frechet` the distance of their features from those of the real data, given for 100 images or more, and not for
    fewer than there are features. Models that are not bundled have no judges.
    """
    folder = Path(find(name).location)
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
