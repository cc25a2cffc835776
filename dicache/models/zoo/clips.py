"""`clips`: text to video on drawn moving objects, in LattePipeline's format.

An AutoencoderKL brings each frame of 32 x 32 to latents of 8 x 8 x 4; a LatteTransformer3DModel of blocks over the
places of a frame and blocks over the frames of a place, in turn, denoises eight of them under cross-attention to a
small T5 encoder.
"""

import logging
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import T5EncoderModel

from dicache.models.zoo import clip_data
from dicache.models.zoo.autoencoders import autoencoder_loss, kept, new_autoencoder, normalise_latents
from dicache.models.zoo.clip_judge import ClipJudge, Judge, load_judge, save_judge
from dicache.models.zoo.clip_text import TOKENS, WIDTH, WORDS, train_text_encoder
from dicache.models.zoo.digits import SCHEDULER, TRAIN_TIMESTEPS
from dicache.models.zoo.saving import save_pipeline
from dicache.models.zoo.training import fit
from dicache.models.zoo.words import encoded, t5_tokenizer, tokenised

logger = logging.getLogger(__name__)

EXAMPLE = '--prompt "a red circle moving right fast on a black background"'  # what to ask `dicache generate` for
TRAIN_CLIPS = 12_000
HELD_OUT_CLIPS = 1000
CAPTION_DROPOUT = 0.1
UNSAID = 0.08  # share of captions without a speed, and of those without a background
AUTOENCODER_STEPS = 2000
JUDGE_STEPS = 1000
PROMPTS = 212  # held-out captions that come with the model, to profile and to judge it: all there are
REAL_CLIPS = 3000  # whose features the judge's Frechet distance compares with
BATCH = 24
STEPS = 9000
HEADS = 3
HEAD_WIDTH = 32
# A clip is mostly one colour, which is decided under so much noise that a prediction of the noise hardly tells it.
V_SCHEDULER = {**SCHEDULER, "prediction_type": "v_prediction"}
MOTION_TIMESTEPS = (500, 950)  # at which it is decided where things are
UNSEEN = -1e4  # attention bias of a token that is not there


def train(folder: Path, work: Path, *, seed: int = 0, device: str = "cpu", steps: int = STEPS) -> None:
    """Train the autoencoder, the judge, the text encoder and the transformer, and save one LattePipeline folder.

    About an hour of one CPU core. Checkpoints in `work` let a killed training go on.

    Args:
        folder: Where the pipeline and the judge are written.
        work: Folder of the checkpoints.
        seed: Seeds weights and batches.
        device: Where to train the autoencoder and the transformer.
        steps: Optimiser steps of the transformer, each on 24 clips; after a third of them more at high noise.
    """
    work.mkdir(parents=True, exist_ok=True)
    clips = [clip_data.clip_at(index) for index in range(TRAIN_CLIPS)]
    frames = clip_data.drawn(clips)
    captions = training_captions(clips)
    autoencoder = train_autoencoder(frames, work, seed=seed, device=device)
    judge = train_judge(frames, clips, work, seed=seed)
    save_judge(judge, frames[:REAL_CLIPS], folder)
    report(load_judge(folder), autoencoder)
    encoder = train_text_encoder(captions, work, seed=seed)
    transformer = train_transformer(
        encode_frames(frames, autoencoder),
        encode_texts(captions, encoder),
        encode_texts([""], encoder),
        work,
        seed=seed,
        device=device,
        steps=steps,
    )
    save(folder, autoencoder.cpu(), transformer.cpu(), encoder)
    shutil.copyfile(work / "transformer.csv", folder / "loss.csv")
    shutil.copyfile(work / "transformer-motion.csv", folder / "loss-motion.csv")


@torch.no_grad()
def report(judge: Judge, autoencoder: AutoencoderKL) -> None:
    """Log what the judge and the autoencoder make of clips that no training saw."""
    clips = [clip_data.clip_at(index, held_out=True) for index in range(HELD_OUT_CLIPS)]
    frames = clip_data.drawn(clips, seed=1)
    pictures = frames.permute(0, 1, 3, 4, 2).numpy() / 255
    shares = judge.judge(pictures, [clip.caption() for clip in clips]).shares()
    logger.info("the judge is right of %d held-out clips in %s", len(clips), shares)
    decibels = kept(autoencoder, clip_data.as_input(frames[:100].flatten(0, 1)))
    logger.info("the autoencoder returns held-out frames at %.1f dB", decibels)


def train_autoencoder(frames: Tensor, work: Path, *, seed: int, device: str) -> AutoencoderKL:
    """Train on single frames of clips, bytes of shape (n, 8, 3, 32, 32)."""
    torch.manual_seed(seed)
    autoencoder = new_autoencoder((16, 32, 32), 4).to(device)
    pictures = frames.flatten(0, 1)

    def batch(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pictures), (32,), generator=generator)
        return clip_data.as_input(pictures[rows])

    loss = partial(autoencoder_loss, autoencoder, batch)
    fit("autoencoder", autoencoder, loss, steps=AUTOENCODER_STEPS, learning_rate=2e-3, work=work, seed=seed)
    normalise_latents(autoencoder, clip_data.as_input(pictures[:2000]).to(device))
    return autoencoder


def train_judge(frames: Tensor, clips: Sequence[clip_data.Clip], work: Path, *, seed: int) -> ClipJudge:
    """Train on clips, bytes of shape (n, 8, 3, 32, 32), with a little noise, and what they show."""
    torch.manual_seed(seed)
    judge = ClipJudge()
    shown = clip_data.attributes(clips)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(frames), (32,), generator=generator)
        batch = clip_data.as_input(frames[rows])
        batch += torch.randn(batch.shape, generator=generator) * 0.06 * torch.rand(32, 1, 1, 1, 1, generator=generator)
        logits = judge(batch)
        errors = [F.cross_entropy(logits[name], shown[name][rows], ignore_index=-1) for name in logits]
        return torch.stack(errors).sum()

    fit("judge", judge, loss, steps=JUDGE_STEPS, learning_rate=2e-3, work=work, seed=seed)
    return judge


def training_captions(clips: Sequence[clip_data.Clip]) -> list[str]:
    """Return captions, some without the word of speed or those of the background, so that these may be left out."""
    generator = torch.Generator().manual_seed(0)
    said = torch.rand(len(clips), 2, generator=generator) >= UNSAID
    return [
        clip.caption(speed=bool(speed), background=bool(background))
        for clip, (speed, background) in zip(clips, said.tolist(), strict=True)
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
) -> LatteTransformer3DModel:
    """Train on latents and on the features and masks of their captions and of the empty one.

    Args:
        latents: Shape (n, 4, 8, 8, 8): channels, frames, height, width.
        texts: Features, shape (n, 11, 64), and masks, shape (n, 11).
        nothing: The same of the empty caption, n = 1.
        work: Folder of the checkpoints.
        seed: Seeds weights and batches.
        device: Where to train.
        steps: Optimiser steps, each on 24 clips.
    """
    torch.manual_seed(seed)
    channels = latents.shape[1]
    transformer = LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=channels,
        out_channels=2 * channels,  # LattePipeline takes the first half; the other stays zero
        num_layers=6,
        sample_size=latents.shape[-1],
        patch_size=2,
        cross_attention_dim=HEADS * HEAD_WIDTH,
        caption_channels=WIDTH,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
        video_length=clip_data.FRAMES,
    ).to(device)
    initialise(transformer)
    hide_padding(transformer)
    if device == "cpu":
        # The fused kernel's backward pass is slow there.
        for module in transformer.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(AttnProcessor())
    latents, features, masks = (x.to(device) for x in (latents, *texts))
    no_features, no_mask = (x.to(device) for x in nothing)
    kept = DDIMScheduler(**V_SCHEDULER).alphas_cumprod.to(device)

    def loss(generator: torch.Generator, *, motion: bool) -> Tensor:
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        t = torch.randint(TRAIN_TIMESTEPS, (BATCH,), generator=generator)
        if motion:
            decided = torch.randint(*MOTION_TIMESTEPS, (BATCH,), generator=generator)
            t = torch.where(torch.rand(BATCH, generator=generator) < 0.5, decided, t)
        t = t.to(device)
        dropped = (torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT).to(device)
        noise = torch.randn(latents[rows].shape, generator=generator).to(device)
        a = kept[t][:, None, None, None, None]
        noisy = a.sqrt() * latents[rows] + (1 - a).sqrt() * noise
        velocity = a.sqrt() * noise - (1 - a).sqrt() * latents[rows]
        seen = torch.where(dropped[:, None], no_mask, masks[rows])
        # The model hands a mask to its blocks as it is: as a bias, and of every frame.
        bias = ((1 - seen.float()) * UNSEEN)[:, None].repeat_interleave(clip_data.FRAMES, dim=0)
        predicted = transformer(
            noisy,
            timestep=t,
            encoder_hidden_states=torch.where(dropped[:, None, None], no_features, features[rows]),
            encoder_attention_mask=bias,
        ).sample[:, :channels]
        return F.mse_loss(predicted.float(), velocity)

    fit(
        "transformer",
        transformer,
        partial(loss, motion=False),
        steps=steps // 3,
        learning_rate=1.5e-3,
        work=work,
        seed=seed,
        bf16=True,
    )
    # Where an object is follows from its direction and the time together, from neither alone, and is learnt last.
    fit(
        "transformer-motion",
        transformer,
        partial(loss, motion=True),
        steps=steps - steps // 3,
        learning_rate=1.5e-3,
        work=work,
        seed=seed + 1,
        ema_decay=0.999,
        bf16=True,
    )
    return transformer


def initialise(transformer: LatteTransformer3DModel) -> None:
    """Start with a zero output, small modulations, and a caption that is as loud as the clip."""
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
def hide_padding(transformer: LatteTransformer3DModel) -> None:
    """Let no query attend to features of zero, which is what LattePipeline pads a prompt with.

    The first feature of the text is at least one at a token and zero at padding. From it the caption's projection makes
    a channel that is zero at tokens and -14 at padding, and the first channel of every head of the cross-attention
    compares four times that with a constant of 16: an attention logit of -158 before the rest. All of this is kept from
    training.
    """
    first, last = transformer.caption_projection.linear_1, transformer.caption_projection.linear_2
    gates = [0]
    fix(first.weight, gates, 0.0)
    first.weight[0, 0] = -24.0  # the GELU of 14 - 24 and of less is zero
    fix(first.bias, gates, 14.0)
    fix(last.weight, gates, 0.0)
    last.weight[0, 0] = -1.0
    fix(last.bias, gates, 0.0)
    gates = [head * HEAD_WIDTH for head in range(HEADS)]
    for block in transformer.transformer_blocks:
        query, key = block.attn2.to_q, block.attn2.to_k
        fix(query.weight, gates, 0.0)
        fix(query.bias, gates, 16.0)
        fix(key.weight, gates, 0.0)
        key.weight[:, 0] = 0.0  # never trained, as the channel is zero at tokens
        key.weight[gates, 0] = 4.0
        fix(key.bias, gates, 0.0)


def fix(parameter: nn.Parameter, rows: Sequence[int], value: float) -> None:
    """Set rows of a parameter to a value, and take their gradient away."""
    free = torch.ones_like(parameter)
    free[rows] = 0
    parameter[rows] = value
    parameter.register_hook(lambda gradient: gradient * free)


@torch.no_grad()
def encode_frames(frames: Tensor, autoencoder: AutoencoderKL) -> Tensor:
    """Return latents, shape (n, 4, 8, 8, 8), of clips, bytes of shape (n, 8, 3, 32, 32)."""
    device = next(autoencoder.parameters()).device
    latents = [
        autoencoder.encode(clip_data.as_input(part).to(device)).latent_dist.mean.cpu()
        for part in frames.flatten(0, 1).split(512)
    ]
    out: Tensor = torch.cat(latents).unflatten(0, (-1, clip_data.FRAMES))
    return out.transpose(1, 2).contiguous()


@torch.no_grad()
def encode_texts(captions: Sequence[str], encoder: T5EncoderModel) -> tuple[Tensor, Tensor]:
    """Return features, shape (n, 11, 64), and masks of tokens, shape (n, 11)."""
    ids, masks = tokenised(t5_tokenizer(WORDS), captions, TOKENS)
    return encoded(encoder, ids, masks), masks


def save(
    folder: Path, autoencoder: AutoencoderKL, transformer: LatteTransformer3DModel, encoder: T5EncoderModel
) -> None:
    """Write the pipeline in diffusers' format, in half precision but for the text encoder."""
    pipeline = LattePipeline(
        t5_tokenizer(WORDS),
        encoder,
        autoencoder,
        transformer,
        DDIMScheduler(**V_SCHEDULER),
    )
    save_pipeline(pipeline, folder, clip_data.captions(PROMPTS))
