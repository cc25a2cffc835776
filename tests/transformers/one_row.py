"""Image transformers whose blocks pass on latents and text in one row, small."""

from typing import Any

import torch
from torch import Tensor

from tests.transformers.pictures import (
    AXES,
    CAPTION,
    CHANNELS,
    COLUMNS,
    HEAD,
    HEADS,
    HEIGHT,
    INNER,
    PACKED,
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
    places,
)
from tests.transformers.single_stream import LUMINA
from tests.transformers.tiny_transformer import BATCH, Given, Tiny

LAYERS = 5  # of the text's encoder that are given


def prior(given: Given) -> dict[str, Any]:
    return {
        "hidden_states": given.noise(BATCH, CAPTION),
        "timestep": torch.full((BATCH,), 500),
        "proj_embedding": given.noise(BATCH, CAPTION),
        "encoder_hidden_states": given.noise(BATCH, TEXT, CAPTION),
        "attention_mask": mask_of(dtype=torch.bool),
    }


def bria_fibo2(given: Given) -> dict[str, Any]:
    """The text of one layer is condensed to few tokens, the other two are attended to by a block each."""
    return {
        **picture(given, timestep=0.5),
        "encoder_hidden_states": given.noise(BATCH, 3, TEXT, CAPTION),
        "encoder_attention_mask": mask_of(dtype=torch.bool),
    }


def bria_fibo2_edit(given: Given) -> dict[str, Any]:
    return {**bria_fibo2(given), "context_latents": [given.noise(BATCH, CHANNELS, HEIGHT // 2, WIDTH // 2)]}


def ernie(given: Given) -> dict[str, Any]:
    arguments = picture(given)
    return {
        "text_bth": arguments.pop("encoder_hidden_states"),
        "text_lens": torch.tensor([TEXT, TEXT - 2]),
        **arguments,
    }


def ideogram(given: Given) -> dict[str, Any]:
    """Text and latents stand in one row; a shorter text begins later."""
    row = TEXT + PATCHES
    padding = torch.tensor([0, 2])[:, None] > torch.arange(row)
    latents = torch.arange(row).expand(BATCH, -1) >= TEXT
    texts = torch.arange(TEXT)[:, None].expand(-1, 3)
    return {
        "hidden_states": given.noise(BATCH, row, 4 * CHANNELS) * latents[..., None],
        "timestep": torch.full((BATCH,), 0.5),
        "encoder_hidden_states": given.noise(BATCH, row, CAPTION) * ~latents[..., None],
        "position_ids": torch.cat([texts, places() + 100]).expand(BATCH, -1, -1),
        "segment_ids": torch.where(padding, -1, 1),
        "indicator": torch.where(latents, 2, torch.where(padding, 0, 3)),
    }


def krea(given: Given) -> dict[str, Any]:
    """The text is what five layers of its encoder made."""
    return {
        **packed(given),
        "encoder_hidden_states": given.noise(BATCH, TEXT, LAYERS, CAPTION),
        "encoder_attention_mask": mask_of(dtype=torch.bool),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), places()]),
    }


def omnigen(given: Given) -> dict[str, Any]:
    """Text, a token of the time, and the latents, which alone see what stands behind them."""
    row = TEXT + 1 + PATCHES
    seen = torch.ones(row, row).tril()
    seen[TEXT + 1 :] = 1
    return {
        "hidden_states": given.noise(BATCH, CHANNELS, HEIGHT, WIDTH),
        "timestep": torch.full((BATCH,), 0.5),
        "input_ids": given.tokens(BATCH, TEXT, below=10),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": seen.expand(BATCH, -1, -1),
        "position_ids": torch.arange(row).expand(BATCH, -1),
    }


def qwen_image(given: Given) -> dict[str, Any]:
    """The picture's places in the row of text and picture are marked, one for two by two patches."""
    return {
        **packed(given),
        "encoder_hidden_states_mask": mask_of(),
        "img_shapes": [[(1, ROWS, COLUMNS)]] * BATCH,
        "img_mask": (torch.arange(TEXT + PATCHES // 4) >= TEXT).expand(BATCH, -1),
    }


def qwen_image_writing(given: Given) -> dict[str, Any]:
    """The first step keeps the keys and values of the text."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    return {**qwen_image(given), "kv_cache": QwenImage21KVCache(3), "kv_cache_mode": "extract"}


def qwen_image_reading(given: Given) -> dict[str, Any]:
    """A later step reads them; its blocks are given the latents only."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    cache = QwenImage21KVCache(3)
    for layer in cache.layer_caches:
        layer.store(given.noise(BATCH, TEXT, HEADS, HEAD), given.noise(BATCH, TEXT, HEADS, HEAD))
    return {**qwen_image(given), "kv_cache": cache, "kv_cache_mode": "cached"}


def z_image(given: Given) -> dict[str, Any]:
    """Latents and texts come as lists; the texts differ so much in length that one is padded."""
    return {
        "x": [given.noise(CHANNELS, 1, HEIGHT, WIDTH) for _ in range(BATCH)],
        "t": torch.full((BATCH,), 0.5),
        "cap_feats": [given.noise(tokens, CAPTION) for tokens in (TEXT, 40)],
    }


def z_image_edit(given: Given) -> dict[str, Any]:
    """A list of pictures for each of the batch, the last of which is made, with texts around them."""

    def row_of_pictures() -> list[Tensor]:
        return [given.noise(CHANNELS, 1, HEIGHT // 2, WIDTH // 2), given.noise(CHANNELS, 1, HEIGHT, WIDTH)]

    return {
        "x": [row_of_pictures() for _ in range(BATCH)],
        "t": torch.full((BATCH,), 0.5),
        "cap_feats": [[given.noise(tokens, CAPTION) for tokens in (TEXT, 2, 3)] for _ in range(BATCH)],
        "siglip_feats": [[given.noise(3, 3, POOLED), None] for _ in range(BATCH)],
        "image_noise_mask": [[0, 1]] * BATCH,
    }


BRIA_FIBO2 = {
    "in_channels": CHANNELS,
    "dim": INNER,
    "n_layers": 5,
    "n_refiner_layers": 3,
    "n_heads": HEADS,
    "cap_feat_dim": CAPTION,
    "injection_layer_ids": (1, 3),
    "perceiver_num_layers": 2,
    "min_num_gist_tokens": 2,
    "max_num_gist_tokens": 6,
    "gist_step": 2,
    "gist_min_text_len": 2,
    "gist_max_text_len": 8,
    "axes_dims": AXES,
    "axes_lens": (16, 8, 8),
}
BRIA_FIBO2_BLOCKS = {
    "noise_refiner.0-2": "attn mlp",
    "layers.0": "attn mlp",
    "layers.1": "attn cross_attn mlp",
    "layers.2": "attn mlp",
    "layers.3": "attn cross_attn mlp",
    "layers.4": "attn mlp",
}
QWEN_IMAGE = {**WIDTHS, **PACKED, "num_layers": 3, "context_in_dim": CAPTION, "mlp_ratio": 2, "axes_dims_rope": AXES}
Z_IMAGE = {
    "in_channels": CHANNELS,
    "dim": INNER,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": HEADS,
    "n_kv_heads": 2,
    "cap_feat_dim": CAPTION,
    "axes_dims": AXES,
    "axes_lens": (80, 8, 8),
}
Z_IMAGE_BLOCKS = {"noise_refiner.0-1": "attn mlp", "layers.0-2": "attn mlp"}

ONE_ROW: dict[str, Tiny] = {
    "prior": Tiny(
        "PriorTransformer",
        {**WIDTHS, "num_layers": 3, "embedding_dim": CAPTION, "num_embeddings": TEXT},
        prior,
        {"transformer_blocks.0-2": "attn mlp"},
        segments=(3,),
    ),
    # The layers that condense the text are given neither the latents nor the time.
    "bria-fibo2": Tiny("BriaFibo2Transformer2DModel", BRIA_FIBO2, bria_fibo2, BRIA_FIBO2_BLOCKS, segments=(3, 5)),
    "bria-fibo2-edit": Tiny(
        "BriaFibo2Transformer2DModel", BRIA_FIBO2, bria_fibo2_edit, BRIA_FIBO2_BLOCKS, segments=(3, 5)
    ),
    # Its tokens stand before the batch: (tokens, batch, channels).
    "ernie-image": Tiny(
        "ErnieImageTransformer2DModel",
        {
            **PICTURES,
            "hidden_size": INNER,
            "num_attention_heads": HEADS,
            "num_layers": 3,
            "ffn_hidden_size": 48,
            "patch_size": 2,
            "text_in_dim": CAPTION,
            "rope_axes_dim": AXES,
        },
        ernie,
        {"layers.0-2": "attn mlp"},
        segments=(3,),
    ),
    "ideogram4": Tiny(
        "Ideogram4Transformer2DModel",
        {
            **WIDTHS,
            "in_channels": 4 * CHANNELS,
            "num_layers": 3,
            "intermediate_size": 48,
            "adaln_dim": 28,
            "llm_features_dim": CAPTION,
            "mrope_section": (3, 3, 2),
        },
        ideogram,
        {"layers.0-2": "attn mlp"},
        segments=(3,),
    ),
    # Two lists of blocks merge the layers of the text.
    "krea2": Tiny(
        "Krea2Transformer2DModel",
        {
            **WIDTHS,
            "in_channels": 4 * CHANNELS,
            "num_layers": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "timestep_embed_dim": 8,
            "text_hidden_dim": CAPTION,
            "num_text_layers": LAYERS,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 28,
            "axes_dims_rope": AXES,
        },
        krea,
        {"transformer_blocks.0-2": "attn mlp"},
        segments=(3,),
    ),
    "lumina2": Tiny(
        "Lumina2Transformer2DModel",
        {
            **LUMINA,
            "num_refiner_layers": 2,
            "axes_dim_rope": AXES,
            "axes_lens": (16, 8, 8),
            "cap_feat_dim": CAPTION,
        },
        lambda given: {**picture(given, timestep=0.5), "encoder_attention_mask": mask_of(dtype=torch.bool)},
        {"noise_refiner.0-1": "attn mlp", "layers.0-2": "attn mlp"},
        segments=(2, 3),
    ),
    "omnigen": Tiny(
        "OmniGenTransformer2DModel",
        {
            "in_channels": CHANNELS,
            "hidden_size": INNER,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "num_layers": 3,
            "pad_token_id": 0,
            "vocab_size": 10,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            "pos_embed_max_size": 8,
            "time_step_dim": 8,
        },
        omnigen,
        {"layers.0-2": "attn mlp"},
        segments=(3,),
    ),
    "qwen-image-2.1": Tiny(
        "QwenImage21Transformer2DModel", QWEN_IMAGE, qwen_image, {"transformer_blocks.0-2": "attn mlp"}, segments=(3,)
    ),
    "qwen-image-2.1-writing": Tiny(
        "QwenImage21Transformer2DModel",
        QWEN_IMAGE,
        qwen_image_writing,
        {"transformer_blocks.0-2": "attn mlp"},
        segments=(3,),
    ),
    "qwen-image-2.1-reading": Tiny(
        "QwenImage21Transformer2DModel",
        QWEN_IMAGE,
        qwen_image_reading,
        {"transformer_blocks.0-2": "attn mlp"},
        segments=(3,),
    ),
    "z-image": Tiny("ZImageTransformer2DModel", Z_IMAGE, z_image, Z_IMAGE_BLOCKS, segments=(2, 3)),
    # A third list of blocks refines what another encoder says of the pictures to start from.
    "z-image-edit": Tiny(
        "ZImageTransformer2DModel",
        {**Z_IMAGE, "siglip_feat_dim": POOLED},
        z_image_edit,
        Z_IMAGE_BLOCKS,
        segments=(2, 3),
    ),
}
