"""Uncached runs, made once and kept on disk under a key of all that they depend on."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import diffusers
import numpy as np
import torch

from dicache.anatomy.fingerprint import config_of, digest, fingerprint
from dicache.models.sampling import Sampling
from dicache.schedules.replacing import replacing

FORMAT = 2  # before it, those of DiTPipeline held the latents twice


@dataclass(frozen=True)
class Trajectory:
    """What a pipeline made of some conditions and seeds.

    Attributes:
        images: In [0, 1], shape (n, h, w, 3), or (n, frames, h, w, 3).
        latents: After each step, half precision, shape (n, steps, ...).
    """

    images: np.ndarray
    latents: np.ndarray


def default_folder() -> Path:
    """Return where references are kept: `dicache/references` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dicache" / "references"


def key_of(pipeline: Any, conditions: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> str:
    """Return a name for an uncached run that is equal only where all that decides its images is.

    Of a GPU also its name: another one rounds otherwise.
    """
    parts = {name: fingerprint(part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    reference = next(part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
    device = torch.device(str(reference.device))
    configs = {
        name: config_of(part) for name, part in pipeline.components.items() if isinstance(part, diffusers.ConfigMixin)
    }
    tokenizers = {name: part.get_vocab() for name, part in pipeline.components.items() if hasattr(part, "get_vocab")}
    content = {
        "format": FORMAT,
        "pipeline": type(pipeline).__name__,
        "weights": parts,
        "scheduler": type(pipeline.scheduler).__name__,
        "configs": configs,
        "tokenizers": tokenizers,
        "sampling": asdict(sampling),
        "conditions": list(conditions),
        "seeds": list(seeds),
        "dtype": str(reference.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": [torch.__version__, diffusers.__version__],
    }
    return digest(content)


def read(folder: Path, key: str) -> Trajectory | None:
    """Return a kept run, or None if there is none that can be read."""
    try:
        with np.load(folder / f"{key}.npz") as file:
            return Trajectory(file["images"], file["latents"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None  # it is made again


def write(folder: Path, key: str, trajectory: Trajectory) -> None:
    """Keep a run; whoever reads sees all of it or nothing."""
    with replacing(folder / f"{key}.npz") as part, part.open("wb") as file:
        np.savez(file, images=trajectory.images, latents=trajectory.latents)


def latent_error(latents: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return |z - z'| / |z'| after each step, averaged over images, shape (steps,).

    Args:
        latents: Shape (n, steps, ...).
        reference: The same shape.
    """
    n, steps = reference.shape[:2]
    want = reference.reshape(n, steps, -1).astype(np.float64)
    error = latents.reshape(n, steps, -1).astype(np.float64) - want
    ratio = np.linalg.norm(error, axis=2) / np.maximum(np.linalg.norm(want, axis=2), 1e-12)
    mean: np.ndarray = ratio.mean(axis=0)
    return mean
