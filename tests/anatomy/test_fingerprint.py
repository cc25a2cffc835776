"""The short name of a model's weights."""

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import nn

from dicache.anatomy.fingerprint import fingerprint
from tests.tiny import Build, block_of, dit, every_model, pixart, randomised


@every_model
def test_equal_weights_have_equal_fingerprints_of_sixteen_digits(build: Build) -> None:
    assert fingerprint(build()) == fingerprint(build())
    assert len(fingerprint(build())) == 16
    assert int(fingerprint(build()), 16) >= 0


@every_model
def test_any_changed_weight_of_a_block_changes_the_fingerprint(build: Build) -> None:
    model = build()
    before = fingerprint(model)
    for parameter in block_of(model, build, 1).parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter.add_(0.1)
            assert fingerprint(model) != before
            parameter.copy_(kept)
    assert fingerprint(model) == before


def test_other_random_weights_have_another_fingerprint() -> None:
    assert fingerprint(randomised(dit(), seed=1)) != fingerprint(dit())
    assert fingerprint(pixart()) != fingerprint(dit())


def test_the_names_of_the_weights_count() -> None:
    layer = nn.Linear(2, 2)
    assert fingerprint(nn.ModuleDict({"a": layer})) != fingerprint(nn.ModuleDict({"b": layer}))


@pytest.mark.parametrize("kind", [DiTTransformer2DModel, PixArtTransformer2DModel])
def test_the_fingerprint_survives_saving_and_loading_in_another_precision(kind: type, tmp_path: Path) -> None:
    model = dit() if kind is DiTTransformer2DModel else pixart()
    before = fingerprint(model)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert fingerprint(kind.from_pretrained(tmp_path)) == before  # type: ignore[attr-defined]
    loaded = kind.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)  # type: ignore[attr-defined]
    assert next(loaded.parameters()).dtype == torch.bfloat16
    assert fingerprint(loaded) == before
