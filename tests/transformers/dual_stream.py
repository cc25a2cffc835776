"""Image transformers whose blocks pass the latents and the text on side by side, small."""

from typing import Any

import torch

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
    TEXT,
    WIDTH,
    WIDTHS,
    mask_of,
    packed,
    picture,
)
from tests.transformers.tiny_transformer import BATCH, Given, Tiny

TIME = 44  # channels of the time's embedding, where it is not as wide as the tokens


def stable_diffusion_3(given: Given) -> dict[str, Any]:
    return {**picture(given), "pooled_projections": given.noise(BATCH, POOLED)}


def cogview(given: Given) -> dict[str, Any]:
    size = torch.tensor([[8.0 * HEIGHT, 8.0 * WIDTH]] * BATCH)
    return {**picture(given), "original_size": size, "target_size": size, "crop_coords": torch.zeros(BATCH, 2)}


def glm_image(given: Given) -> dict[str, Any]:
    return {
        **picture(given),
        "prior_token_id": given.tokens(BATCH, PATCHES, below=10),
        "prior_token_drop": torch.tensor([[False], [True]]).expand(BATCH, PATCHES),
        "target_size": torch.tensor([[8.0 * HEIGHT, 8.0 * WIDTH]] * BATCH),
        "crop_coords": torch.zeros(BATCH, 2),
    }


def glm_image_reading(given: Given) -> dict[str, Any]:
    """An edit: the blocks also attend to the keys and values of a picture to start from."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    cache = GlmImageKVCache(3)
    for layer in cache.caches:
        for _ in range(BATCH):
            layer.store(given.noise(1, 5, HEADS, HEAD), given.noise(1, 5, HEADS, HEAD))
            layer.next_sample()
    cache.set_mode("read")
    return {**glm_image(given), "kv_caches": cache}


def hidream(given: Given) -> dict[str, Any]:
    """A picture that is not square is padded to the largest, and the padding masked."""
    return {
        "hidden_states": given.noise(BATCH, CHANNELS, HEIGHT, WIDTH),
        "timesteps": torch.full((BATCH,), 500.0),
        "encoder_hidden_states_t5": given.noise(BATCH, TEXT, CAPTION),
        "encoder_hidden_states_llama3": given.noise(5, BATCH, TEXT - 2, CAPTION + 4),
        "pooled_embeds": given.noise(BATCH, POOLED),
    }


def qwen_image(given: Given, *references: tuple[int, int, int]) -> dict[str, Any]:
    sizes = [(1, ROWS, COLUMNS), *references]
    arguments = packed(given)
    more = [given.noise(BATCH, rows * columns, 4 * CHANNELS) for _, rows, columns in references]
    return {
        **arguments,
        "hidden_states": torch.cat([arguments["hidden_states"], *more], dim=1),
        "encoder_hidden_states_mask": mask_of(),
        "img_shapes": [sizes] * BATCH,
    }


def qwen_image_edit(given: Given) -> dict[str, Any]:
    """The patches of a smaller picture to start from follow those of the latents."""
    return qwen_image(given, (1, 2, 3))


def joy_image(given: Given) -> dict[str, Any]:
    """Two pictures, the second of which is the one that is made."""
    return {**picture(given), "hidden_states": given.noise(BATCH, 2, CHANNELS, 1, HEIGHT, WIDTH)}


def joy_image_plus(given: Given) -> dict[str, Any]:
    """Patches of pictures of different sizes, padded to the longer row."""
    return {
        **picture(given),
        "hidden_states": given.noise(BATCH, 30, CHANNELS, 1, 2, 2),
        "encoder_hidden_states_mask": mask_of(dtype=torch.float32),
        "shape_list": [[(1, ROWS, COLUMNS), (1, 2, 3)], [(1, ROWS, COLUMNS)]],
    }


COGVIEW = {
    **WIDTHS,
    **PICTURES,
    "num_layers": 3,
    "text_embed_dim": CAPTION,
    "time_embed_dim": TIME,
    "condition_dim": 8,
}
JOY_IMAGE = {
    "in_channels": CHANNELS,
    "hidden_size": INNER,
    "num_attention_heads": HEADS,
    "text_dim": CAPTION,
    "num_layers": 3,
    "rope_dim_list": AXES,
}
QWEN_IMAGE = {
    **WIDTHS,
    "in_channels": 4 * CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 3,
    "joint_attention_dim": CAPTION,
    "axes_dims_rope": AXES,
}
SD3 = {
    **WIDTHS,
    "sample_size": 16,
    **PICTURES,
    "num_layers": 4,
    "joint_attention_dim": CAPTION,
    "caption_projection_dim": INNER,
    "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 8,
}

DUAL_STREAM: dict[str, Tiny] = {
    "auraflow": Tiny(
        "AuraFlowTransformer2DModel",
        {
            **WIDTHS,
            "sample_size": 16,
            **PICTURES,
            "num_mmdit_layers": 3,
            "num_single_dit_layers": 4,
            "joint_attention_dim": CAPTION,
            "caption_projection_dim": INNER,
            "pos_embed_max_size": 64,
        },
        lambda given: picture(given, timestep=0.5),
        {"joint_transformer_blocks.0-2": "joint_attn mlp mlp.context", "single_transformer_blocks.0-3": "attn mlp"},
        segments=(3, 4),
    ),
    "cogview3-plus": Tiny(
        "CogView3PlusTransformer2DModel",
        {**COGVIEW, "pos_embed_max_size": 8},
        cogview,
        {"transformer_blocks.0-2": "joint_attn mlp"},
        segments=(3,),
    ),
    # Its blocks call one MLP twice, for the latents and for the text.
    "cogview4": Tiny(
        "CogView4Transformer2DModel",
        {**COGVIEW, "rope_axes_dim": (8, 8)},
        cogview,
        {"transformer_blocks.0-2": "joint_attn mlp mlp.context"},
        segments=(3,),
    ),
    "glm-image": Tiny(
        "GlmImageTransformer2DModel",
        {**COGVIEW, "prior_vq_quantizer_codebook_size": 10},
        glm_image,
        {"transformer_blocks.0-2": "joint_attn mlp mlp.context"},
        segments=(3,),
    ),
    "glm-image-reading": Tiny(
        "GlmImageTransformer2DModel",
        {**COGVIEW, "prior_vq_quantizer_codebook_size": 10},
        glm_image_reading,
        {"transformer_blocks.0-2": "joint_attn mlp mlp.context"},
        segments=(3,),
    ),
    # Text of its own is put behind the others before each block, and cut off after it.
    "hidream": Tiny(
        "HiDreamImageTransformer2DModel",
        {
            **WIDTHS,
            "patch_size": 2,
            "in_channels": CHANNELS,
            "num_layers": 3,
            "num_single_layers": 3,
            "caption_channels": (CAPTION, CAPTION + 4),
            "text_emb_dim": POOLED,
            "axes_dims_rope": AXES,
            "max_resolution": (12, 12),
            "llama_layers": (0, 1, 2, 2, 3, 4),
        },
        hidream,
        {"double_stream_blocks.0-2": "joint_attn mlp.i mlp.t", "single_stream_blocks.0-2": "attn mlp"},
        segments=(1, 1, 1, 1, 1, 1),
    ),
    "joy-image-edit": Tiny(
        "JoyImageEditTransformer3DModel",
        JOY_IMAGE,
        joy_image,
        {"double_blocks.0-2": "joint_attn mlp.img mlp.txt"},
        segments=(3,),
    ),
    "joy-image-edit-plus": Tiny(
        "JoyImageEditPlusTransformer3DModel",
        JOY_IMAGE,
        joy_image_plus,
        {"double_blocks.0-2": "joint_attn mlp.img mlp.txt"},
        segments=(3,),
    ),
    "qwen-image": Tiny(
        "QwenImageTransformer2DModel",
        QWEN_IMAGE,
        qwen_image,
        {"transformer_blocks.0-2": "joint_attn mlp.img mlp.txt"},
        segments=(3,),
    ),
    "qwen-image-edit": Tiny(
        "QwenImageTransformer2DModel",
        {**QWEN_IMAGE, "zero_cond_t": True},
        qwen_image_edit,
        {"transformer_blocks.0-2": "joint_attn mlp.img mlp.txt"},
        segments=(3,),
    ),
    # The last block makes no text.
    "sd3": Tiny(
        "SD3Transformer2DModel",
        SD3,
        stable_diffusion_3,
        {"transformer_blocks.0-2": "joint_attn mlp mlp.context", "transformer_blocks.3": "joint_attn mlp"},
        segments=(4,),
    ),
    "sd3.5": Tiny(
        "SD3Transformer2DModel",
        {**SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        stable_diffusion_3,
        {
            "transformer_blocks.0-1": "joint_attn attn mlp mlp.context",
            "transformer_blocks.2": "joint_attn mlp mlp.context",
            "transformer_blocks.3": "joint_attn mlp",
        },
        segments=(4,),
    ),
}
