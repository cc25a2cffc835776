"""Tiny transformers of videos: one row of tokens, which attends to itself and then to the text."""

from typing import Any

import torch
from torch import Tensor

from tests.transformers.tiny_transformer import BATCH, Given, Tiny

CHANNELS = 4
FRAMES = 3
HEIGHT, WIDTH = 8, 10  # of the latents, twice the places of patches
PATCHES = FRAMES * (HEIGHT // 2) * (WIDTH // 2)
TEXT_TOKENS = 7
CAPTION = 20  # channels of the text
IMAGE_TOKENS = 6  # of the picture that a video begins with
IMAGE = 28  # channels of its embedding
POOLED = 36  # channels of the whole text's embedding

# Width 24, and nothing else of that size.
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": CAPTION,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 3,
}

COSMOS = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 3,
    "mlp_ratio": 2,
    "text_embed_dim": CAPTION,
    "adaln_lora_dim": 8,
    "max_size": (FRAMES, HEIGHT, WIDTH),
    "concat_padding_mask": False,  # its mask is resized by torchvision
}


def latents(given: Given, channels: int = CHANNELS, frames: int = FRAMES) -> Tensor:
    """Return a video, shape (batch, channels, frames, height, width)."""
    return given.noise(BATCH, channels, frames, HEIGHT, WIDTH)


def text(given: Given) -> Tensor:
    """Return a text a sample, shape (batch, tokens, channels)."""
    return given.noise(BATCH, TEXT_TOKENS, CAPTION)


def image(given: Given) -> Tensor:
    """Return a picture's embedding a sample, shape (batch, tokens, channels)."""
    return given.noise(BATCH, IMAGE_TOKENS, IMAGE)


def text_mask() -> Tensor:
    """Return which tokens of each text are not padding, shape (batch, tokens): the second text is shorter by two."""
    mask = torch.ones(BATCH, TEXT_TOKENS, dtype=torch.long)
    mask[1, -2:] = 0
    return mask


def at_time(given: Given, **more: Any) -> dict[str, Any]:
    """Return what nearly all of them take."""
    timestep = torch.full((BATCH,), 500)
    return {"hidden_states": latents(given), "timestep": timestep, "encoder_hidden_states": text(given), **more}


def masked(given: Given) -> dict[str, Any]:
    """Return the same, with a mask of the text."""
    return at_time(given, encoder_attention_mask=text_mask())


def of_image(given: Given) -> dict[str, Any]:
    """Return the same, with the picture that the video begins with: the models take the last 512 tokens for text."""
    text = given.noise(BATCH, 512, CAPTION)
    return {**at_time(given, encoder_hidden_states_image=image(given)), "encoder_hidden_states": text}


def _ltx(given: Given) -> dict[str, Any]:
    packed = given.noise(BATCH, PATCHES, CHANNELS)
    size = {"num_frames": FRAMES, "height": HEIGHT // 2, "width": WIDTH // 2}
    return {**masked(given), "hidden_states": packed, **size}


def _allegro(given: Given) -> dict[str, Any]:
    """Return the pipeline's, whose rotary embedding is (cosines and sines of each axis, places along each axis)."""
    places = torch.cartesian_prod(torch.arange(FRAMES), torch.arange(HEIGHT // 2), torch.arange(WIDTH // 2))
    turns = tuple((given.noise(PATCHES, 4).cos(), given.noise(PATCHES, 4).sin()) for _ in range(3))
    grid = tuple(axis[None].expand(BATCH, -1) for axis in places.unbind(1))
    return at_time(given, encoder_attention_mask=text_mask(), image_rotary_emb=(turns, grid))


def _cosmos(given: Given) -> dict[str, Any]:
    return at_time(given, fps=24)


def _cosmos_of_video(given: Given) -> dict[str, Any]:
    """Return the same, with a mask of the frames that are given, and a noise level a frame."""
    known = torch.zeros(BATCH, 1, FRAMES, HEIGHT, WIDTH)
    known[:, :, 0] = 1
    level = torch.full((BATCH, 1, FRAMES, 1, 1), 0.5)
    return {**_cosmos(given), "timestep": level, "condition_mask": known}


def kandinsky(given: Given) -> dict[str, Any]:
    """Return the pipeline's: channels last; the latents, those that are given, and which are, behind one another."""
    return {
        "hidden_states": given.noise(BATCH, FRAMES, HEIGHT, WIDTH, 2 * CHANNELS + 1),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": text(given),
        "pooled_projections": given.noise(BATCH, POOLED),
    }


def _kandinsky5(given: Given) -> dict[str, Any]:
    places = [torch.arange(FRAMES), torch.arange(HEIGHT // 2), torch.arange(WIDTH // 2)]
    return {**kandinsky(given), "visual_rope_pos": places, "text_rope_pos": torch.arange(TEXT_TOKENS)}


def _kandinsky6_sr(given: Given) -> dict[str, Any]:
    """Return latents whose patches make squares of eight by eight, over which its attention is sparse."""
    latents = given.noise(BATCH, 2, 16, 16, 2 * CHANNELS + 1)
    return {"hidden_states": latents, "timestep": torch.full((BATCH,), 500.0)}


def _any_flow(given: Given) -> dict[str, Any]:
    """Return frames before channels, and for each frame the noise level it is at and the one it goes to."""
    level = torch.full((BATCH, FRAMES), 500.0)
    frames_first = latents(given).transpose(1, 2)
    return {**at_time(given), "hidden_states": frames_first, "timestep": level, "r_timestep": level - 200}


def _temporal(given: Given) -> dict[str, Any]:
    frames = given.noise(BATCH * FRAMES, 8, HEIGHT, WIDTH)
    return {"hidden_states": frames, "num_frames": FRAMES}


VIDEO: dict[str, Tiny] = {
    "allegro": Tiny(
        kind="AllegroTransformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 3,
            "cross_attention_dim": 24,
            "sample_height": HEIGHT,
            "sample_width": WIDTH,
            "sample_frames": FRAMES,
            "caption_channels": CAPTION,
        },
        arguments=_allegro,
        blocks={"transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "any-flow": Tiny(
        kind="AnyFlowTransformer3DModel",
        config=WAN,
        arguments=_any_flow,
        blocks={"blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "chrono-edit": Tiny(
        kind="ChronoEditTransformer3DModel",
        config={**WAN, "image_dim": IMAGE, "added_kv_proj_dim": 24, "rope_temporal_skip_len": 8},
        arguments=of_image,
        blocks={"blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "cosmos": Tiny(
        kind="CosmosTransformer3DModel",
        config=COSMOS,
        arguments=_cosmos,
        blocks={"transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "cosmos-of-video": Tiny(
        kind="CosmosTransformer3DModel",
        config={**COSMOS, "in_channels": CHANNELS + 1},
        arguments=_cosmos_of_video,
        blocks={"transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "kandinsky5": Tiny(
        kind="Kandinsky5Transformer3DModel",
        config={
            "in_visual_dim": CHANNELS,
            "out_visual_dim": CHANNELS,
            "in_text_dim": CAPTION,
            "in_text_dim2": POOLED,
            "time_dim": 16,
            "model_dim": 24,
            "ff_dim": 40,
            "num_text_blocks": 2,
            "num_visual_blocks": 3,
            "axes_dims": (4, 4, 4),
            "visual_cond": True,
        },
        arguments=_kandinsky5,
        blocks={"visual_transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "kandinsky6-sr": Tiny(
        kind="Kandinsky6SRTransformer3DModel",
        config={
            "in_visual_dim": CHANNELS,
            "out_visual_dim": 6,
            "time_dim": 16,
            "patch_size": (1, 2, 2),
            "model_dim": 24,
            "ff_dim": 40,
            "num_visual_blocks": 3,
            "axes_dims": (4, 4, 4),
        },
        arguments=_kandinsky6_sr,
        blocks={"visual_transformer_blocks.0-2": "attn mlp"},
        segments=(3,),
    ),
    "latte": Tiny(
        kind="LatteTransformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": CHANNELS,
            "out_channels": 2 * CHANNELS,
            "num_layers": 3,
            "sample_size": 8,
            "patch_size": 2,
            "cross_attention_dim": 24,
            "caption_channels": CAPTION,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "video_length": FRAMES,
        },
        arguments=lambda given: {**at_time(given), "hidden_states": given.noise(BATCH, CHANNELS, FRAMES, 8, 8)},
        blocks={
            "transformer_blocks.0": "attn cross_attn mlp",
            "temporal_transformer_blocks.0": "attn mlp",
            "transformer_blocks.1": "attn cross_attn mlp",
            "temporal_transformer_blocks.1": "attn mlp",
            "transformer_blocks.2": "attn cross_attn mlp",
            "temporal_transformer_blocks.2": "attn mlp",
        },
        segments=(1, 1, 1, 1, 1, 1),
    ),
    "ltx": Tiny(
        kind="LTXVideoTransformer3DModel",
        config={
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "num_layers": 3,
            "caption_channels": CAPTION,
        },
        arguments=_ltx,
        blocks={"transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "sana-video": Tiny(
        kind="SanaVideoTransformer3DModel",
        config={
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 3,
            "num_cross_attention_heads": 3,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 24,
            "caption_channels": CAPTION,
            "rope_max_seq_len": 32,
        },
        arguments=masked,
        blocks={"transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "sky-reels-v2": Tiny(
        kind="SkyReelsV2Transformer3DModel",
        config=WAN,
        arguments=at_time,
        blocks={"blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "temporal": Tiny(
        kind="TransformerTemporalModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 8,
            "num_layers": 3,
            "norm_num_groups": 4,
        },
        arguments=_temporal,
        blocks={"transformer_blocks.0-2": "attn attn.attn2 mlp"},
        segments=(3,),
    ),
    "wan": Tiny(
        kind="WanTransformer3DModel",
        config=WAN,
        arguments=at_time,
        blocks={"blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "wan-of-image": Tiny(
        kind="WanTransformer3DModel",
        config={**WAN, "image_dim": IMAGE, "added_kv_proj_dim": 24},
        arguments=of_image,
        blocks={"blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
}
