"""Which tensor is the time embedding, told from its class's name and from what changes it; and what it is, by hand."""

from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn

from dicache.anatomy import survey
from dicache.anatomy.inputs import Inputs, capture_inputs
from dicache.anatomy.time_embedding import PROJECTED, TIME, Reading, find_time_embedding
from tests.timed import COGVIDEOX, anatomy_of, cogvideox, hidream, wan
from tests.tiny import CAPTION, CHANNELS, SIZE, TEXT_TOKENS, arguments, dit, flux, pixart, randomised, sd3


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (wan, {TIME: "condition_embedder.time_embedder", PROJECTED: "condition_embedder.time_proj"}),
        (cogvideox, {TIME: "time_embedding"}),
        (hidream, {TIME: "t_embedder.timestep_embedder"}),
    ],
)
def test_the_time_embedding_of_a_pipelines_model_is_found(build: Any, found: dict[str, str]) -> None:
    pipe, run = build()
    inputs = capture_inputs(pipe.transformer, run)
    before = {name: module.__dict__.get("forward") for name, module in pipe.transformer.named_modules()}
    read = find_time_embedding(pipe.transformer, inputs, anatomy_of(pipe, run))
    assert read == {name: Reading(module) for name, module in found.items()}
    assert before == {name: module.__dict__.get("forward") for name, module in pipe.transformer.named_modules()}


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (pixart, {TIME: "adaln_single.emb.timestep_embedder", PROJECTED: "adaln_single.linear"}),
        (sd3, {TIME: "time_text_embed.timestep_embedder"}),
        (flux, {TIME: "time_text_embed.timestep_embedder"}),  # not that of the guidance, nor of the text
        (dit, {}),  # inside each block, with the class
    ],
)
def test_where_it_is_not_what_is_published_it_is_found_too(build: Any, found: dict[str, str]) -> None:
    model: nn.Module = build()
    inputs = Inputs((), arguments(model))
    read = find_time_embedding(model, inputs, survey(model, inputs))
    assert read == {name: Reading(module) for name, module in found.items()}


def test_what_is_added_to_it_on_the_way_to_the_blocks_belongs_to_it() -> None:
    """CogVideoX1.5-I2V adds the embedding of `ofs`, a constant, and TeaCache compares the sum."""
    model = randomised(
        CogVideoXTransformer3DModel(
            **COGVIDEOX,
            ofs_embed_dim=8,
            use_rotary_positional_embeddings=True,
        )
    )
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tokens = 2 * (SIZE // 2) ** 2
    given = {
        "hidden_states": noise(1, 2, CHANNELS, SIZE, SIZE),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, TEXT_TOKENS, CAPTION),
        "ofs": torch.tensor([2.0]),
        "image_rotary_emb": (noise(tokens, 16), noise(tokens, 16)),
    }
    inputs = Inputs((), given)
    found = find_time_embedding(model, inputs, survey(model, inputs))
    assert found == {TIME: Reading("transformer_blocks.0", "temb")}
