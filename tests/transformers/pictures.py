"""The sizes of the tiny image transformers, all different, and what most of them are called with."""

from typing import Any

import torch
from torch import Tensor

from tests.transformers.tiny_transformer import BATCH, Given

CHANNELS = 5
HEIGHT, WIDTH = 8, 12  # of the latents, in pixels
SQUARE = 10  # the same, where both must be alike
ROWS, COLUMNS = 4, 6  # of patches of two by two pixels
PATCHES = ROWS * COLUMNS
TEXT = 7  # tokens
CAPTION = 18  # channels of the text
POOLED = 28  # channels of the whole text's embedding
HEADS, HEAD = 2, 16
WIDTHS = {"num_attention_heads": HEADS, "attention_head_dim": HEAD}
INNER = HEADS * HEAD
PICTURES = {"in_channels": CHANNELS, "out_channels": CHANNELS}
PACKED = {"in_channels": 4 * CHANNELS, "out_channels": 4 * CHANNELS}
AXES = (4, 6, 6)  # of a head's channels, for the place in the row of frames, rows and columns


def picture(given: Given, timestep: float = 500.0) -> dict[str, Any]:
    """Return latents as a picture, text and time."""
    return {
        "hidden_states": given.noise(BATCH, CHANNELS, HEIGHT, WIDTH),
        "encoder_hidden_states": given.noise(BATCH, TEXT, CAPTION),
        "timestep": torch.full((BATCH,), timestep),
    }


def packed(given: Given) -> dict[str, Any]:
    """Return latents as a row of patches, text and time."""
    return {
        "hidden_states": given.noise(BATCH, PATCHES, 4 * CHANNELS),
        "encoder_hidden_states": given.noise(BATCH, TEXT, CAPTION),
        "timestep": torch.full((BATCH,), 0.5),
    }


def places(axes: int = 3, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Return the place of each patch, row and column last, shape (patches, axes)."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.nn.functional.pad(grid, (axes - 2, 0))


def mask_of(tokens: int = TEXT, dtype: torch.dtype = torch.long) -> Tensor:
    """Return a mask of texts, the second of which is two tokens shorter, shape (batch, tokens)."""
    mask = torch.ones(BATCH, tokens, dtype=dtype)
    mask[1, tokens - 2 :] = 0
    return mask
