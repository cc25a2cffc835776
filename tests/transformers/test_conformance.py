"""The survey and the runtime's laws, over all transformers of diffusers."""

import importlib
import pkgutil
from functools import cache

import diffusers
import diffusers.models.transformers as transformers
import pytest
from torch import nn

from dicache.anatomy import Anatomy, Inputs, survey
from dicache.conformance import LAWS, Subject
from tests.transformers import TRANSFORMERS

# Classes that are no denoisers, or cannot be called as one.
OTHERS = {
    "MiniMaxMusic3RVQDepthDecoder": "writes the codes of one frame of sound after another",
    "DreamLiteTransformer2DModel": "is a part of a U-Net, and is not given the time",
    "RFD4ProteinaTransformer": "has two latents, of two schedulers, and may call its blocks several times",
}

every_transformer = pytest.mark.parametrize("name", TRANSFORMERS)


@cache
def surveyed(name: str) -> tuple[nn.Module, Inputs, Anatomy]:
    tiny = TRANSFORMERS[name]
    model, inputs = tiny.build(), tiny.inputs()
    return model, inputs, survey(model, inputs)


@every_transformer
def test_the_survey_finds_what_is_read_in_the_source(name: str) -> None:
    tiny = TRANSFORMERS[name]
    _, _, anatomy = surveyed(name)
    found = {block.module: " ".join(site.branch for site in block.sites) for block in anatomy.blocks}
    assert found == dict(tiny.every_block())
    assert tuple(stop - start for start, stop in anatomy.segments) == tiny.segments


@every_transformer
def test_a_survey_with_other_numbers_finds_the_same(name: str) -> None:
    tiny = TRANSFORMERS[name]
    assert survey(tiny.build(), tiny.inputs(seed=1)) == surveyed(name)[2]


@every_transformer
@pytest.mark.parametrize("law", LAWS)
def test_law(name: str, law: str) -> None:
    assert LAWS[law](Subject(*surveyed(name), thorough=True)) >= 0


def test_every_transformer_of_diffusers_is_in_the_table_or_is_none() -> None:
    found = set()
    for module in pkgutil.iter_modules(transformers.__path__):
        content = vars(importlib.import_module(f"{transformers.__name__}.{module.name}"))
        kinds = [
            value for value in content.values() if isinstance(value, type) and issubclass(value, diffusers.ModelMixin)
        ]
        found |= {kind.__name__ for kind in kinds if kind.__module__.endswith(f".{module.name}")}
    assert found - {tiny.kind for tiny in TRANSFORMERS.values()} == set(OTHERS)


def test_there_are_more_than_sixty() -> None:
    assert len({tiny.kind for tiny in TRANSFORMERS.values()}) > 60
