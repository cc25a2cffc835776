"""`digits`: a class-conditional DiT trained on scikit-learn's handwritten digits, in DiTPipeline's format.

The data are the 1,797 real 8 x 8 digits of `sklearn.datasets.load_digits`, enlarged to 32 x 32; 300 of them are held
out from every training. An AutoencoderKL brings them to 8 x 8 x 4 latents, a DiTTransformer2DModel with one token a
latent pixel denoises those, and a small classifier judges what comes out.
"""

import copy
import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from dicache.models.zoo.autoencoders import autoencoder_loss, new_autoencoder, normalise_latents
from dicache.models.zoo.judge import DigitJudge, save_judge
from dicache.models.zoo.training import fit

logger = logging.getLogger(__name__)

NULL_LABEL = 1000  # DiTPipeline hard-codes it, whatever the number of classes
HELD_OUT = 300
AUGMENTED_COPIES = 24
TRAIN_TIMESTEPS = 1000
EXAMPLE = "--class seven"  # what to ask `dicache generate` for


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: images in [0, 1], shape (n, 1, 32, 32), and labels, shape (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load(seed: int = 0) -> tuple[Digits, Digits]:
    """Return the training digits and the 300 held-out ones, split at random with a fixed seed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.from_numpy(data.images.astype(np.float32) / 16)[:, None]  # (1797, 1, 8, 8)
    images = F.interpolate(small, size=32, mode="bicubic", align_corners=False).clamp(0, 1)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, held = order[HELD_OUT:], order[:HELD_OUT]
    return Digits(images[train], labels[train]), Digits(images[held], labels[held])


def jitter(images: Tensor, generator: torch.Generator, *, degrees: float, scale: float, shift: float) -> Tensor:
    """Rotate, scale and shift each image at random, as another hand would have written it.

    Args:
        images: Shape (n, c, h, w), background 0.
        generator: Source of the random numbers.
        degrees: Standard deviation of the rotation.
        scale: Standard deviation of the logarithm of the scale, per axis.
        shift: Standard deviation of the shift, as a fraction of half the width.
    """
    n = len(images)
    draw = torch.randn(n, 5, generator=generator).clamp(-2, 2).to(images.device)
    angle = draw[:, 0] * degrees * torch.pi / 180
    sx, sy = (draw[:, 1] * scale).exp(), (draw[:, 2] * scale).exp()
    rows = [
        torch.stack([angle.cos() * sx, -angle.sin() * sy, draw[:, 3] * shift], dim=1),
        torch.stack([angle.sin() * sx, angle.cos() * sy, draw[:, 4] * shift], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def as_rgb(images: Tensor) -> Tensor:
    """Turn grey images in [0, 1], shape (n, 1, h, w), into the autoencoder's, in [-1, 1], shape (n, 3, h, w)."""
    return (images * 2 - 1).expand(-1, 3, -1, -1)


def train(folder: Path, work: Path, *, seed: int = 0, device: str = "cpu", steps: int = 6000) -> None:
    """Train the judge, the autoencoder and the transformer, and save them as one DiTPipeline folder.

    About 45 minutes of one CPU core. Checkpoints in `work` let a killed training go on.

    Args:
        folder: Where the pipeline and `judge.safetensors` are written.
        work: Folder of the checkpoints.
        seed: Seeds weights and batches.
        device: Where to train.
        steps: Optimiser steps of the transformer, each on 32 digits.
    """
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    digits, held_out = load()
    judge = train_judge(digits, work, seed=seed)
    save_judge(judge, digits, folder)
    seen = judge(held_out.images).argmax(dim=1)
    logger.info("the judge knows %.2f %% of the held-out digits", 100 * (seen == held_out.labels).float().mean())
    autoencoder = train_autoencoder(digits, work, seed=seed, device=device)
    transformer = train_transformer(digits, autoencoder, work, seed=seed, device=device, steps=steps)
    save(folder, autoencoder.cpu(), transformer.cpu())


def train_judge(digits: Digits, work: Path, *, seed: int) -> DigitJudge:
    judge = DigitJudge()

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(digits), (64,), generator=generator)
        images = jitter(digits.images[rows], generator, degrees=8, scale=0.08, shift=0.06)
        logits: Tensor = judge(images)
        error: Tensor = F.cross_entropy(logits, digits.labels[rows], label_smoothing=0.05)
        return error

    fit("judge", judge, loss, steps=1500, learning_rate=2e-3, work=work, seed=seed)
    return judge


def train_autoencoder(digits: Digits, work: Path, *, seed: int, device: str) -> AutoencoderKL:
    autoencoder = new_autoencoder((16, 32, 32), 4).to(device)

    def batch(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(digits), (32,), generator=generator)
        return as_rgb(jitter(digits.images[rows], generator, degrees=4, scale=0.04, shift=0.04))

    loss = partial(autoencoder_loss, autoencoder, batch)
    fit("autoencoder", autoencoder, loss, steps=1200, learning_rate=2e-3, work=work, seed=seed)
    normalise_latents(autoencoder, as_rgb(digits.images).to(device))
    return autoencoder


def train_transformer(
    digits: Digits, autoencoder: AutoencoderKL, work: Path, *, seed: int, device: str, steps: int
) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=12,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=NULL_LABEL,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    ).to(device)
    blocks = transformer.transformer_blocks
    embedder = blocks[0].norm1.emb
    labels_table = embedder.class_embedder.embedding_table
    embedder.class_embedder.dropout_prob = 0.0  # each block would drop labels by itself; they are dropped below instead
    for block in blocks:
        block.norm1.emb = embedder
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(transformer.proj_out_1.weight)
    nn.init.zeros_(transformer.proj_out_1.bias)
    nn.init.zeros_(transformer.proj_out_2.weight)
    nn.init.zeros_(transformer.proj_out_2.bias)
    nn.init.normal_(labels_table.weight, std=0.25)

    latents, labels = encode(digits, autoencoder, seed)
    scheduler = DDIMScheduler(**SCHEDULER)
    kept = scheduler.alphas_cumprod.to(device)
    weight = ((1 - kept) / kept).sqrt().clamp(max=20)  # 1 / sqrt(SNR): the middle between noise and image error

    def loss(generator: torch.Generator) -> Tensor:
        n = 32
        rows = torch.randint(len(latents), (n,), generator=generator)
        middle = torch.randint(100, 800, (n,), generator=generator)
        anywhere = torch.randint(TRAIN_TIMESTEPS, (n,), generator=generator)
        t = torch.where(torch.rand(n, generator=generator) < 0.5, middle, anywhere).to(device)
        dropped = (torch.rand(n, generator=generator) < 0.1).to(device)
        noise = torch.randn(latents[rows].shape, generator=generator).to(device)
        a = kept[t][:, None, None, None]
        noisy = a.sqrt() * latents[rows].to(device) + (1 - a).sqrt() * noise
        asked = torch.where(dropped, NULL_LABEL, labels[rows].to(device))
        predicted = transformer(noisy, timestep=t, class_labels=asked).sample
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        weighted: Tensor = weight[t] * error
        return weighted.mean()

    fit(
        "transformer",
        transformer,
        loss,
        steps=steps,
        learning_rate=1.5e-3,
        work=work,
        seed=seed,
        boosted=(labels_table.weight,),
        bf16=True,
    )
    for block in blocks:
        block.norm1.emb = copy.deepcopy(embedder)  # save_pretrained refuses shared tensors
        block.norm1.emb.class_embedder.dropout_prob = 0.1
    return transformer


@torch.no_grad()
def encode(digits: Digits, autoencoder: AutoencoderKL, seed: int) -> tuple[Tensor, Tensor]:
    """Return latents, shape (n, 4, 8, 8), and labels of the digits and of jittered copies of them."""
    generator = torch.Generator().manual_seed(seed + 1)
    latents = []
    for repeat in range(AUGMENTED_COPIES):
        images = digits.images
        if repeat:
            images = jitter(images, generator, degrees=5, scale=0.05, shift=0.04)
        device = next(autoencoder.parameters()).device
        latents.append(autoencoder.encode(as_rgb(images).to(device)).latent_dist.mean.cpu())
    return torch.cat(latents), digits.labels.repeat(AUGMENTED_COPIES)


SCHEDULER = {
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,  # the default clips latents to [-1, 1]
    "set_alpha_to_one": True,
    "steps_offset": 0,
}


def save(folder: Path, autoencoder: AutoencoderKL, transformer: DiTTransformer2DModel) -> None:
    """Write the pipeline in diffusers' format, in half precision, with the class names it needs for `get_label_ids`."""
    pipeline = DiTPipeline(transformer.half(), autoencoder.half(), DDIMScheduler(**SCHEDULER))
    pipeline.save_pretrained(folder, safe_serialization=True)
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    content["id2label"] = {str(label): name for label, name in enumerate(names)}  # save_pretrained loses it
    index.write_text(json.dumps(content, indent=2) + "\n")
