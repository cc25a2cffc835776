"""Tiny pipelines of models for which TeaCache decides by the timestep alone."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor

from dicache.anatomy import Anatomy, survey
from dicache.anatomy.inputs import capture_inputs
from tests.tiny import CAPTION, CHANNELS, POOLED, SIZE, TEXT_TOKENS, WIDTH, randomised

STEPS = 12
LAYERS = (0, 1)  # of the second text encoder that HiDream reads

Run = Callable[..., Tensor]  # a seed -> latents


def wan() -> tuple[Any, Run]:
    """Two guidance passes a step, a projection of the time embedding that all blocks share, a shifted flow."""
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=CAPTION,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, None, scheduler, randomised(model))
    return pipe, _run(pipe, lambda text, pooled: {**_text("prompt_embeds", text), "num_frames": 5})


def cogvideox() -> tuple[Any, Run]:
    """One batched guidance pass, image and text in one attention, each block with its own projection."""
    model = CogVideoXTransformer3DModel(**COGVIDEOX)
    pipe = CogVideoXPipeline(None, None, None, randomised(model), CogVideoXDDIMScheduler())
    return pipe, _run(pipe, lambda text, pooled: {**_text("prompt_embeds", text), "num_frames": 5})


def hidream() -> tuple[Any, Run]:
    """What enters its blocks is the time embedding with that of the whole text added."""
    model = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=WIDTH // 2,
        num_attention_heads=2,
        caption_channels=[CAPTION, CAPTION],
        text_emb_dim=POOLED,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 4, 4),
        max_resolution=(SIZE, SIZE),
        llama_layers=LAYERS,
    )
    pipe = HiDreamImagePipeline(FlowMatchEulerDiscreteScheduler(), *[None] * 9, randomised(model))
    pipe.default_sample_size = 2  # else a size is scaled up to 1024 x 1024 pixels

    def options(text: Tensor, pooled: Tensor) -> dict[str, Any]:
        many = text[:, None].expand(-1, len(LAYERS), -1, -1, -1)
        return {
            **_text("prompt_embeds_t5", text),
            **_text("prompt_embeds_llama3", many),
            **_text("pooled_prompt_embeds", pooled),
        }

    return pipe, _run(pipe, options)


COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,  # by which the places of width, height and frames are told
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 8,
    "text_embed_dim": CAPTION,
    "num_layers": 3,
    "sample_width": SIZE,
    "sample_height": SIZE,
    "sample_frames": 5,
    "max_text_seq_length": TEXT_TOKENS,
}


def anatomy_of(pipe: Any, run: Run) -> Anatomy:
    return survey(pipe.transformer, capture_inputs(pipe.transformer, run))


def _text(name: str, value: Tensor) -> dict[str, Tensor]:
    """Return a text and its negative, each of one sample; those of many layers have the layers first."""
    return {name: value[0], f"negative_{name}": value[1]}


def _run(pipe: Any, options: Callable[[Tensor, Tensor], dict[str, Any]]) -> Run:
    pipe.set_progress_bar_config(disable=True)

    def run(seed: int = 0) -> Tensor:
        made = torch.Generator().manual_seed(100 + seed)
        text = torch.randn(2, 1, TEXT_TOKENS, CAPTION, generator=made)
        pooled = torch.randn(2, 1, POOLED, generator=made)
        out = pipe(
            **options(text, pooled),
            height=8 * SIZE,
            width=8 * SIZE,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
        latents: Tensor = out.images if hasattr(out, "images") else out.frames
        return latents

    return run
