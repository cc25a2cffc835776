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

    `accuracy` is the share of images that show what was asked for; `frechet` the distance of their features from those
    of the real data, given for 100 images or more. Models that are not bundled have no judges.
    """
    source = find(name)
    folder = Path(source.location)
    if not (folder / "judge.safetensors").is_file():
        return {}
    from dicache.models.zoo.judge import load_judge

    judge = load_judge(folder)
    labels = np.array([class_id(pipeline, condition) for condition in conditions])
    judges: dict[str, Callable[[np.ndarray], float]] = {"accuracy": lambda images: judge.accuracy(images, labels)}
    if len(conditions) >= FRECHET_NEEDS:
        judges["frechet"] = judge.frechet
    return judges
