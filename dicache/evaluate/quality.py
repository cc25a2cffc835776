"""How close cached images are to the uncached ones of the same seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IDENTICAL_DB = 120.0  # counted for identical images, whose PSNR is infinite: above what float32 images can differ by
RESAMPLES = 2000


@dataclass(frozen=True)
class Mean:
    """A mean over images with its 95 % bootstrap interval over prompts."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return dict(vars(self))


def psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio of each image in dB, shape (n,).

    Args:
        images: In [0, 1], shape (n, ...).
        reference: The same shape.
    """
    error = ((images.astype(np.float64) - reference) ** 2).reshape(len(images), -1).mean(axis=1)
    decibels: np.ndarray = -10 * np.log10(np.maximum(error, 10 ** (-IDENTICAL_DB / 10)))
    return decibels


def ssim(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the structural similarity of each image, at most 1, shape (n,); of a video, the mean over its frames.

    Args:
        images: In [0, 1], shape (n, h, w, 3) or (n, frames, h, w, 3).
        reference: The same shape.

    References:
        Wang et al., IEEE TIP 13(4), 2004, with its Gaussian window.
    """
    from skimage.metrics import structural_similarity

    def one(image: np.ndarray, wanted: np.ndarray) -> float:
        if image.ndim == 4:
            return float(np.mean([one(a, b) for a, b in zip(image, wanted, strict=True)]))
        return float(
            structural_similarity(
                image, wanted, channel_axis=-1, data_range=1.0, gaussian_weights=True, use_sample_covariance=False
            )
        )

    return np.array([one(a, b) for a, b in zip(images, reference, strict=True)])


def mean_with_interval(values: np.ndarray, seed: int = 0, *, prompts: Sequence[str] | None = None) -> Mean:
    """Return the mean of one value an image and its 95 % interval over resampled sets of prompts.

    All images of a prompt are drawn together, because they are alike: twenty images of ten prompts say less than those
    of twenty. Of a single prompt the images are drawn.

    Args:
        values: Shape (n,).
        seed: Of the resampling; the same one draws the same sets.
        prompts: Of each image; None takes each to have its own.
    """
    values = np.asarray(values, dtype=np.float64)
    names = list(range(len(values))) if prompts is None or len(set(prompts)) == 1 else list(prompts)
    if len(names) != len(values):
        raise ValueError(f"found {len(values)} values and {len(names)} prompts; needed one of each an image")
    place = {name: number for number, name in enumerate(dict.fromkeys(names))}
    of = [place[name] for name in names]
    sums, counts = np.bincount(of, values), np.bincount(of)  # of each prompt
    rows = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.percentile(sums[rows].sum(axis=1) / counts[rows].sum(axis=1), [2.5, 97.5])
    return Mean(float(values.mean()), float(low), float(high))


def paired_difference(
    values: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray, prompts: Sequence[str] | None = None
) -> Mean:
    """Return by how much one result is above another, image by image of the same prompt and seed, with its interval.

    It is far narrower than those of the two means: what makes one image hard makes it hard for both.

    Args:
        values: One an image, shape (n,).
        others: Of the same images.
        prompts: As for `mean_with_interval`.
    """
    one, other = np.asarray(values, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if one.shape != other.shape:
        raise ValueError(f"found {len(one)} and {len(other)} values; needed those of the same images")
    return mean_with_interval(one - other, prompts=prompts)


def precision_recall(made: np.ndarray, real: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Return which share of what was made lies among the real, and which share of the real among what was made.

    A point lies among others if it is within the ball of one of them, that reaches to its third nearest neighbour.

    Args:
        made: Features, shape (n, d).
        real: Features of real images, shape (m, d).
        neighbours: Which nearest neighbour gives a ball's radius.

    References:
        Kynkaanniemi et al., arXiv 1904.06991, section 2.
    """
    from scipy.spatial.distance import cdist

    if min(len(made), len(real)) <= neighbours:
        raise ValueError(f"found {len(made)} and {len(real)} points, needed more than {neighbours} of each")
    between = cdist(made, real)
    radius_made, radius_real = (np.sort(cdist(x, x), axis=1)[:, neighbours] for x in (made, real))
    return float((between <= radius_real).any(axis=1).mean()), float(
        (between <= radius_made[:, None]).any(axis=0).mean()
    )
