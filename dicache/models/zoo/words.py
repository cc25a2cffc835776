"""Text encoders' tokenizers of whole words, and what the encoders make of captions."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel, T5Tokenizer
from transformers.tokenization_utils_base import BatchEncoding

HEADS = 4
UNKNOWN_WORD = -4.0  # log probability; a whole word has -1, and is always preferred to its letters


def t5_tokenizer(words: Sequence[str], length: int | None = None) -> T5Tokenizer:
    """Return a tokenizer with one piece for each word.

    Args:
        words: What to know.
        length: Most tokens, with that of the end; None sets no limit.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", UNKNOWN_WORD)]
    vocabulary = [*special, *((f"\u2581{word}", -1.0) for word in dict.fromkeys(words))]
    limit = {} if length is None else {"model_max_length": length}
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, **limit)


def t5_config(words: int, *, width: int, layers: int) -> T5Config:
    """Return the configuration of a small T5 encoder with so many words."""
    return T5Config(
        vocab_size=words,
        d_model=width,
        d_kv=width // HEADS,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=HEADS,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )


def clip_tokenizer(words: Sequence[str], length: int) -> CLIPTokenizer:
    """Return a tokenizer of byte pairs that are merged until each word is one token; others fall into pieces.

    Args:
        words: What to know, in small letters.
        length: Most tokens, with those of the start and the end.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    spelt = {word: (*word[:-1], f"{word[-1]}</w>") for word in dict.fromkeys(words)}
    merges: list[tuple[str, str]] = []
    while pairs := [pair for parts in spelt.values() for pair in pairwise(parts)]:
        merges.append(max(dict.fromkeys(pairs), key=pairs.count))
        spelt = {word: _merged(parts, merges[-1]) for word, parts in spelt.items()}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, start, end]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Return the parts of a word with every such pair joined, from the left."""
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


def tokenised(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Return token ids and the mask of those that are no padding, both of shape (n, length)."""
    out: BatchEncoding = tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return out.input_ids, out.attention_mask


@torch.no_grad()
def encoded(encoder: T5EncoderModel, ids: Tensor, masks: Tensor | None) -> Tensor:
    """Return features, shape (n, length, width), of token ids, shape (n, length); without masks padding is seen."""
    parts = ids.split(500)
    seen = [None] * len(parts) if masks is None else masks.split(500)
    features = [encoder(input_ids=i, attention_mask=m).last_hidden_state for i, m in zip(parts, seen, strict=True)]
    return torch.cat(features)
