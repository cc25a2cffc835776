"""`flow`: text to image on the drawn scenes of `scenes`, by rectified flow in FluxPipeline's format.

An AutoencoderKL brings images of 32 x 32 to latents of 16 x 16 x 4, which FluxPipeline packs into 64 tokens of 2 x 2.
A FluxTransformer2DModel turns noise into those, along with the tokens of a small T5 encoder; the pooled feature of a
small CLIP text model modulates its blocks.
"""

import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, T5EncoderModel

from dicache.models.judges import JUDGED_AS
from dicache.models.zoo import flow_text, scene_data
from dicache.models.zoo.autoencoders import kept
from dicache.models.zoo.flow_text import encode_pooled, train_pooled_encoder
from dicache.models.zoo.saving import save_pipeline
from dicache.models.zoo.scene_text import TOKENS, WORDS, train_text_encoder
from dicache.models.zoo.scenes import (
    CAPTION_DROPOUT,
    PROMPTS,
    TRAIN_SCENES,
    encode_images,
    train_autoencoder,
    training_captions,
)
from dicache.models.zoo.training import fit
from dicache.models.zoo.words import encoded, t5_tokenizer, tokenised

logger = logging.getLogger(__name__)

EXAMPLE = '--prompt "a small red circle above a large blue square"'  # what to ask `dicache generate` for
LATENT = 16  # height and width; a token holds 2 x 2 places
TEXT_WIDTH = 64
HEADS = 3
HEAD_WIDTH = 32
BATCH = 32
STEPS = 5000
AUTOENCODER_STEPS = 2000
LEARNING_RATE = 1.5e-3
# Where objects are is decided under much noise, which the usual logit-normal draw of mean 0 hardly visits.
TIME_MEAN, TIME_DEVIATION = 1.1, 1.2
SCHEDULER = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,  # as in Flux; at 64 tokens, sigmas are shifted by exp(base_shift) = 3
    "base_shift": TIME_MEAN,
    "base_image_seq_len": 64,
}


def new_transformer() -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=4,
        num_single_layers=6,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=flow_text.WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    initialise(transformer)
    return transformer


def initialise(transformer: FluxTransformer2DModel) -> None:
    """Start with a zero output and small modulations."""
    for module in [*transformer.transformer_blocks.modules(), *transformer.single_transformer_blocks.modules()]:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in transformer.modules():
        if isinstance(module, AdaLayerNormZero | AdaLayerNormZeroSingle | AdaLayerNormContinuous):
            nn.init.normal_(module.linear.weight, std=0.02)
            nn.init.zeros_(module.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)


def train(folder: Path, work: Path, *, seed: int = 0, device: str = "cpu", steps: int = STEPS) -> None:
    """Train the text encoders, the autoencoder and the transformer, and save one FluxPipeline folder.

    About 25 minutes of one CPU core. Checkpoints in `work` let a killed training go on. The judge is that of `scenes`.

    Args:
        folder: Where the pipeline is written.
        work: Folder of the checkpoints.
        seed: Seeds weights and batches.
        device: Where to train the autoencoder and the transformer.
        steps: Optimiser steps of the transformer, each on 32 scenes.
    """
    work.mkdir(parents=True, exist_ok=True)
    scenes = [scene_data.scene_at(index) for index in range(TRAIN_SCENES)]
    images = scene_data.drawn(scenes)
    captions = training_captions(scenes)
    autoencoder = train_autoencoder(
        images, work, seed=seed, device=device, widths=(16, 32), channels=4, shift=0.0, steps=AUTOENCODER_STEPS
    )
    held_out = scene_data.drawn([scene_data.scene_at(index, held_out=True) for index in range(1000)], seed=1)
    logger.info("the autoencoder keeps held-out scenes at %.1f dB", kept(autoencoder, held_out))
    encoder = train_text_encoder(captions, work, seed=seed, width=TEXT_WIDTH, masked=False)
    pooled = train_pooled_encoder(captions, work, seed=seed)
    transformer = train_transformer(
        packed(encode_images(images, autoencoder)),
        encode_texts(captions, encoder, pooled),
        encode_texts([""], encoder, pooled),
        work,
        seed=seed,
        device=device,
        steps=steps,
    )
    save(folder, autoencoder.cpu(), transformer.cpu(), encoder, pooled)
    shutil.copyfile(work / "transformer.csv", folder / "loss.csv")


def packed(latents: Tensor) -> Tensor:
    """Return latents, shape (n, 4, 16, 16), as the pipeline's tokens, shape (n, 64, 16)."""
    tokens: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return tokens


def places(text_tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """Return the positions of the image's tokens, shape (64, 3), and of the text's, all zero, shape (tokens, 3)."""
    side = LATENT // 2
    of_image: Tensor = FluxPipeline._prepare_latent_image_ids(1, side, side, device, torch.float32)
    return of_image, torch.zeros(text_tokens, 3, device=device)


def encode_texts(captions: Sequence[str], encoder: T5EncoderModel, pooled: CLIPTextModel) -> tuple[Tensor, Tensor]:
    """Return features of tokens, shape (n, 16, 64), and pooled features, shape (n, 64)."""
    ids, _ = tokenised(t5_tokenizer(WORDS), captions, TOKENS)
    return encoded(encoder, ids, None), encode_pooled(captions, pooled)


def train_transformer(
    latents: Tensor,
    texts: tuple[Tensor, Tensor],
    nothing: tuple[Tensor, Tensor],
    work: Path,
    *,
    seed: int,
    device: str,
    steps: int,
) -> FluxTransformer2DModel:
    """Train on packed latents, and the features of their captions and of the empty one.

    Args:
        latents: Shape (n, 64, 16).
        texts: Features of tokens, shape (n, 16, 64), and pooled ones, shape (n, 64).
        nothing: The same of the empty caption, n = 1.
        work: Folder of the checkpoints.
        seed: Seeds weights and batches.
        device: Where to train.
        steps: Optimiser steps, each on 32 scenes.

    References:
        Rectified flow with logit-normal times: Esser et al., arXiv 2403.03206, sections 2 and 3.1.
    """
    torch.manual_seed(seed)
    transformer = new_transformer().to(device)
    if device == "cpu":
        transformer.compile_repeated_blocks()  # a step takes two thirds of the time; needs a C++ compiler
    latents, features, pooled = (x.to(device) for x in (latents, *texts))
    no_features, no_pooled = (x.to(device) for x in nothing)
    of_image, of_text = places(features.shape[1], device)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        t = torch.sigmoid(TIME_MEAN + TIME_DEVIATION * torch.randn(BATCH, generator=generator)).to(device)
        dropped = (torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT).to(device)
        noise = torch.randn(latents[rows].shape, generator=generator).to(device)
        part = t[:, None, None]
        # The backward pass of the CPU's fused attention is slow at so few tokens.
        with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext():
            predicted = transformer(
                hidden_states=(1 - part) * latents[rows] + part * noise,
                encoder_hidden_states=torch.where(dropped[:, None, None], no_features, features[rows]),
                pooled_projections=torch.where(dropped[:, None], no_pooled, pooled[rows]),
                timestep=t,
                img_ids=of_image,
                txt_ids=of_text,
            ).sample
        return F.mse_loss(predicted.float(), noise - latents[rows])

    fit(
        "transformer",
        transformer,
        loss,
        steps=steps,
        learning_rate=LEARNING_RATE,
        work=work,
        seed=seed,
        ema_decay=0.999,
        bf16=True,
    )
    return transformer


def save(
    folder: Path,
    autoencoder: AutoencoderKL,
    transformer: FluxTransformer2DModel,
    encoder: T5EncoderModel,
    pooled: CLIPTextModel,
) -> None:
    """Write the pipeline in diffusers' format, and whose judge it has."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=autoencoder,
        text_encoder=pooled,
        tokenizer=flow_text.tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=t5_tokenizer(WORDS, TOKENS),
        transformer=transformer,
    )
    save_pipeline(pipeline, folder, scene_data.captions(PROMPTS))
    (folder / JUDGED_AS).write_text("scenes\n")
