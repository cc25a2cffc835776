"""The judge of `clips`: reads object and motion off a clip; its features also give a Frechet distance."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dicache.models.zoo import clip_data, judging
from dicache.models.zoo.clip_data import CLASSES, FRAMES, STILL, Clip
from dicache.models.zoo.judging import frechet_distance, load_network, save_network, stage

FILE = "clip_judge.safetensors"


class ClipJudge(nn.Module):
    """A convolutional network over each frame, then a dense one over all, with a head an attribute and 96 features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*stage(3, 16), *stage(16, 32), *stage(32, 32))  # (n * 8, 32, 4, 4)
        self.frame = nn.Linear(32 * 16, 64)
        self.features = nn.Linear(FRAMES * 64, 96)
        self.heads = nn.ModuleDict({name: nn.Linear(96, len(classes)) for name, classes in CLASSES.items()})

    def embed(self, clips: Tensor) -> Tensor:
        """Return features, shape (n, 96), of clips in [-1, 1], shape (n, 8, 3, 32, 32)."""
        frames = nn.functional.silu(self.frame(self.body(clips.flatten(0, 1)).flatten(1)))  # (n * 8, 64)
        out: Tensor = nn.functional.silu(self.features(frames.reshape(len(clips), -1)))
        return out

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Return logits by attribute, each of shape (n, classes), of clips in [-1, 1], shape (n, 8, 3, 32, 32)."""
        features = self.embed(clips)
        return {name: head(features) for name, head in self.heads.items()}


@dataclass(frozen=True)
class Verdict(judging.Verdict):
    """Whether clips show what their captions ask for, clip by clip, each of shape (n,).

    What a caption does not say counts as right; so does any speed where the object is to stand still, since the
    direction tells that already.
    """

    shape: np.ndarray
    colour: np.ndarray
    direction: np.ndarray
    speed: np.ndarray
    background: np.ndarray


@dataclass(frozen=True)
class Judge:
    """The network with the statistics of real clips."""

    network: ClipJudge
    mean: np.ndarray  # (96,) mean feature of real clips
    covariance: np.ndarray  # (96, 96)

    @torch.no_grad()
    def see(self, clips: np.ndarray) -> list[Clip]:
        """Return what is seen in each of the clips in [0, 1], shape (n, 8, 32, 32, 3)."""
        seen = {name: logits.argmax(dim=1).tolist() for name, logits in self.network(as_input(clips)).items()}
        words = [{name: CLASSES[name][seen[name][i]] for name in CLASSES} for i in range(len(clips))]
        return [
            Clip(
                w["colour"],
                w["shape"],
                w["direction"],
                None if w["direction"] == STILL else w["speed"],
                w["background"],
            )
            for w in words
        ]

    def judge(self, clips: np.ndarray, captions: Sequence[str]) -> Verdict:
        """Compare clips, shape (n, 8, 32, 32, 3), with their captions, attribute by attribute.

        Raises:
            ValueError: If a caption is not of the grammar.
        """
        pairs = list(zip(self.see(clips), [clip_data.parse(caption) for caption in captions], strict=True))
        return Verdict(
            **{
                name: np.array([getattr(asked, name) in (None, getattr(seen, name)) for seen, asked in pairs])
                for name in CLASSES
            }
        )

    def accuracy(self, clips: np.ndarray, captions: Sequence[str]) -> float:
        """Return the share of clips, shape (n, 8, 32, 32, 3), that show everything their captions ask for."""
        return float(self.judge(clips, captions).everything.mean())

    @torch.no_grad()
    def features(self, clips: np.ndarray) -> Tensor:
        """Return features, shape (n, 96), of clips in [0, 1], shape (n, 8, 32, 32, 3)."""
        return self.network.embed(as_input(clips))

    def frechet(self, clips: np.ndarray) -> float:
        """Return the Frechet distance between the features of these clips and of real ones."""
        return frechet_distance(self.features(clips), self.mean, self.covariance)


def as_input(clips: np.ndarray) -> Tensor:
    """Turn clips in [0, 1], shape (n, 8, 32, 32, 3), into the network's input in [-1, 1], shape (n, 8, 3, 32, 32)."""
    return torch.from_numpy(np.asarray(clips, dtype=np.float32)).permute(0, 1, 4, 2, 3) * 2 - 1


@torch.no_grad()
def save_judge(network: ClipJudge, clips: Tensor, folder: Path) -> None:
    """Write the network and the statistics of real clips, bytes of shape (n, 8, 3, 32, 32), to `folder`."""
    features = torch.cat([network.embed(clip_data.as_input(part)) for part in clips.split(250)])
    save_network(network, features, folder / FILE, half=True)


def load_judge(folder: Path) -> Judge:
    """Read the judge that lies beside a bundled model."""
    network = ClipJudge()
    return Judge(network, **load_network(network, folder / FILE))
