"""Tiny transformers of videos that are led by more than a text: earlier frames, a control, a figure, sound."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.transformers.tiny_transformer import BATCH, Given, Tiny
from tests.transformers.video import (
    CAPTION,
    CHANNELS,
    FRAMES,
    HEIGHT,
    IMAGE,
    IMAGE_TOKENS,
    PATCHES,
    POOLED,
    TEXT_TOKENS,
    WAN,
    WIDTH,
    at_time,
    kandinsky,
    latents,
    masked,
    of_image,
    text_mask,
)

SOUND_TOKENS = 11
SOUND = 6  # channels of sound's latents

KANDINSKY6: Mapping[str, Any] = {
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
    "in_audio_dim": SOUND,
    "out_audio_dim": SOUND,
    "model_dim_a": 32,
    "ff_dim_a": 44,
    "axes_dims_a": (4, 2, 2),
}


def _any_flow_far(given: Given) -> dict[str, Any]:
    """Return the call for two more frames behind one that is known by the keys and values that it left."""
    grid = HEIGHT // 2 * WIDTH // 2
    level = torch.full((BATCH, 2), 500.0)
    left = {
        layer: {"full_cache": given.noise(2, BATCH, 2, grid, 12), "compressed_cache": given.noise(2, BATCH, 2, 0, 12)}
        for layer in range(3)
    }
    return {
        **at_time(given),
        "hidden_states": given.noise(BATCH, 2, CHANNELS, HEIGHT, WIDTH),
        "timestep": level,
        "r_timestep": level - 200,
        "chunk_partition": [1, 2],
        "kv_cache": left,
        "kv_cache_flag": {"num_cached_chunks": 1, "is_cache_step": False},
    }


def _cosmos3(given: Given) -> dict[str, Any]:
    """Return the pipeline's: one row of text and patches, of which those of the first frame are given."""
    tokens = TEXT_TOKENS + PATCHES
    seen = torch.arange(TEXT_TOKENS, tokens)
    grid = PATCHES // FRAMES
    return {
        "input_ids": given.tokens(TEXT_TOKENS, below=30),
        "text_indexes": torch.arange(TEXT_TOKENS),
        "position_ids": torch.arange(tokens).expand(3, -1),
        "und_len": TEXT_TOKENS,
        "sequence_length": tokens,
        "vision_tokens": [given.noise(1, CHANNELS, FRAMES, HEIGHT, WIDTH)],
        "vision_token_shapes": [(FRAMES, HEIGHT // 2, WIDTH // 2)],
        "vision_sequence_indexes": seen,
        "vision_mse_loss_indexes": seen[grid:],
        "vision_timesteps": torch.full((PATCHES - grid,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(1, FRAMES)],
    }


def _helios(given: Given) -> dict[str, Any]:
    """Return the next frames, and the earlier ones: the older they are, the more of them are in a patch."""

    def at(start: int, count: int) -> torch.Tensor:
        return torch.arange(start, start + count).expand(BATCH, -1)

    return {
        **at_time(given),
        "indices_hidden_states": at(8, FRAMES),
        "indices_latents_history_short": at(6, 2),
        "indices_latents_history_mid": at(4, 2),
        "indices_latents_history_long": at(0, 4),
        "latents_history_short": latents(given, frames=2),
        "latents_history_mid": latents(given, frames=2),
        "latents_history_long": latents(given, frames=4),
    }


def _kandinsky6(given: Given) -> dict[str, Any]:
    return {**kandinsky(given), "encoder_attention_mask": text_mask().bool()}


def _kandinsky6_with_sound(given: Given) -> dict[str, Any]:
    return {**_kandinsky6(given), "audio_hidden_states": given.noise(BATCH, SOUND_TOKENS, SOUND)}


def _minimax_h3(given: Given) -> dict[str, Any]:
    """Return text, sound and video in one row of tokens, sound at a noise level of its own."""
    parts = torch.arange(TEXT_TOKENS + SOUND_TOKENS + PATCHES).split([TEXT_TOKENS, SOUND_TOKENS, PATCHES])
    tags = torch.cat([torch.full_like(part, tag) for part, tag in zip(parts, (1, 2, 0), strict=True)])
    return {
        "hidden_states": given.noise(BATCH, PATCHES, 4 * CHANNELS),
        "audio_hidden_states": given.noise(BATCH, SOUND_TOKENS, SOUND),
        "encoder_hidden_states": given.noise(BATCH, TEXT_TOKENS, CAPTION),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": torch.arange(len(tags))[:, None] * torch.tensor([1.0, 0.5, 0.25]),
        "text_indices": parts[0],
        "audio_indices": parts[1],
        "video_indices": parts[2],
    }


def _sana_wm(given: Given) -> dict[str, Any]:
    """Return a noise level a frame, a camera that moves forward (its place, then its lens), and rays of each pixel."""
    place = torch.eye(4).repeat(BATCH, FRAMES, 1, 1)
    place[..., 2, 3] = torch.arange(FRAMES) * 0.1
    lens = torch.tensor([WIDTH, HEIGHT, WIDTH / 2, HEIGHT / 2]).expand(BATCH, FRAMES, 4)
    return {
        **masked(given),
        "timestep": torch.full((BATCH, 1, FRAMES), 500.0),
        "encoder_hidden_states": given.noise(BATCH, 1, TEXT_TOKENS, CAPTION),
        "camera_conditions": torch.cat([place.flatten(-2), lens], dim=-1),
        "chunk_plucker": latents(given, SOUND),
    }


def _sana_wm_refiner(given: Given) -> dict[str, Any]:
    turns = given.noise(BATCH, PATCHES, 24)
    packed = given.noise(BATCH, PATCHES, CHANNELS)
    return {**masked(given), "hidden_states": packed, "video_rotary_emb": (turns.cos(), turns.sin())}


def _wan_animate(given: Given) -> dict[str, Any]:
    """Return latents with those of the first picture and where they are, poses of all frames but it, and faces."""
    return {
        **of_image(given),
        "hidden_states": latents(given, 2 * CHANNELS + 4),
        "pose_hidden_states": latents(given, frames=FRAMES - 1),
        "face_pixel_values": given.noise(BATCH, 3, 4 * FRAMES - 7, 16, 16),
    }


def _wan_animate2(given: Given) -> dict[str, Any]:
    """Return lists of samples, and the keys and values that the leading video, shorter by a frame, left."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    grid = PATCHES // FRAMES
    left = WanAnimate2KVCache(3)
    for layer in left.layer_caches:
        layer.store(*(given.noise(BATCH, (FRAMES - 1) * grid, 2, 12) for _ in range(2)))
    return {
        "hidden_states": list(latents(given)),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": list(given.noise(BATCH, TEXT_TOKENS, CAPTION)),
        "condition_latents": list(latents(given, CHANNELS + 4)),
        "encoder_hidden_states_image": given.noise(BATCH, IMAGE_TOKENS, 1280),
        "kv_cache": left,
        "kv_cache_mode": "cached",
        "seq_len": PATCHES,
        "reference_grid_sizes": torch.tensor([[FRAMES - 1, HEIGHT // 2, WIDTH // 2]] * BATCH),
        "origin_len": 4 * FRAMES - 7,
        "origin_area": [8 * HEIGHT, 8 * WIDTH],
    }


class _Uncompiled(Tiny):
    """Makes the mask of its attention without compiling what makes it, which would take seconds."""

    def build(self) -> nn.Module:
        model = super().build()
        make: Any = model.create_mask

        def create_mask(*arguments: Any) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return make(*arguments)

        vars(model)["create_mask"] = create_mask
        return model


def _wan_vace(given: Given) -> dict[str, Any]:
    control = latents(given, 9)
    return at_time(given, control_hidden_states=control, control_hidden_states_scale=torch.tensor([1.0, 0.5]))


ADAPTED_VIDEO: dict[str, Tiny] = {
    "any-flow-far": Tiny(
        kind="AnyFlowFARTransformer3DModel",
        config={**WAN, "chunk_partition": (1, 2)},
        arguments=_any_flow_far,
        blocks={"blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "cosmos3": Tiny(  # no batch; the text does not see the video
        kind="Cosmos3OmniTransformer",
        config={
            "head_dim": 12,
            "hidden_size": 24,
            "intermediate_size": 40,
            "latent_channel": CHANNELS,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "patch_latent_dim": 4 * CHANNELS,
            "rope_axes_dim": [2, 2, 2],
            "vocab_size": 30,
        },
        arguments=_cosmos3,
        blocks={"layers.0-2": "joint_attn mlp mlp.moe_gen"},
        segments=(3,),
    ),
    "helios": Tiny(
        kind="HeliosTransformer3DModel",
        config={**WAN, "rope_dim": (4, 4, 4)},
        arguments=_helios,
        blocks={"blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "kandinsky6": Tiny(  # video and sound
        kind="Kandinsky6Transformer3DModel",
        config=KANDINSKY6,
        arguments=_kandinsky6_with_sound,
        blocks={
            "visual_transformer_blocks.0-2": "attn.self cross_attn.cross attn.self_attention "
            "cross_attn.cross_attention cross_attn.va_cross cross_attn.av_cross mlp mlp.feed_forward"
        },
        segments=(3,),
    ),
    "kandinsky6-silent": Tiny(
        kind="Kandinsky6Transformer3DModel",
        config=KANDINSKY6,
        arguments=_kandinsky6,
        blocks={"visual_transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "minimax-h3": Tiny(
        kind="MiniMaxH3Transformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 3,
            "num_refiner_layers": 2,
            "ffn_dim": 40,
            "in_channels": CHANNELS,
            "audio_in_channels": SOUND,
            "text_dim": CAPTION,
            "freq_dim": 8,
            "time_embed_hidden_dim": 12,
            "time_embed_dim": 14,
            "rope_freq_dim": 2,
        },
        arguments=_minimax_h3,
        blocks={"transformer_blocks.0-2": "attn mlp"},
        segments=(3,),
    ),
    "sana-wm": Tiny(  # every third block attends with a softmax, the others linearly
        kind="SanaWMTransformer3DModel",
        config={
            "in_channels": CHANNELS,
            "num_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "patch_size": (1, 2, 2),
            "softmax_every_n": 3,
            "linear_head_dim": 16,
            "caption_channels": CAPTION,
            "mlp_ratio": 2.0,
            "chunk_plucker_channels": SOUND,
            "chunk_plucker_post_attn_blocks": 3,
        },
        arguments=_sana_wm,
        blocks={"blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "sana-wm-refiner": Tiny(
        kind="SanaWMLTX2RefinerTransformer3DModel",
        config={
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "audio_in_channels": SOUND,
            "audio_out_channels": SOUND,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 3,
            "caption_channels": CAPTION,
        },
        arguments=_sana_wm_refiner,
        blocks={"transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "wan-animate": Tiny(  # a face is attended to behind every other block
        kind="WanAnimateTransformer3DModel",
        config={
            **WAN,
            "num_layers": 4,
            "in_channels": 2 * CHANNELS + 4,
            "latent_channels": CHANNELS,
            "image_dim": IMAGE,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 10,
            "face_encoder_hidden_dim": 12,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        arguments=_wan_animate,
        blocks={"blocks.0-3": "attn cross_attn mlp"},
        segments=(1, 2, 1),
    ),
    "wan-animate2": _Uncompiled(
        kind="WanAnimate2Transformer3DModel",
        config={
            "text_len": TEXT_TOKENS + 2,
            "in_dim": 2 * CHANNELS + 4,
            "dim": 24,
            "ffn_dim": 40,
            "freq_dim": 16,
            "text_dim": CAPTION,
            "out_dim": CHANNELS,
            "num_heads": 2,
            "num_layers": 3,
        },
        arguments=_wan_animate2,
        blocks={"blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "wan-vace": Tiny(  # what the first list makes of a control is added behind blocks 0 and 2
        kind="WanVACETransformer3DModel",
        config={**WAN, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 9},
        arguments=_wan_vace,
        blocks={"vace_blocks.0-1": "attn cross_attn mlp", "blocks.0-3": "attn cross_attn mlp"},
        segments=(1, 1, 1, 2, 1),
    ),
}
