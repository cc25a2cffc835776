"""The judge of `digits`: a classifier of real digits, whose features also give a Frechet distance."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dicache.models.zoo.digits import Digits

FILE = "judge.safetensors"


class DigitJudge(nn.Module):
    """A convolutional classifier of 32 x 32 digits with 64 features."""

    def __init__(self) -> None:
        super().__init__()

        def stage(into: int, out: int) -> list[nn.Module]:
            return [nn.Conv2d(into, out, 3, padding=1, bias=False), nn.GroupNorm(8, out), nn.SiLU(), nn.MaxPool2d(2)]

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
    def frechet(self, images: np.ndarray) -> float:
        """Return the Frechet distance between the features of these images and of the real digits.

        References:
            Heusel et al., arXiv 1706.08500, equation 6, with this classifier's 64 features instead of Inception's.
        """
        return frechet_distance(self.classifier.embed(as_input(images)), self.mean, self.covariance)


def frechet_distance(features: Tensor, mean: np.ndarray, covariance: np.ndarray) -> float:
    """Return the Frechet distance between Gaussians: one fitted to features, shape (n, d), and a known one."""
    from scipy.linalg import sqrtm

    found = features.double().numpy()
    found_mean, found_covariance = found.mean(axis=0), np.cov(found, rowvar=False)
    root = np.asarray(sqrtm(found_covariance @ covariance))
    return float(((found_mean - mean) ** 2).sum() + np.trace(found_covariance + covariance - 2 * root.real))


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
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    features = classifier.embed(digits.images).double()
    real = variety(digits.images[:, 0].numpy(), digits.labels.numpy())
    statistics = {
        "real.mean": features.mean(dim=0),
        "real.covariance": torch.cov(features.T),
        "real.variety": torch.tensor(real),
    }
    save_file({**classifier.state_dict(), **statistics}, folder / FILE)


def load_judge(folder: Path) -> Judge:
    """Read the judge that lies beside a bundled model."""
    from safetensors.torch import load_file

    tensors = load_file(folder / FILE)
    statistics = {name: tensors.pop(f"real.{name}") for name in ("mean", "covariance", "variety")}
    classifier = DigitJudge()
    classifier.load_state_dict(tensors)
    classifier.eval()
    return Judge(
        classifier,
        mean=statistics["mean"].numpy(),
        covariance=statistics["covariance"].numpy(),
        variety=float(statistics["variety"]),
    )
