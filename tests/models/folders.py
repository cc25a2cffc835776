"""Tiny pipelines of the published models' classes, with random weights, as folders that `save_pretrained` wrote."""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.tiny import dit, randomised, unet

SIZE = 16  # of the images, in pixels; the latents are half of it
CHANNELS = 4  # of the latents
TEXT = 32  # channels of T5; of both CLIP encoders of SD3 together
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@cache
def folder(kind: str) -> Path:
    """Return the folder of a kind of pipeline, built once in a process."""
    where = Path(tempfile.mkdtemp(prefix="dicache-tests-"))
    atexit.register(shutil.rmtree, where, ignore_errors=True)
    PIPELINES[kind]().save_pretrained(where / kind)
    return where / kind


def _dit() -> Any:
    return DiTPipeline(dit(), _vae(), DDIMScheduler(clip_sample=False))


def _pixart(pipeline: type = PixArtAlphaPipeline, scheduler: type = DPMSolverMultistepScheduler) -> Any:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=2,
        sample_size=SIZE // 2,
        cross_attention_dim=16,
        caption_channels=TEXT,
        use_additional_conditions=False,
    )
    return pipeline(_t5_tokenizer(), _t5(), _vae(), randomised(transformer), scheduler())


def _sd3() -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=TEXT,
        pos_embed_max_size=SIZE // 2,
    )
    clip = [randomised(CLIPTextModelWithProjection(_clip_config()), seed) for seed in (1, 2)]
    return StableDiffusion3Pipeline(
        transformer=randomised(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.1),
        text_encoder=clip[0],
        tokenizer=_clip_tokenizer(),
        text_encoder_2=clip[1],
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(),
        tokenizer_3=_t5_tokenizer(),
    )


def _flux(*, guidance: bool) -> Any:
    transformer = FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT // 2,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
        vae=_vae(shift_factor=0.1),
        text_encoder=randomised(CLIPTextModel(_clip_config())),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        transformer=randomised(transformer),
    )


def _sd15() -> Any:
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=randomised(CLIPTextModel(_clip_config())),
        tokenizer=_clip_tokenizer(),
        unet=unet(cross_attention_dim=TEXT // 2),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "dit": _dit,
    "pixart": _pixart,
    "pixart-lcm": lambda: _pixart(scheduler=LCMScheduler),
    "pixart-sigma": lambda: _pixart(PixArtSigmaPipeline),
    "sd15": _sd15,
    "sd3": _sd3,
    "flux": lambda: _flux(guidance=True),
    "flux-schnell": lambda: _flux(guidance=False),
}


def _vae(**settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=SIZE,
        **settings,
    )


def _t5() -> Any:
    config = T5Config(
        vocab_size=128, d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return randomised(T5EncoderModel(config))


def _t5_tokenizer() -> Any:
    pieces = [(p, 0.0) for p in ("<pad>", "</s>", "<unk>")] + [("\u2581", -2.0)]
    pieces += [(letter, -3.0) for letter in LETTERS] + [("\u2581" + letter, -4.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def _clip_config() -> Any:
    return CLIPTextConfig(
        vocab_size=128,
        hidden_size=TEXT // 2,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=TEXT // 2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _clip_tokenizer() -> Any:
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
