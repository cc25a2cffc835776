"""Tiny transformers of sound."""

from typing import Any

import torch
from torch import Tensor

from tests.transformers.tiny_transformer import BATCH, Given, Tiny
from tests.transformers.video import CAPTION, TEXT_TOKENS, text, text_mask

LENGTH = 18  # of the latents
CHANNELS = 6
CONDITION = 10  # channels of what sounds at the same time as the latents

STABLE_AUDIO_3 = {
    "io_channels": CHANNELS,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "cond_token_dim": CAPTION,
    "global_cond_dim": 28,
    "local_add_cond_dim": CHANNELS + 1,
    "timestep_features_dim": 12,
    "ff_mult": 2.0,
    "num_memory_tokens": 4,
}


def _sound(given: Given, channels: int = CHANNELS) -> Tensor:
    """Return latents as a picture has them, channels first."""
    return given.noise(BATCH, channels, LENGTH)


def _time() -> Tensor:
    return torch.full((BATCH,), 0.5)


def _ace_step(given: Given) -> dict[str, Any]:
    return {
        "hidden_states": given.noise(BATCH, LENGTH, CHANNELS),
        "timestep": _time(),
        "timestep_r": _time() / 2,
        "encoder_hidden_states": text(given),
        "context_latents": given.noise(BATCH, LENGTH, CONDITION),
    }


def _longcat(given: Given) -> dict[str, Any]:
    whole = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    whole[1, -3:] = False
    return {
        "hidden_states": given.noise(BATCH, LENGTH, CHANNELS),
        "encoder_hidden_states": text(given),
        "encoder_attention_mask": text_mask().bool(),
        "timestep": _time(),
        "attention_mask": whole,
        "latent_cond": given.noise(BATCH, LENGTH, CHANNELS),
    }


def _minimax(given: Given) -> dict[str, Any]:
    condition = given.noise(BATCH, LENGTH, CONDITION)
    return {"hidden_states": _sound(given), "timestep": _time(), "encoder_hidden_states": condition}


def _stable_audio(given: Given) -> dict[str, Any]:
    turns = given.noise(LENGTH + 1, 8)  # of the latents and of the token of the time, and of half of each head
    return {
        "hidden_states": _sound(given),
        "timestep": _time(),
        "encoder_hidden_states": text(given),
        "global_hidden_states": given.noise(BATCH, 1, 28),
        "rotary_embedding": (turns.cos(), turns.sin()),
    }


def _stable_audio3(given: Given) -> dict[str, Any]:
    return {
        "hidden_states": _sound(given),
        "timestep": _time(),
        "encoder_hidden_states": text(given),
        "global_hidden_states": given.noise(BATCH, 28),
        "encoder_attention_mask": text_mask(),
    }


def _stable_audio3_inpainting(given: Given) -> dict[str, Any]:
    """Return the same, with a mask and the sound that is kept."""
    return {**_stable_audio3(given), "local_add_cond": _sound(given, CHANNELS + 1)}


def _t5_film(given: Given) -> dict[str, Any]:
    """Return notes and the sound before, each with a mask, the spectrogram and its time, from 0 to 1."""
    notes, before = given.noise(BATCH, TEXT_TOKENS, 24), given.noise(BATCH, 5, 24)
    return {
        "encodings_and_masks": [(notes, text_mask()), (before, torch.ones(BATCH, 5, dtype=torch.long))],
        "decoder_input_tokens": given.noise(BATCH, LENGTH, CHANNELS),
        "decoder_noise_time": _time(),
    }


AUDIO: dict[str, Tiny] = {
    "ace-step": Tiny(
        kind="AceStepTransformer1DModel",
        config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "in_channels": CHANNELS + CONDITION,
            "audio_acoustic_hidden_dim": CHANNELS,
            "sliding_window": 4,
            "encoder_hidden_size": CAPTION,
        },
        arguments=_ace_step,
        blocks={"layers.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "longcat-audio": Tiny(
        kind="LongCatAudioDiTTransformer",
        config={
            "dit_dim": 24,
            "dit_depth": 3,
            "dit_heads": 2,
            "dit_text_dim": CAPTION,
            "latent_dim": CHANNELS,
            "ff_mult": 2.0,
        },
        arguments=_longcat,
        blocks={"blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "minimax-music3": Tiny(  # its feed-forward is written out in the block
        kind="MiniMaxMusic3Transformer1DModel",
        config={
            "in_channels": CHANNELS,
            "condition_dim": CONDITION,
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "ff_inner_dim": 40,
            "rotary_dim": 6,
            "fourier_embedding_dim": 16,
        },
        arguments=_minimax,
        blocks={"transformer_blocks.0-2": "attn mlp"},
        segments=(3,),
    ),
    "stable-audio": Tiny(
        kind="StableAudioDiTModel",
        config={
            "sample_size": LENGTH,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 16,
            "time_proj_dim": 12,
            "global_states_input_dim": 28,
            "cross_attention_input_dim": CAPTION,
        },
        arguments=_stable_audio,
        blocks={"transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "stable-audio3": Tiny(
        kind="StableAudio3DiTModel",
        config=STABLE_AUDIO_3,
        arguments=_stable_audio3,
        blocks={"transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "stable-audio3-inpainting": Tiny(  # what is kept is added in each block, between its cross-attention and its MLP
        kind="StableAudio3DiTModel",
        config=STABLE_AUDIO_3,
        arguments=_stable_audio3_inpainting,
        blocks={"transformer_blocks.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
    "t5-film": Tiny(  # blocks are lists of layers with a residual each, and return a tuple of one
        kind="T5FilmDecoder",
        config={
            "input_dims": CHANNELS,
            "targets_length": LENGTH,
            "d_model": 24,
            "num_layers": 3,
            "num_heads": 2,
            "d_kv": 12,
            "d_ff": 40,
        },
        arguments=_t5_film,
        blocks={"decoders.0-2": "attn cross_attn mlp"},
        segments=(3,),
    ),
}
