"""Image transformers of blocks of two streams and, behind them, blocks of one, small."""

from typing import Any

import torch
from torch import nn

from tests.transformers.pictures import (
    AXES,
    CAPTION,
    CHANNELS,
    HEAD,
    HEADS,
    PATCHES,
    PICTURES,
    POOLED,
    TEXT,
    WIDTHS,
    mask_of,
    packed,
    picture,
    places,
)
from tests.transformers.tiny_transformer import BATCH, Given, Tiny

REFERENCES = 5  # tokens of pictures to start from
DOUBLE = "joint_attn mlp mlp.context"
FLUX_LIKE_BLOCKS = {"transformer_blocks.0-2": DOUBLE, "single_transformer_blocks.0-3": "fused"}


class Keeping(Tiny):
    """A Flux 2 as the pipeline prepares it to keep the keys and values of references."""

    def build(self) -> nn.Module:
        model: Any = super().build()
        from diffusers.models.transformers.transformer_flux2 import (
            Flux2KVAttnProcessor,
            Flux2KVParallelSelfAttnProcessor,
        )

        for block in model.transformer_blocks:
            block.attn.set_processor(Flux2KVAttnProcessor())
        for block in model.single_transformer_blocks:
            block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
        built: nn.Module = model
        return built


def placed(given: Given, axes: int = 3) -> dict[str, Any]:
    """Return the arguments that most of them take."""
    return {**packed(given), "img_ids": places(axes).float(), "txt_ids": torch.zeros(TEXT, axes)}


def flux(given: Given) -> dict[str, Any]:
    return {**placed(given), "pooled_projections": given.noise(BATCH, POOLED)}


def flux_guided(given: Given) -> dict[str, Any]:
    return {**flux(given), "guidance": torch.full((BATCH,), 3.5)}


def flux2(given: Given) -> dict[str, Any]:
    return {**placed(given, axes=4), "guidance": torch.full((BATCH,), 3.5)}


def flux2_writing(given: Given) -> dict[str, Any]:
    """The first step of an edit: the references stand before the latents, and their keys and values are kept."""
    arguments = flux2(given)
    references = given.noise(BATCH, REFERENCES, 4 * CHANNELS)
    return {
        **arguments,
        "hidden_states": torch.cat([references, arguments["hidden_states"]], dim=1),
        "img_ids": torch.cat([places(4, 1, REFERENCES), arguments["img_ids"]]),
        "kv_cache_mode": "extract",
        "num_ref_tokens": REFERENCES,
    }


def flux2_reading(given: Given) -> dict[str, Any]:
    """A later step of an edit: only the latents are given, and the references' keys and values."""
    from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

    cache = Flux2KVCache(3, 4)
    cache.num_ref_tokens = REFERENCES
    for layer in (*cache.double_block_caches, *cache.single_block_caches):
        layer.store(given.noise(BATCH, REFERENCES, HEADS, HEAD), given.noise(BATCH, REFERENCES, HEADS, HEAD))
    return {**flux2(given), "kv_cache": cache, "kv_cache_mode": "cached"}


def flux3_edit(given: Given) -> dict[str, Any]:
    """A step of a distilled edit: a picture to start from, and the time that the step ends at."""
    return {
        **placed(given, axes=4),
        "image_cond_hidden_states": given.noise(BATCH, REFERENCES, 4 * CHANNELS + 2),
        "image_cond_ids": places(4, 1, REFERENCES),
        "target_timestep": torch.full((BATCH,), 0.25),
    }


def bria(given: Given) -> dict[str, Any]:
    return {**placed(given), "timestep": torch.full((BATCH,), 500.0)}


def bria_fibo(given: Given) -> dict[str, Any]:
    return {**bria(given), "text_encoder_layers": [given.noise(BATCH, TEXT, POOLED) for _ in range(7)]}


def chroma(given: Given) -> dict[str, Any]:
    mask = torch.cat([mask_of(dtype=torch.float32), torch.ones(BATCH, PATCHES)], dim=1)
    return {**placed(given), "attention_mask": mask}


def hunyuan_image(given: Given) -> dict[str, Any]:
    return {
        **picture(given),
        "encoder_attention_mask": mask_of(),
        "encoder_hidden_states_2": given.noise(BATCH, 5, POOLED),
        "encoder_attention_mask_2": mask_of(5).flip(0),
        "guidance": torch.full((BATCH,), 3500.0),
    }


SIZES = {
    "in_channels": 4 * CHANNELS,
    "num_layers": 3,
    "num_single_layers": 4,
    "joint_attention_dim": CAPTION,
    "axes_dims_rope": AXES,
    **WIDTHS,
}
FLUX2 = {**SIZES, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16}
FLUX3 = {**SIZES, "axes_dims_rope": (4, 4, 4, 4), "timestep_channels": 16, "cond_in_channels": 4 * CHANNELS + 2}
FLUX3_BLOCKS = {"mode_blocks.image.0-2": "attn mlp", "single_transformer_blocks.0-3": "attn mlp"}

FLUX_LIKE: dict[str, Tiny] = {
    "flux": Tiny(
        "FluxTransformer2DModel", {**SIZES, "pooled_projection_dim": POOLED}, flux, FLUX_LIKE_BLOCKS, segments=(3, 4)
    ),
    "flux-guided": Tiny(
        "FluxTransformer2DModel",
        {**SIZES, "pooled_projection_dim": POOLED, "guidance_embeds": True},
        flux_guided,
        FLUX_LIKE_BLOCKS,
        segments=(3, 4),
    ),
    "flux2": Tiny("Flux2Transformer2DModel", FLUX2, flux2, FLUX_LIKE_BLOCKS, segments=(3, 4)),
    "flux2-writing": Keeping("Flux2Transformer2DModel", FLUX2, flux2_writing, FLUX_LIKE_BLOCKS, segments=(3, 4)),
    "flux2-reading": Keeping("Flux2Transformer2DModel", FLUX2, flux2_reading, FLUX_LIKE_BLOCKS, segments=(3, 4)),
    # The blocks of the text, and of the picture to start from, are given neither the latents nor the time.
    "flux3": Tiny("Flux3Transformer2DModel", FLUX3, lambda given: placed(given, axes=4), FLUX3_BLOCKS, segments=(3, 4)),
    "flux3-edit": Tiny(
        "Flux3Transformer2DModel", {**FLUX3, "flow_map": True}, flux3_edit, FLUX3_BLOCKS, segments=(3, 4)
    ),
    "bria": Tiny("BriaTransformer2DModel", SIZES, bria, FLUX_LIKE_BLOCKS, segments=(3, 4)),
    # Half of the text's channels are replaced before each block.
    "bria-fibo": Tiny(
        "BriaFiboTransformer2DModel",
        {**SIZES, "text_encoder_dim": POOLED},
        bria_fibo,
        FLUX_LIKE_BLOCKS,
        segments=(1, 1, 1, 1, 1, 1, 1),
    ),
    "chroma": Tiny(
        "ChromaTransformer2DModel",
        {**SIZES, "approximator_num_channels": 8, "approximator_hidden_dim": 24, "approximator_layers": 1},
        chroma,
        FLUX_LIKE_BLOCKS,
        segments=(3, 4),
    ),
    # The blocks that refine the text are given the time, but not the latents.
    "hunyuan-image": Tiny(
        "HunyuanImageTransformer2DModel",
        {
            **WIDTHS,
            **PICTURES,
            "num_layers": 3,
            "num_single_layers": 4,
            "num_refiner_layers": 2,
            "guidance_embeds": True,
            "text_embed_dim": CAPTION,
            "text_embed_2_dim": POOLED,
            "rope_axes_dim": (8, 8),
        },
        hunyuan_image,
        FLUX_LIKE_BLOCKS,
        segments=(3, 4),
    ),
    "longcat-image": Tiny(
        "LongCatImageTransformer2DModel",
        {**SIZES, "pooled_projection_dim": POOLED},
        placed,
        FLUX_LIKE_BLOCKS,
        segments=(3, 4),
    ),
    "ovis-image": Tiny(
        "OvisImageTransformer2DModel",
        {**SIZES, "out_channels": 4 * CHANNELS},
        placed,
        FLUX_LIKE_BLOCKS,
        segments=(3, 4),
    ),
}
