"""Tiny transformers of videos whose blocks take the text beside the latents and change both."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
    WIDTH,
    at_time,
    image,
    latents,
    masked,
    text,
    text_mask,
)

COGVIDEOX: Mapping[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 16,
    "text_embed_dim": CAPTION,
    "num_layers": 3,
    "sample_width": WIDTH,
    "sample_height": HEIGHT,
    "sample_frames": 4 * FRAMES - 3,
    "max_text_seq_length": TEXT_TOKENS,
}

HUNYUAN: Mapping[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "num_single_layers": 3,
    "num_refiner_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": CAPTION,
    "pooled_projection_dim": POOLED,
    "rope_axes_dim": (4, 4, 4),
}
HUNYUAN_15: Mapping[str, Any] = {
    "in_channels": 2 * CHANNELS + 1,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "num_refiner_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": CAPTION,
    "text_embed_2_dim": POOLED,
    "image_embed_dim": IMAGE,
    "rope_axes_dim": (4, 4, 4),
}
HUNYUAN_BLOCKS = {
    "transformer_blocks.0-2": "joint_attn mlp mlp.context",
    "single_transformer_blocks.0-2": "fused",
}

MOTIF: Mapping[str, Any] = {
    "in_channels": 2 * CHANNELS + 1,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "mlp_ratio": 2.0,
    "text_embed_dim": CAPTION,
    "image_embed_dim": IMAGE,
    "rope_axes_dim": (4, 4, 4),
}

EASY_ANIMATE: Mapping[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "patch_size": 2,
    "sample_width": WIDTH,
    "sample_height": HEIGHT,
    "num_layers": 3,
    "mmdit_layers": 3,
    "time_embed_dim": 12,
    "text_embed_dim": CAPTION,
}


def _frames_first(given: Given, **more: Any) -> dict[str, Any]:
    return {**at_time(given), "hidden_states": latents(given).transpose(1, 2), **more}


def _cogvideox_15(given: Given) -> dict[str, Any]:
    """Return two frames a patch, latents and those of the first picture behind one another, and turns of places."""
    turns = given.noise(PATCHES // FRAMES * 2, 16)
    video = given.noise(BATCH, 4, 2 * CHANNELS, HEIGHT, WIDTH)
    return _frames_first(given, hidden_states=video, image_rotary_emb=(turns.cos(), turns.sin()), ofs=torch.ones(1) * 2)


def _consis_id(given: Given) -> dict[str, Any]:
    """Return the pipeline's: a face's embedding, and what each layer of a vision transformer made of the face."""
    layers = [given.noise(BATCH, IMAGE_TOKENS, IMAGE) for _ in range(2)]
    return _frames_first(given, id_cond=given.noise(BATCH, POOLED), id_vit_hidden=layers)


def _hunyuan(given: Given) -> dict[str, Any]:
    return {**masked(given), "pooled_projections": given.noise(BATCH, POOLED), "guidance": torch.full((BATCH,), 6000.0)}


def _hunyuan_of_image(given: Given) -> dict[str, Any]:
    """Return latents, those of the first picture and where they are, behind one another."""
    video = latents(given, 2 * CHANNELS + 1)
    return {**masked(given), "hidden_states": video, "pooled_projections": given.noise(BATCH, POOLED)}


def _framepack(given: Given) -> dict[str, Any]:
    """Return the next frames, and the earlier ones: the older they are, the more of them are in a patch."""

    def frames(start: int, count: int) -> tuple[Tensor, Tensor]:
        return latents(given, frames=count), torch.arange(start, start + count)

    (clean, clean_at), (twice, twice_at), (four, four_at) = frames(6, 2), frames(4, 2), frames(0, 4)
    return {
        **_hunyuan(given),
        "image_embeds": image(given),
        "indices_latents": torch.arange(8, 8 + FRAMES),
        "latents_clean": clean,
        "indices_latents_clean": clean_at,
        "latents_history_2x": twice,
        "indices_latents_history_2x": twice_at,
        "latents_history_4x": four,
        "indices_latents_history_4x": four_at,
    }


def _hunyuan_15(given: Given, picture: bool) -> dict[str, Any]:
    """Return texts of two encoders; a video that begins with no picture is given one of zeros."""
    second = torch.ones(BATCH, 4, dtype=torch.long)
    second[0, -1] = 0
    return {
        **masked(given),
        "hidden_states": given.noise(BATCH, 2 * CHANNELS + 1, FRAMES, HEIGHT // 2, WIDTH // 2),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states_2": given.noise(BATCH, 4, POOLED),
        "encoder_attention_mask_2": second,
        "image_embeds": image(given) if picture else torch.zeros(BATCH, IMAGE_TOKENS, IMAGE),
    }


def _mochi(given: Given) -> dict[str, Any]:
    return {**masked(given), "encoder_hidden_states": given.noise(BATCH, TEXT_TOKENS, 32)}


def _motif(given: Given) -> dict[str, Any]:
    return {**masked(given), "hidden_states": latents(given, 2 * CHANNELS + 1), "image_embeds": image(given)}


def _ltx2(given: Given) -> dict[str, Any]:
    return {
        **masked(given),
        "hidden_states": given.noise(BATCH, PATCHES, CHANNELS),
        "audio_hidden_states": given.noise(BATCH, 11, 6),
        "audio_encoder_hidden_states": text(given),
        "audio_encoder_attention_mask": text_mask(),
        "num_frames": FRAMES,
        "height": HEIGHT // 2,
        "width": WIDTH // 2,
        "audio_num_frames": 11,
    }


JOINT_VIDEO: dict[str, Tiny] = {
    "cogvideox": Tiny(
        kind="CogVideoXTransformer3DModel",
        config=COGVIDEOX,
        arguments=_frames_first,
        blocks={"transformer_blocks.0-2": "joint_attn mlp"},
        segments=(3,),
    ),
    "cogvideox-1.5": Tiny(
        kind="CogVideoXTransformer3DModel",
        config={
            **COGVIDEOX,
            "in_channels": 2 * CHANNELS,
            "patch_size_t": 2,
            "ofs_embed_dim": 16,
            "use_rotary_positional_embeddings": True,
            "patch_bias": False,
        },
        arguments=_cogvideox_15,
        blocks={"transformer_blocks.0-2": "joint_attn mlp"},
        segments=(3,),
    ),
    "consis-id": Tiny(  # a face is attended to behind every other block
        kind="ConsisIDTransformer3DModel",
        config={
            **COGVIDEOX,
            "num_layers": 4,
            "is_train_face": True,
            "cross_attn_interval": 2,
            "cross_attn_dim_head": 6,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": POOLED,
            "LFE_vit_dim": IMAGE,
            "LFE_depth": 2,
            "LFE_dim_head": 6,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 3,
            "LFE_output_dim": 21,
            "LFE_ff_mult": 2,
            "LFE_num_scale": 2,
        },
        arguments=_consis_id,
        blocks={"transformer_blocks.0-3": "joint_attn mlp"},
        segments=(1, 2, 1),
    ),
    "easy-animate": Tiny(
        kind="EasyAnimateTransformer3DModel",
        config=EASY_ANIMATE,
        arguments=at_time,
        blocks={"transformer_blocks.0-2": "joint_attn mlp mlp.txt"},
        segments=(3,),
    ),
    "easy-animate-shared": Tiny(  # the last block's feed-forward is called for the video and then for the text
        kind="EasyAnimateTransformer3DModel",
        config={**EASY_ANIMATE, "num_layers": 4},
        arguments=at_time,
        blocks={
            "transformer_blocks.0-2": "joint_attn mlp mlp.txt",
            "transformer_blocks.3": "joint_attn mlp mlp.context",
        },
        segments=(4,),
    ),
    "hunyuan-video": Tiny(
        kind="HunyuanVideoTransformer3DModel",
        config=HUNYUAN,
        arguments=_hunyuan,
        blocks=HUNYUAN_BLOCKS,
        segments=(3, 3),
    ),
    "hunyuan-video-of-image": Tiny(
        kind="HunyuanVideoTransformer3DModel",
        config={
            **HUNYUAN,
            "in_channels": 2 * CHANNELS + 1,
            "guidance_embeds": False,
            "image_condition_type": "latent_concat",
        },
        arguments=_hunyuan_of_image,
        blocks=HUNYUAN_BLOCKS,
        segments=(3, 3),
    ),
    "hunyuan-video-token-replace": Tiny(  # the first frame is given, and modulated as if it had no noise
        kind="HunyuanVideoTransformer3DModel",
        config={**HUNYUAN, "image_condition_type": "token_replace"},
        arguments=_hunyuan,
        blocks=HUNYUAN_BLOCKS,
        segments=(3, 3),
    ),
    "hunyuan-video-framepack": Tiny(
        kind="HunyuanVideoFramepackTransformer3DModel",
        config={**HUNYUAN, "has_image_proj": True, "image_proj_dim": IMAGE, "has_clean_x_embedder": True},
        arguments=_framepack,
        blocks=HUNYUAN_BLOCKS,
        segments=(3, 3),
    ),
    "hunyuan-video-1.5": Tiny(
        kind="HunyuanVideo15Transformer3DModel",
        config=HUNYUAN_15,
        arguments=lambda given: _hunyuan_15(given, picture=False),
        blocks={"transformer_blocks.0-2": "joint_attn mlp mlp.context"},
        segments=(3,),
    ),
    "hunyuan-video-1.5-of-image": Tiny(
        kind="HunyuanVideo15Transformer3DModel",
        config=HUNYUAN_15,
        arguments=lambda given: _hunyuan_15(given, picture=True),
        blocks={"transformer_blocks.0-2": "joint_attn mlp mlp.context"},
        segments=(3,),
    ),
    "ltx2": Tiny(  # video and sound
        kind="LTX2VideoTransformer3DModel",
        config={
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "audio_in_channels": 6,
            "audio_out_channels": 6,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 3,
            "caption_channels": CAPTION,
        },
        arguments=_ltx2,
        blocks={
            "transformer_blocks.0-2": "attn attn.audio cross_attn cross_attn.audio cross_attn.audio_to_video "
            "cross_attn.video_to_audio mlp mlp.audio"
        },
        segments=(3,),
    ),
    "mochi": Tiny(  # the last block leaves the text as it is
        kind="MochiTransformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 3,
            "pooled_projection_dim": CAPTION,
            "in_channels": CHANNELS,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
        },
        arguments=_mochi,
        blocks={"transformer_blocks.0-1": "joint_attn mlp mlp.context", "transformer_blocks.2": "joint_attn mlp"},
        segments=(3,),
    ),
    "motif-video": Tiny(
        kind="MotifVideoTransformer3DModel",
        config={**MOTIF, "num_single_layers": 3},
        arguments=_motif,
        blocks=HUNYUAN_BLOCKS,
        segments=(3, 3),
    ),
    "motif-video-decoded": Tiny(  # the last two begin anew with the latents, and what was made of them is their text
        kind="MotifVideoTransformer3DModel",
        config={
            **MOTIF,
            "num_single_layers": 4,
            "num_decoder_layers": 2,
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        arguments=_motif,
        blocks={
            "transformer_blocks.0-2": "joint_attn cross_attn mlp mlp.context",
            "single_transformer_blocks.0-3": "fused",
        },
        segments=(3, 2, 2),
    ),
}
