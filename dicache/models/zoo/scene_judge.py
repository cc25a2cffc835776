"""The judge of `scenes`: reads the attributes of a scene off its picture; its features also give a Frechet distance."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dicache.models.zoo import judging, scene_data
from dicache.models.zoo.judging import frechet_distance, load_network, save_network, stage
from dicache.models.zoo.scene_data import CLASSES, Item, Scene

FILE = "scene_judge.safetensors"


class SceneJudge(nn.Module):
    """A convolutional network with 128 features and one head an attribute of `scene_data.CLASSES`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *stage(3, 24), *stage(24, 48), *stage(48, 96), nn.Conv2d(96, 64, 3, padding=1), nn.SiLU()
        )  # (n, 64, 4, 4)
        self.features = nn.Linear(64 * 16, 128)
        self.spread: Tensor
        self.register_buffer("spread", torch.ones(128))  # of each feature over real scenes
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(classes)) for name, classes in CLASSES.items()})

    def embed(self, images: Tensor) -> Tensor:
        """Return features, shape (n, 128), of images in [-1, 1], shape (n, 3, 32, 32)."""
        out: Tensor = nn.functional.silu(self.features(self.body(images).flatten(1))) / self.spread
        return out

    @torch.no_grad()
    def normalise(self, images: Tensor) -> None:
        """Give each feature a deviation of 1 over these images and leave the logits as they are.

        Training leaves the features at any scale, and with them the Frechet distance.
        """
        spread = torch.cat([self.embed(part) for part in images.split(1000)]).std(dim=0).clamp(min=1e-6)
        self.spread *= spread
        for head in self.heads.values():
            assert isinstance(head, nn.Linear)
            head.weight *= spread

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits by attribute, each of shape (n, classes), of images in [-1, 1], shape (n, 3, 32, 32)."""
        features = self.embed(images)
        return {name: head(features) for name, head in self.heads.items()}


@dataclass(frozen=True)
class Verdict(judging.Verdict):
    """Whether pictures show what their captions ask for, picture by picture, each of shape (n,).

    What a caption does not say counts as right.

    Attributes:
        shape: Every object, at its place, has its shape.
        colour: Likewise.
        size: Likewise.
        relation: The objects are arranged as asked, and as named rather than exchanged.
        background: It is the one that was asked for.
    """

    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray
    relation: np.ndarray
    background: np.ndarray


@dataclass(frozen=True)
class Judge:
    """The network with the statistics of real scenes."""

    network: SceneJudge
    mean: np.ndarray  # (128,) mean feature of real scenes
    covariance: np.ndarray  # (128, 128)

    @torch.no_grad()
    def see(self, images: np.ndarray) -> list[Scene]:
        """Return the scene seen in each of the RGB images in [0, 1], shape (n, 32, 32, 3).

        The object at the top or at the left is named first.
        """
        seen = {name: logits.argmax(dim=1).tolist() for name, logits in self.network(as_input(images)).items()}
        words = [{name: CLASSES[name][seen[name][i]] for name in CLASSES} for i in range(len(images))]
        return [
            Scene(
                Item(w["first_size"], w["first_colour"], w["first_shape"]),
                {"alone": None, "vertical": "above", "horizontal": "left of"}[w["layout"]],
                None if w["layout"] == "alone" else Item(w["second_size"], w["second_colour"], w["second_shape"]),
                w["background"],
            )
            for w in words
        ]

    def judge(self, images: np.ndarray, captions: Sequence[str]) -> Verdict:
        """Compare images, shape (n, 32, 32, 3), with their captions, attribute by attribute.

        Raises:
            ValueError: If a caption is not of the grammar.
        """
        pairs = list(zip(self.see(images), [scene_data.parse(caption) for caption in captions], strict=True))
        return Verdict(
            **{
                name: np.array([_all_right(seen, asked, name) for seen, asked in pairs])
                for name in ("shape", "colour", "size")
            },
            relation=np.array([_relation_right(seen, asked) for seen, asked in pairs]),
            background=np.array([asked.background in (None, seen.background) for seen, asked in pairs]),
        )

    def accuracy(self, images: np.ndarray, captions: Sequence[str]) -> float:
        """Return the share of images, shape (n, 32, 32, 3), that show everything their captions ask for."""
        return float(self.judge(images, captions).everything.mean())

    @torch.no_grad()
    def features(self, images: np.ndarray) -> Tensor:
        """Return features, shape (n, 128), of images in [0, 1], shape (n, 32, 32, 3)."""
        return self.network.embed(as_input(images))

    def frechet(self, images: np.ndarray) -> float:
        """Return the Frechet distance between the features of these images and of real scenes."""
        return frechet_distance(self.features(images), self.mean, self.covariance)


def _agreement(seen: Item | None, asked: Item | None, attribute: str) -> bool:
    """Whether an object has one attribute that was asked for."""
    if asked is None or getattr(asked, attribute) is None:
        return True
    return seen is not None and getattr(seen, attribute) == getattr(asked, attribute)


def _all_right(seen: Scene, asked: Scene, attribute: str) -> bool:
    return all(_agreement(s, a, attribute) for s, a in zip(seen.slots, asked.slots, strict=True))


def _relation_right(seen: Scene, asked: Scene) -> bool:
    """Whether the arrangement is the one asked for, and fits better than with the two objects exchanged."""
    if seen.layout != asked.layout:
        return False
    if asked.second is None or asked.first == asked.second:
        return True
    attributes = ("size", "colour", "shape")

    def fit(slots: tuple[Item | None, ...]) -> int:
        return sum(_agreement(s, a, name) for s, a in zip(seen.slots, slots, strict=True) for name in attributes)

    return fit(asked.slots) > fit(asked.slots[::-1])


def as_input(images: np.ndarray) -> Tensor:
    """Turn RGB images in [0, 1], shape (n, 32, 32, 3), into the network's input, shape (n, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(np.asarray(images, dtype=np.float32)).permute(0, 3, 1, 2) * 2 - 1


@torch.no_grad()
def save_judge(network: SceneJudge, images: Tensor, folder: Path) -> None:
    """Write the network and the statistics of real scenes, images in [-1, 1], shape (n, 3, 32, 32), to `folder`."""
    save_network(network, network.embed(images), folder / FILE)


def load_judge(folder: Path) -> Judge:
    """Read the judge that lies beside a bundled model."""
    network = SceneJudge()
    return Judge(network, **load_network(network, folder / FILE))
