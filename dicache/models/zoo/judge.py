"""The judge of `digits`: a classifier of real digits, whose features also give a Frechet distance."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from dicache.models.zoo.judging import frechet_distance, load_network, save_network, stage

if TYPE_CHECKING:
    from dicache.models.zoo.digits import Digits

FILE = "judge.safetensors"


class DigitJudge(nn.Module):
    """A convolutional classifier of 32 x 32 digits with 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *stage(1, 16), *stage(16, 32), *stage(32, 64), nn.Conv2d(64, 64, 3, padding=1), nn.SiLU()
        )  # (n, 64, 4, 4)
        self.features = nn.Linear(64 * 16, 64)
        self.head = nn.Linear(64, 10)

    def embed(self, images: Tensor) -> Tensor:
        """Return features, shape (n, 64), of images in [0, 1], shape (n, 1, 32, 32)."""
        out: Tensor = nn.functional.silu(self.features(self.body(images * 2 - 1).flatten(1)))
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (n, 10), of images in [0, 1], shape (n, 1, 32, 32)."""
        out: Tensor = self.head(self.embed(images))
        return out


@dataclass(frozen=True)
class Judge:
    """The classifier with the statistics of the real digits."""

    classifier: DigitJudge
    mean: np.ndarray  # (64,) mean feature of the real digits
    covariance: np.ndarray  # (64, 64)
    variety: float  # mean over classes and pixels of the pixel's deviation within the class

    @torch.no_grad()
    def classify(self, images: np.ndarray) -> np.ndarray:
        """Return the digit seen in each image, shape (n,), from RGB images in [0, 1], shape (n, 32, 32, 3)."""
        seen: np.ndarray = self.classifier(as_input(images)).argmax(dim=1).numpy()
        return seen

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Return the share of images, shape (n, 32, 32, 3), that show the digit of `labels`, shape (n,)."""
        return float((self.classify(images) == labels).mean())

    @torch.no_grad()
    def features(self, images: np.ndarray) -> Tensor:
        """Return features, shape (n, 64), of RGB images in [0, 1], shape (n, 32, 32, 3)."""
        return self.classifier.embed(as_input(images))

    def frechet(self, images: np.ndarray) -> float:
        """Return the Frechet distance between the features of these images and of the real digits."""
        return frechet_distance(self.features(images), self.mean, self.covariance)


def as_input(images: np.ndarray) -> Tensor:
    """Turn RGB images in [0, 1], shape (n, 32, 32, 3), into the classifier's grey input, shape (n, 1, 32, 32)."""
    return torch.from_numpy(np.asarray(images, dtype=np.float32).mean(axis=3))[:, None]


def variety(images: np.ndarray, labels: np.ndarray) -> float:
    """Return how much the images of one class differ: the deviation of each pixel, averaged over pixels and classes.

    Args:
        images: Grey images in [0, 1], shape (n, h, w).
        labels: Shape (n,).
    """
    return float(np.mean([images[labels == label].std(axis=0).mean() for label in np.unique(labels)]))


@torch.no_grad()
def save_judge(classifier: DigitJudge, digits: "Digits", folder: Path) -> None:
    """Write the classifier and the real digits' statistics to `folder`."""
    real = variety(digits.images[:, 0].numpy(), digits.labels.numpy())
    save_network(classifier, classifier.embed(digits.images), folder / FILE, variety=torch.tensor(real))


def load_judge(folder: Path) -> Judge:
    """Read the judge that lies beside a bundled model."""
    classifier = DigitJudge()
    real = load_network(classifier, folder / FILE)
    return Judge(classifier, real["mean"], real["covariance"], float(real["variety"]))
