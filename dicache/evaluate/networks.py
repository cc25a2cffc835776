"""The field's usual metrics, by networks that others trained: each needs a package and weights that are not shipped.

They say little of the bundled models' small drawings, which their networks never saw; those have judges of their own.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dicache.evaluate.evaluation import Distance, Judge
from dicache.models.hub import first_line
from dicache.models.names import ModelError

CLIP_MODEL = "openai/clip-vit-large-patch14"
SECONDS_TO_ANSWER = 20  # of whoever has the weights
BATCH = 16


@dataclass(frozen=True)
class Request:
    """What metrics are asked for.

    Attributes:
        conditions: Prompts, one an image.
        real: Folder of real images, for the distance of distributions.
        clip_model: Hub id or folder of the CLIP model.
    """

    conditions: Sequence[str]
    real: Path | None = None
    clip_model: str = CLIP_MODEL


def lpips(request: Request) -> Distance:
    """Return LPIPS with AlexNet, lower is closer.

    References:
        Zhang et al., arXiv 1801.03924.
    """
    with _weights("lpips"):
        network = _package("lpips", "torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity("alex")

    def distance(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
        pairs = zip(_tensors(images), _tensors(reference), strict=True)
        return np.array([float(network(2 * one - 1, 2 * two - 1)) for one, two in pairs])

    return distance


def clip(request: Request) -> Judge:
    """Return 100 times the mean cosine between the embeddings of images and their prompts, negative ones as 0.

    References:
        Hessel et al., arXiv 2104.08718.
    """
    from transformers import CLIPModel, CLIPProcessor

    with _weights("clip"):
        model = CLIPModel.from_pretrained(request.clip_model, use_safetensors=True).eval()
        processor = CLIPProcessor.from_pretrained(request.clip_model)

    @torch.no_grad()
    def score(images: np.ndarray) -> float:
        found = []
        pictures = _pictures(images)
        for start in range(0, len(pictures), BATCH):
            given = processor(
                text=list(request.conditions[start : start + BATCH]),
                images=[(255 * picture).round().astype(np.uint8) for picture in pictures[start : start + BATCH]],
                return_tensors="pt",
                padding=True,
                truncation=True,
            )
            out = model(**given)
            found.append(torch.cosine_similarity(out.image_embeds, out.text_embeds))
        return float(100 * torch.cat(found).clamp(min=0).mean())

    return score


def fid(request: Request) -> Judge:
    """Return the Frechet distance of Inception features from those of a folder of real images.

    References:
        Heusel et al., arXiv 1706.08500.
    """
    if request.real is None:
        raise ModelError("fid compares with real images; pass their folder as --real")
    with _weights("fid"):
        kind = _package("fid", "torchmetrics.image.fid").FrechetInceptionDistance
        metric = kind(feature=2048, normalize=True, reset_real_features=False)
    for picture in read_images(request.real):
        metric.update(picture, real=True)

    def score(images: np.ndarray) -> float:
        metric.reset()
        for picture in _tensors(images):
            metric.update(picture, real=False)
        return float(metric.compute())

    return score


def inception_score(request: Request) -> Judge:
    """Return the Inception score.

    References:
        Salimans et al., arXiv 1606.03498.
    """
    with _weights("is"):
        metric = _package("is", "torchmetrics.image.inception").InceptionScore(normalize=True)

    def score(images: np.ndarray) -> float:
        metric.reset()
        for picture in _tensors(images):
            metric.update(picture)
        return float(metric.compute()[0])

    return score


DISTANCES: dict[str, Callable[[Request], Distance]] = {"lpips": lpips}
SCORES: dict[str, Callable[[Request], Judge]] = {"clip": clip, "fid": fid, "is": inception_score}


def read_images(folder: Path) -> Iterator[Tensor]:
    """Yield the images of a folder, each in [0, 1], shape (1, 3, h, w).

    Raises:
        ModelError: If there are fewer than two.
    """
    from PIL import Image

    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if len(files) < 2:
        raise ModelError(f"{folder} has {len(files)} images; needed a folder of real ones, PNG, JPEG or WebP")
    for file in files:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        yield torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _pictures(images: np.ndarray) -> np.ndarray:
    """Return images, or the middle frames of videos, shape (n, h, w, 3)."""
    return images if images.ndim == 4 else images[:, images.shape[1] // 2]


def _tensors(images: np.ndarray) -> Iterator[Tensor]:
    for picture in _pictures(images):
        yield torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1)[None]


def _package(metric: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ModelError(
            f"{metric}: {first_line(error)}; `pip install 'dicache[metrics]'` brings what it needs"
        ) from None


@contextmanager
def _weights(metric: str) -> Iterator[None]:
    """Say in one line that a network's weights cannot be had, before anything is sampled."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_TO_ANSWER)
    try:
        yield
    except ModelError:
        raise
    except (ImportError, ModuleNotFoundError) as error:
        raise ModelError(
            f"{metric}: {first_line(error)}; `pip install 'dicache[metrics]'` brings what it needs"
        ) from None
    except Exception as error:
        raise ModelError(
            f"{metric}: the weights of its network are not on this machine, and cannot be downloaded "
            f"({type(error).__name__}: {first_line(error)[:100]}); get them where there is a network, and bring the "
            "caches of torch hub and of Hugging Face"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
