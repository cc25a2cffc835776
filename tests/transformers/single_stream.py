"""Image transformers whose blocks pass on the latents only, small."""

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

from tests.transformers.pictures import (
    AXES,
    CAPTION,
    CHANNELS,
    COLUMNS,
    HEAD,
    HEADS,
    HEIGHT,
    INNER,
    PATCHES,
    PICTURES,
    POOLED,
    ROWS,
    SQUARE,
    TEXT,
    WIDTH,
    WIDTHS,
    mask_of,
    packed,
    picture,
)
from tests.transformers.tiny_transformer import BATCH, Given, Tiny


def labelled(given: Given) -> dict[str, Any]:
    return {
        "hidden_states": given.noise(BATCH, CHANNELS, SQUARE, SQUARE),
        "timestep": torch.full((BATCH,), 500),
        "class_labels": given.tokens(BATCH, below=1000),
    }


def pixart(given: Given) -> dict[str, Any]:
    sizes = {"resolution": None, "aspect_ratio": None}
    return {**picture(given), "encoder_attention_mask": mask_of(), "added_cond_kwargs": sizes}


def pixart_sized(given: Given) -> dict[str, Any]:
    sizes = torch.tensor([[8.0 * HEIGHT, 8.0 * WIDTH]] * BATCH)
    return {**pixart(given), "added_cond_kwargs": {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}}


def continuous(given: Given) -> dict[str, Any]:
    """The whole batch has one time, a number without a batch."""
    return {**picture(given), "timestep": torch.tensor(500)}


def hunyuan_dit(given: Given) -> dict[str, Any]:
    angles = given.noise(PATCHES, HEAD)
    return {
        **picture(given),
        "text_embedding_mask": mask_of(),
        "encoder_hidden_states_t5": given.noise(BATCH, TEXT + 2, 40),
        "text_embedding_mask_t5": mask_of(TEXT + 2),
        "image_meta_size": torch.tensor([[64.0, 96.0, 64.0, 96.0, 0.0, 0.0]] * BATCH),
        "style": torch.zeros(BATCH, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def lumina_next(given: Given) -> dict[str, Any]:
    return {
        **picture(given, timestep=0.5),
        "encoder_mask": mask_of(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(HEAD, HEIGHT, WIDTH),
        "cross_attention_kwargs": {},
    }


def nucleus(given: Given) -> dict[str, Any]:
    return {**packed(given), "img_shapes": [(1, ROWS, COLUMNS)] * BATCH, "encoder_hidden_states_mask": mask_of()}


def sana(given: Given) -> dict[str, Any]:
    return {**picture(given), "encoder_attention_mask": mask_of()}


def prx(given: Given) -> dict[str, Any]:
    return {**picture(given, timestep=0.5), "attention_mask": mask_of(dtype=torch.bool)}


PATCHED = {**WIDTHS, **PICTURES, "num_layers": 3, "patch_size": 2, "num_embeds_ada_norm": 1000}
PLAIN = {**PATCHED, "norm_elementwise_affine": False, "attention_bias": True, "activation_fn": "gelu-approximate"}
LUMINA = {
    "sample_size": 16,
    "in_channels": CHANNELS,
    "hidden_size": INNER,
    "num_layers": 3,
    "num_attention_heads": HEADS,
    "num_kv_heads": 1,
    "multiple_of": 8,
}
SANA = {
    **WIDTHS,
    **PICTURES,
    "num_layers": 3,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": INNER,
    "caption_channels": CAPTION,
    "sample_size": 16,
}

SINGLE_STREAM: dict[str, Tiny] = {
    "dit": Tiny(
        "DiTTransformer2DModel",
        {**PATCHED, "sample_size": SQUARE},
        labelled,
        {"transformer_blocks.0-2": "attn mlp"},
        segments=(3,),
    ),
    "pixart": Tiny(
        "PixArtTransformer2DModel",
        {
            **PATCHED,
            "num_attention_heads": 3,
            "attention_head_dim": 12,
            "sample_size": 16,
            "cross_attention_dim": 36,
            "caption_channels": CAPTION,
            "use_additional_conditions": True,
        },
        pixart_sized,
        {"transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "transformer-2d-ada-norm-zero": Tiny(
        "Transformer2DModel",
        {**PLAIN, "sample_size": SQUARE, "norm_type": "ada_norm_zero"},
        labelled,
        {"transformer_blocks.0-2": "attn mlp"},
        segments=(3,),
    ),
    "transformer-2d-ada-norm-single": Tiny(
        "Transformer2DModel",
        {
            **PLAIN,
            "sample_size": 16,
            "norm_type": "ada_norm_single",
            "cross_attention_dim": INNER,
            "caption_channels": CAPTION,
        },
        pixart,
        {"transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "transformer-2d-ada-norm": Tiny(
        "Transformer2DModel",
        {
            **WIDTHS,
            **PICTURES,
            "num_layers": 3,
            "norm_num_groups": CHANNELS,
            "norm_type": "ada_norm",
            "num_embeds_ada_norm": 1000,
            "cross_attention_dim": CAPTION,
        },
        continuous,
        {"transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    # What blocks 0 and 1 make also enters blocks 5 and 4.
    "hunyuan-dit": Tiny(
        "HunyuanDiT2DModel",
        {
            **WIDTHS,
            "in_channels": CHANNELS,
            "patch_size": 2,
            "sample_size": 16,
            "hidden_size": INNER,
            "num_layers": 6,
            "mlp_ratio": 2.0,
            "cross_attention_dim": CAPTION,
            "cross_attention_dim_t5": 40,
            "pooled_projection_dim": POOLED,
            "text_len": TEXT,
            "text_len_t5": TEXT + 2,
        },
        hunyuan_dit,
        {"blocks.0-5": "attn cross_attn mlp"},
        segments=(1, 1, 4),
    ),
    "sana": Tiny(
        "SanaTransformer2DModel", SANA, sana, {"transformer_blocks.0-2": "attn cross_attn mlp"}, segments=(3,)
    ),
    "sana-sprint": Tiny(
        "SanaTransformer2DModel",
        {**SANA, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
        lambda given: {**sana(given), "guidance": torch.full((BATCH,), 0.45)},
        {"transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    # Both attentions leave through the projection of the second.
    "lumina-next": Tiny(
        "LuminaNextDiT2DModel",
        {**LUMINA, "cross_attention_dim": CAPTION},
        lumina_next,
        {"layers.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    # Only the latents ask; they attend to themselves and to the text. All blocks but the first have experts.
    "nucleus-moe-image": Tiny(
        "NucleusMoEImageTransformer2DModel",
        {
            **WIDTHS,
            "in_channels": 4 * CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 4,
            "num_key_value_heads": 1,
            "joint_attention_dim": CAPTION,
            "axes_dims_rope": AXES,
            "mlp_ratio": 6.0,
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 28,
            "capacity_factors": 2.0,
        },
        nucleus,
        {"transformer_blocks.0-3": "attn mlp"},
        segments=(4,),
    ),
    # Only the latents ask; they attend to themselves and to the text. The MLP is written out in the block.
    "prx": Tiny(
        "PRXTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "context_in_dim": CAPTION,
            "hidden_size": INNER,
            "mlp_ratio": 2.0,
            "num_heads": HEADS,
            "depth": 3,
            "axes_dim": (8, 8),
        },
        prx,
        {"blocks.0-2": "attn mlp"},
        segments=(3,),
    ),
}
