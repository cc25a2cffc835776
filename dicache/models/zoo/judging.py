"""What the judges of the bundled models share: their convolutions, verdicts, files and Frechet distance."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def stage(into: int, out: int) -> list[nn.Module]:
    """Return the layers that take images of `into` channels to half their size and `out` channels."""
    return [nn.Conv2d(into, out, 3, padding=1, bias=False), nn.GroupNorm(8, out), nn.SiLU(), nn.MaxPool2d(2)]


class Verdict:
    """Whether pictures show what their captions ask for: each field an attribute, picture by picture, shape (n,)."""

    @property
    def everything(self) -> np.ndarray:
        """Return whether all attributes are right, shape (n,)."""
        right: np.ndarray = np.all(list(vars(self).values()), axis=0)
        return right

    def shares(self) -> dict[str, float]:
        """Return the share of pictures in which each attribute is right, and in which everything is."""
        return {name: float(right.mean()) for name, right in (*vars(self).items(), ("everything", self.everything))}


def frechet_distance(features: Tensor, mean: np.ndarray, covariance: np.ndarray) -> float:
    """Return the Frechet distance between Gaussians: one fitted to features, shape (n, d), and a known one.

    References:
        Heusel et al., arXiv 1706.08500, equation 6, with features of a judge's network instead of Inception's.
    """
    from scipy.linalg import sqrtm

    found = features.double().numpy()
    found_mean, found_covariance = found.mean(axis=0), np.cov(found, rowvar=False)
    root = np.asarray(sqrtm(found_covariance @ covariance))
    return float(((found_mean - mean) ** 2).sum() + np.trace(found_covariance + covariance - 2 * root.real))


def save_network(network: nn.Module, features: Tensor, file: Path, *, half: bool = False, **more: Tensor) -> None:
    """Write a judge's network, and what is known of real data.

    Args:
        network: The judge.
        features: Of real data, shape (n, d); their mean and covariance are kept.
        file: To write, with the folder that it is in.
        half: Whether to write the network in half precision.
        more: Other numbers of the real data.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    features = features.double()
    statistics = {"mean": features.mean(dim=0), "covariance": torch.cov(features.T), **more}
    weights = {name: tensor.half() if half else tensor for name, tensor in network.state_dict().items()}
    save_file({**weights, **{f"real.{name}": tensor for name, tensor in statistics.items()}}, file)


def load_network(network: nn.Module, file: Path) -> dict[str, np.ndarray]:
    """Read a judge's network in place, and return what is known of real data by name."""
    tensors = load_file(file)
    real = {name: tensors.pop(name) for name in list(tensors) if name.startswith("real.")}
    network.load_state_dict(tensors)
    network.eval()
    return {name.removeprefix("real."): tensor.numpy() for name, tensor in real.items()}
