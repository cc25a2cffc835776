"""`scenes`: text to image on drawn scenes, in PixArtAlphaPipeline's format.

An AutoencoderKL brings images of 32 x 32 to latents of 8 x 8 x 8; a PixArtTransformer2DModel with one token a latent
pixel denoises those under cross-attention to a small T5 encoder.
"""

import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import T5EncoderModel

from dicache.models.zoo import scene_data
from dicache.models.zoo.autoencoders import autoencoder_loss, kept, new_autoencoder, normalise_latents
from dicache.models.zoo.digits import SCHEDULER, TRAIN_TIMESTEPS
from dicache.models.zoo.saving import save_pipeline
from dicache.models.zoo.scene_judge import Judge, SceneJudge, load_judge, save_judge
from dicache.models.zoo.scene_text import TOKENS, WIDTH, WORDS, train_text_encoder
from dicache.models.zoo.training import fit
from dicache.models.zoo.words import encoded, t5_tokenizer, tokenised

logger = logging.getLogger(__name__)

EXAMPLE = '--prompt "a small red circle above a large blue square"'  # what to ask `dicache generate` for
TRAIN_SCENES = 48_000
CAPTION_DROPOUT = 0.1
UNSAID = 0.08  # share of captions without sizes, and of those without a background
AUTOENCODER_STEPS = 3000
JUDGE_STEPS = 3000
PROMPTS = 300  # held-out captions that come with the model, to profile and to judge it
PICTURES_A_PROMPT = 25  # drawn for the statistics that the judge's Frechet distance compares with
STEPS = 12_000


def train(folder: Path, work: Path, *, seed: int = 0, device: str = "cpu", steps: int = STEPS) -> None:
    """Train the judge, the text encoder, the autoencoder and the transformer, and save one PixArtAlphaPipeline folder.

    About 70 minutes of one CPU core. Checkpoints in `work` let a killed training go on.

    Args:
        folder: Where the pipeline and the judge are written.
        work: Folder of the checkpoints.
        seed: Seeds weights and batches.
        device: Where to train the autoencoder and the transformer.
        steps: Optimiser steps of the transformer, each on 32 scenes.
    """
    work.mkdir(parents=True, exist_ok=True)
    scenes = [scene_data.scene_at(index) for index in range(TRAIN_SCENES)]
    images = scene_data.drawn(scenes)
    captions = training_captions(scenes)
    autoencoder = train_autoencoder(images, work, seed=seed, device=device)
    judge = train_judge(images, scenes, work, seed=seed)
    prompts = [scene_data.parse(caption) for caption in scene_data.captions(PROMPTS)]
    save_judge(judge, scene_data.drawn(prompts * PICTURES_A_PROMPT, seed=1), folder)
    report(autoencoder, load_judge(folder))
    encoder = train_text_encoder(captions, work, seed=seed)
    transformer = train_transformer(
        encode_images(images, autoencoder),
        encode_texts(captions, encoder),
        encode_texts([""], encoder),
        work,
        seed=seed,
        device=device,
        steps=steps,
    )
    save(folder, autoencoder.cpu(), transformer.cpu(), encoder)
    shutil.copyfile(work / "transformer.csv", folder / "loss.csv")


@torch.no_grad()
def report(autoencoder: AutoencoderKL, judge: Judge) -> None:
    """Log how well the judge and the autoencoder do on held-out scenes."""
    scenes = [scene_data.scene_at(index, held_out=True) for index in range(1000)]
    images = scene_data.drawn(scenes, seed=1)
    verdict = judge.judge(as_pictures(images), [scene.caption() for scene in scenes])
    logger.info("the judge reads %.2f %% of 1000 held-out scenes entirely right", 100 * verdict.everything.mean())
    logger.info("the autoencoder keeps them at %.1f dB", kept(autoencoder, images))


def as_pictures(images: Tensor) -> np.ndarray:
    """Turn images in [-1, 1], shape (n, 3, 32, 32), into pictures in [0, 1], shape (n, 32, 32, 3)."""
    pictures: np.ndarray = (images.permute(0, 2, 3, 1) / 2 + 0.5).numpy()
    return pictures


def train_autoencoder(
    images: Tensor,
    work: Path,
    *,
    seed: int,
    device: str,
    widths: tuple[int, ...] = (16, 32, 64),
    channels: int = 8,
    shift: float | None = None,
    steps: int = AUTOENCODER_STEPS,
) -> AutoencoderKL:
    """Train on images in [-1, 1], shape (n, 3, 32, 32).

    Args:
        images: What to train on.
        work: Folder of the checkpoints.
        seed: Seeds weights and batches.
        device: Where to train.
        widths: Channels of the stages; each but the first halves height and width.
        channels: Of the latents.
        shift: What the pipeline adds to latents; None where it knows none.
        steps: Optimiser steps, each on 32 images.
    """
    torch.manual_seed(seed)
    autoencoder = new_autoencoder(widths, channels, shift=shift).to(device)

    def batch(generator: torch.Generator) -> Tensor:
        return images[torch.randint(len(images), (32,), generator=generator)]

    fit(
        "autoencoder",
        autoencoder,
        partial(autoencoder_loss, autoencoder, batch),
        steps=steps,
        learning_rate=2e-3,
        work=work,
        seed=seed,
    )
    normalise_latents(autoencoder, images[:2000].to(device))
    return autoencoder


def train_judge(images: Tensor, scenes: list[scene_data.Scene], work: Path, *, seed: int) -> SceneJudge:
    """Train on images in [-1, 1], shape (n, 3, 32, 32), with a little noise, and what they show."""
    torch.manual_seed(seed)
    judge = SceneJudge()
    shown = scene_data.attributes(scenes)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (64,), generator=generator)
        batch = images[rows]
        noise = torch.randn(batch.shape, generator=generator) * 0.06 * torch.rand(64, 1, 1, 1, generator=generator)
        logits = judge(batch + noise)
        errors = [F.cross_entropy(logits[name], shown[name][rows], ignore_index=-1) for name in logits]
        return torch.stack(errors).sum()

    fit("judge", judge, loss, steps=JUDGE_STEPS, learning_rate=2e-3, work=work, seed=seed)
    judge.normalise(images[:8000])
    return judge


def training_captions(scenes: list[scene_data.Scene]) -> list[str]:
    """Return captions, some without the words of size or of the background, so that these may be left out."""
    generator = torch.Generator().manual_seed(0)
    said = torch.rand(len(scenes), 2, generator=generator) >= UNSAID
    return [
        scene.caption(sizes=bool(sizes), background=bool(background))
        for scene, (sizes, background) in zip(scenes, said.tolist(), strict=True)
    ]


def train_transformer(
    latents: Tensor,
    texts: tuple[Tensor, Tensor],
    nothing: tuple[Tensor, Tensor],
    work: Path,
    *,
    seed: int,
    device: str,
    steps: int,
) -> PixArtTransformer2DModel:
    """Train on latents, shape (n, 8, 8, 8), and the features and masks of their captions and of the empty one.

    Args:
        latents: Shape (n, 8, 8, 8).
        texts: Features, shape (n, 16, 96), and masks, shape (n, 16).
        nothing: The same of the empty caption, n = 1.
        work: Folder of the checkpoints.
        seed: Seeds weights and batches.
        device: Where to train.
        steps: Optimiser steps, each on 32 scenes.
    """
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        num_layers=12,
        sample_size=8,
        patch_size=1,
        cross_attention_dim=128,
        caption_channels=WIDTH,
        use_additional_conditions=False,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    ).to(device)
    initialise(transformer)
    if device == "cpu":
        # The fused kernel's backward pass takes half of the whole step there, at 64 tokens.
        transformer.set_attn_processor(AttnProcessor())
    latents, features, masks = (x.to(device) for x in (latents, *texts))
    no_features, no_mask = (x.to(device) for x in nothing)
    kept = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(device)
    weight = ((1 - kept) / kept).sqrt().clamp(max=20)  # 1 / sqrt(SNR): the middle between noise and image error

    def loss(generator: torch.Generator) -> Tensor:
        n = 32
        rows = torch.randint(len(latents), (n,), generator=generator)
        middle = torch.randint(100, 800, (n,), generator=generator)
        anywhere = torch.randint(TRAIN_TIMESTEPS, (n,), generator=generator)
        t = torch.where(torch.rand(n, generator=generator) < 0.5, middle, anywhere).to(device)
        dropped = (torch.rand(n, generator=generator) < CAPTION_DROPOUT).to(device)
        noise = torch.randn(latents[rows].shape, generator=generator).to(device)
        a = kept[t][:, None, None, None]
        noisy = a.sqrt() * latents[rows] + (1 - a).sqrt() * noise
        predicted = transformer(
            noisy,
            encoder_hidden_states=torch.where(dropped[:, None, None], no_features, features[rows]),
            encoder_attention_mask=torch.where(dropped[:, None], no_mask, masks[rows]),
            timestep=t,
        ).sample
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        weighted: Tensor = weight[t] * error
        return weighted.mean()

    fit(
        "transformer",
        transformer,
        loss,
        steps=steps,
        learning_rate=1.2e-3,
        work=work,
        seed=seed,
        ema_decay=0.999,
        bf16=True,
    )
    return transformer


def initialise(transformer: PixArtTransformer2DModel) -> None:
    """Start with a zero output, small modulations, and a caption that is as loud as the picture."""
    for layer in (transformer.caption_projection.linear_1, transformer.caption_projection.linear_2):
        nn.init.normal_(layer.weight, std=1.4 * layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    nn.init.normal_(transformer.adaln_single.linear.weight, std=0.02)
    nn.init.zeros_(transformer.adaln_single.linear.bias)
    for block in transformer.transformer_blocks:
        for linear in (block.attn2.to_q, block.attn2.to_k, block.attn2.to_v):
            nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)


@torch.no_grad()
def encode_images(images: Tensor, autoencoder: AutoencoderKL) -> Tensor:
    """Return latents, shape (n, 8, 8, 8), of images in [-1, 1], shape (n, 3, 32, 32)."""
    device = next(autoencoder.parameters()).device
    return torch.cat([autoencoder.encode(part.to(device)).latent_dist.mean.cpu() for part in images.split(500)])


@torch.no_grad()
def encode_texts(captions: Sequence[str], encoder: T5EncoderModel) -> tuple[Tensor, Tensor]:
    """Return features, shape (n, 16, 96), and masks of tokens, shape (n, 16)."""
    ids, masks = tokenised(t5_tokenizer(WORDS), captions, TOKENS)
    return encoded(encoder, ids, masks), masks


def save(
    folder: Path, autoencoder: AutoencoderKL, transformer: PixArtTransformer2DModel, encoder: T5EncoderModel
) -> None:
    """Write the pipeline in diffusers' format, in half precision but for the text encoder."""
    pipeline = PixArtAlphaPipeline(
        t5_tokenizer(WORDS),
        encoder,
        autoencoder,
        transformer,
        DDIMScheduler(**SCHEDULER),
    )
    save_pipeline(pipeline, folder, scene_data.captions(PROMPTS))
