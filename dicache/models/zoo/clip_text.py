"""The text encoder of `clips`: a small T5 with a tokenizer of whole words, made for how LattePipeline pads.

It is trained by itself, in less than a minute, to say on each word what the whole caption says.

LattePipeline pads to 120 tokens and masks no attention: a prompt alone is cut to its own tokens, one among others is
followed by features of zero, and the negative prompt by whatever the encoder makes of the padding. So that a clip does
not depend on the batch it is in, the padding's word is a copy of the end's, which makes all tokens of the empty prompt
alike, and the first feature of every token is at least one, so that the denoiser can tell zeros apart.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5EncoderModel

from dicache.models.zoo import clip_data
from dicache.models.zoo.clip_data import CLASSES
from dicache.models.zoo.training import fit
from dicache.models.zoo.words import t5_config, t5_tokenizer, tokenised

WIDTH = 64
TOKENS = 11  # the longest caption has 10 and an end
STEPS = 800
WORDS = ("a", "standing", "moving", "on", "background", *(word for known in CLASSES.values() for word in known))


class Reader(nn.Module):
    """The encoder with the heads that are only there while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = T5EncoderModel(t5_config(len(t5_tokenizer(WORDS)), width=WIDTH, layers=2))
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(classes)) for name, classes in CLASSES.items()})

    def loss(self, ids: Tensor, mask: Tensor, said: dict[str, Tensor]) -> Tensor:
        """Return the cross-entropy of what each token should know, and what the first features lack.

        Args:
            ids: Shape (n, 11).
            mask: Shape (n, 11), 0 at padding.
            said: Class numbers by name in `CLASSES`, shape (n,), -1 where the caption does not say it.
        """
        features = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (n, 11, 64)
        error: Tensor = 4 * F.relu(1.5 - features[..., 0]).mean()
        for name, head in self.heads.items():
            target = said[name][:, None].where(mask.bool(), -1)  # (n, 11)
            error = error + F.cross_entropy(head(features).flatten(0, 1), target.flatten(), ignore_index=-1)
        return error


def train_text_encoder(captions: Sequence[str], work: Path, *, seed: int) -> T5EncoderModel:
    """Train the encoder on captions of the grammar."""
    torch.manual_seed(seed)
    reader = Reader()
    tokenizer = t5_tokenizer(WORDS)
    ids, mask = tokenised(tokenizer, captions, TOKENS)
    said = clip_data.attributes([clip_data.parse(caption) for caption in captions])
    empty_ids, empty_mask = tokenised(tokenizer, [""], TOKENS)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids), (64,), generator=generator)
        nothing = {name: torch.cat([classes[rows], torch.tensor([-1])]) for name, classes in said.items()}
        return reader.loss(torch.cat([ids[rows], empty_ids]), torch.cat([mask[rows], empty_mask]), nothing)

    fit("text-encoder", reader, loss, steps=STEPS, learning_rate=2e-3, work=work, seed=seed)
    words = reader.encoder.get_input_embeddings().weight
    with torch.no_grad():
        words[tokenizer.pad_token_id] = words[tokenizer.eos_token_id]
    return reader.encoder
