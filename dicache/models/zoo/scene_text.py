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
from transformers import T5EncoderModel

from dicache.models.zoo import scene_data
from dicache.models.zoo.scene_data import CLASSES, PLACES, Scene
from dicache.models.zoo.training import fit
from dicache.models.zoo.words import t5_config, t5_tokenizer, tokenised

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
WORDS = (
    *("a", "on", "background", *scene_data.SIZES, *scene_data.COLOURS, *scene_data.SHAPES),
    *(" ".join(scene_data.RELATIONS).split()),
    *scene_data.BACKGROUNDS,
)


class Reader(nn.Module):
    """The encoder with the heads that are only there while it is trained."""

    def __init__(self, *, width: int = WIDTH, masked: bool = True) -> None:
        super().__init__()
        self.masked = masked
        self.encoder = T5EncoderModel(t5_config(len(t5_tokenizer(WORDS)), width=width, layers=3))
        self.own = nn.ModuleDict({name: nn.Linear(width, len(classes)) for name, classes in OWN.items()})
        self.scene = nn.ModuleDict({name: nn.Linear(width, len(classes)) for name, classes in CLASSES.items()})

    def loss(self, ids: Tensor, mask: Tensor, own: dict[str, Tensor], shown: dict[str, Tensor]) -> Tensor:
        """Return the cross-entropy of what each token should know.

        Args:
            ids: Shape (n, 16).
            mask: Shape (n, 16), 0 at padding.
            own: Class numbers by name in `OWN`, shape (n, 16), -1 where a token has none.
            shown: Class numbers by name in `CLASSES`, shape (n,), -1 where the caption does not say it.
        """
        seen = mask if self.masked else None
        features = self.encoder(input_ids=ids, attention_mask=seen).last_hidden_state  # (n, 16, width)
        last = features[torch.arange(len(ids)), mask.sum(dim=1) - 1]  # (n, width)
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


def train_text_encoder(
    captions: Sequence[str], work: Path, *, seed: int, width: int = WIDTH, masked: bool = True
) -> T5EncoderModel:
    """Train the encoder on captions of the grammar.

    Args:
        captions: What to train on.
        work: Folder of the checkpoints.
        seed: Seeds weights and batches.
        width: Of the features.
        masked: Whether padding is hidden from the other tokens; FluxPipeline does not hide it.
    """
    torch.manual_seed(seed)
    reader = Reader(width=width, masked=masked)
    ids, mask = tokenised(t5_tokenizer(WORDS), captions, TOKENS)
    scenes = [scene_data.parse(caption) for caption in captions]
    own, shown = own_classes(scenes), scene_data.attributes(scenes)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids), (64,), generator=generator)
        return reader.loss(
            ids[rows], mask[rows], {k: v[rows] for k, v in own.items()}, {k: v[rows] for k, v in shown.items()}
        )

    fit("text-encoder", reader, loss, steps=STEPS, learning_rate=2e-3, work=work, seed=seed)
    return reader.encoder
