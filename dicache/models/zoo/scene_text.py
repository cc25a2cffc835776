"""The text encoder of `scenes`: a small T5 with a tokenizer of whole words.

A text encoder that only sees the loss of the denoiser is slow to learn which attribute belongs to which object. So it
is trained first, in about a minute, to say it outright: each word of an object knows the place, size, colour and shape
of its object, each word the layout and the background, and the last token everything. The denoiser then finds at each
place what belongs there.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from dicache.models.zoo import scene_data
from dicache.models.zoo.scene_data import CLASSES, PLACES, Scene
from dicache.models.zoo.training import fit

WIDTH = 96
TOKENS = 16  # the longest caption has 15 and an end
STEPS = 1500
OWN = {
    "place": PLACES,
    "size": CLASSES["first_size"],
    "colour": CLASSES["first_colour"],
    "shape": CLASSES["first_shape"],
}
EVERYWHERE = ("layout", "background")
UNKNOWN_WORD = -4.0  # log probability; a whole word has -1, and is always preferred to its letters


def tokenizer() -> T5Tokenizer:
    """Return a tokenizer with one piece for each word of the grammar."""
    relations = " ".join(scene_data.RELATIONS).split()
    words = ["a", "on", "background", *scene_data.SIZES, *scene_data.COLOURS, *scene_data.SHAPES, *relations]
    pieces = [f"\u2581{word}" for word in dict.fromkeys([*words, *scene_data.BACKGROUNDS])]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", UNKNOWN_WORD)]
    return T5Tokenizer(vocab=[*special, *((piece, -1.0) for piece in pieces)], extra_ids=0)


def tokenised(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and the mask of those that are no padding, both of shape (n, 16)."""
    out = tokenizer()(list(captions), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask


class Reader(nn.Module):
    """The encoder with the heads that are only there while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        config = T5Config(
            vocab_size=len(tokenizer()),
            d_model=WIDTH,
            d_kv=24,
            d_ff=2 * WIDTH,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
        self.encoder = T5EncoderModel(config)
        self.own = nn.ModuleDict({name: nn.Linear(WIDTH, len(classes)) for name, classes in OWN.items()})
        self.scene = nn.ModuleDict({name: nn.Linear(WIDTH, len(classes)) for name, classes in CLASSES.items()})

    def loss(self, ids: Tensor, mask: Tensor, own: dict[str, Tensor], shown: dict[str, Tensor]) -> Tensor:
        """Return the cross-entropy of what each token should know.

        Args:
            ids: Shape (n, 16).
            mask: Shape (n, 16), 0 at padding.
            own: Class numbers by name in `OWN`, shape (n, 16), -1 where a token has none.
            shown: Class numbers by name in `CLASSES`, shape (n,), -1 where the caption does not say it.
        """
        features = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (n, 16, 96)
        last = features[torch.arange(len(ids)), mask.sum(dim=1) - 1]  # (n, 96)
        errors = [
            F.cross_entropy(head(features).flatten(0, 1), own[name].flatten(), ignore_index=-1)
            for name, head in self.own.items()
        ]
        for name, head in self.scene.items():
            if name in EVERYWHERE:
                target = shown[name][:, None].where(mask.bool(), -1)  # (n, 16)
                errors.append(F.cross_entropy(head(features).flatten(0, 1), target.flatten(), ignore_index=-1))
            else:
                errors.append(F.cross_entropy(head(last), shown[name], ignore_index=-1))
        return torch.stack(errors).sum()


def own_classes(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Return what the tokens of each object should know, by name in `OWN`, each of shape (n, 16)."""
    out = {name: torch.full((len(scenes), TOKENS), -1) for name in OWN}
    for row, scene in enumerate(scenes):
        start = 0
        for item, place in zip((scene.first, scene.second), scene.places, strict=True):
            if item is None or place is None:
                continue
            end = start + len(item.phrase().split())
            for name, value in (("place", place), *vars(item).items()):
                if value is not None:
                    out[name][row, start:end] = list(OWN[name]).index(value)
            start = end + len((scene.relation or "").split())
    return out


def train_text_encoder(captions: Sequence[str], work: Path, *, seed: int) -> T5EncoderModel:
    """Train the encoder on captions of the grammar."""
    torch.manual_seed(seed)
    reader = Reader()
    ids, mask = tokenised(captions)
    scenes = [scene_data.parse(caption) for caption in captions]
    own, shown = own_classes(scenes), scene_data.attributes(scenes)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids), (64,), generator=generator)
        return reader.loss(
            ids[rows], mask[rows], {k: v[rows] for k, v in own.items()}, {k: v[rows] for k, v in shown.items()}
        )

    fit("text-encoder", reader, loss, steps=STEPS, learning_rate=2e-3, work=work, seed=seed)
    return reader.encoder
