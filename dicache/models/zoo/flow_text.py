"""The second text encoder of `flow`: a small CLIP text model, whose pooled feature says what a whole caption says."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dicache.models.zoo import scene_data
from dicache.models.zoo.scene_data import CLASSES
from dicache.models.zoo.scene_text import TOKENS, WORDS
from dicache.models.zoo.training import fit
from dicache.models.zoo.words import HEADS, clip_tokenizer, tokenised

WIDTH = 64
LENGTH = TOKENS + 1  # a start comes on top
STEPS = 1500


def tokenizer() -> CLIPTokenizer:
    """Return a tokenizer with one token for each word of the grammar."""
    return clip_tokenizer(WORDS, LENGTH)


class PooledReader(nn.Module):
    """The encoder with the heads that are only there while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        words = tokenizer()
        config = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            max_position_embeddings=LENGTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        self.encoder = CLIPTextModel(config)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(classes)) for name, classes in CLASSES.items()})

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Return logits by name in `CLASSES`, each of shape (n, classes), from token ids, shape (n, 17)."""
        pooled = self.encoder(input_ids=ids).pooler_output  # (n, 64)
        return {name: head(pooled) for name, head in self.heads.items()}


def train_pooled_encoder(captions: Sequence[str], work: Path, *, seed: int) -> CLIPTextModel:
    """Train the encoder on captions of the grammar, to say all attributes of a scene at the caption's end."""
    torch.manual_seed(seed)
    reader = PooledReader()
    ids, _ = tokenised(tokenizer(), captions, LENGTH)
    shown = scene_data.attributes([scene_data.parse(caption) for caption in captions])

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids), (64,), generator=generator)
        logits = reader(ids[rows])
        errors = [F.cross_entropy(logits[name], shown[name][rows], ignore_index=-1) for name in logits]
        return torch.stack(errors).sum()

    fit("pooled-encoder", reader, loss, steps=STEPS, learning_rate=2e-3, work=work, seed=seed)
    return reader.encoder


@torch.no_grad()
def encode_pooled(captions: Sequence[str], encoder: CLIPTextModel) -> Tensor:
    """Return pooled features, shape (n, 64)."""
    ids, _ = tokenised(tokenizer(), captions, LENGTH)
    return torch.cat([encoder(input_ids=part).pooler_output for part in ids.split(500)])
