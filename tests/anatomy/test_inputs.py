"""Arguments of a model's call: made up, captured, and the latents among them."""

import pytest
import torch
from torch import Tensor, nn

from dicache.anatomy import AnatomyError
from dicache.anatomy.inputs import capture_inputs, example_inputs, latents_of
from dicache.runtime.apply import denoiser
from tests.tiny import (
    Build,
    arguments,
    dit,
    every_model,
    flux,
    generate,
    pipeline_of,
    predict,
    sd3,
    sd35,
    unet_small,
    unet_xl_small,
)


@every_model
def test_made_up_inputs_run_the_model_at_its_own_size(build: Build) -> None:
    model = build()
    inputs = example_inputs(model)
    with torch.no_grad():
        out = model(*inputs.args, **inputs.kwargs).sample
    variances = build not in (sd3, sd35, unet_small, unet_xl_small)
    # Flux does not tell its size.
    assert out.shape == ((2, 64, 16) if build is flux else (2, 8 if variances else 4, 8, 8))


def test_made_up_inputs_have_the_precision_of_the_model() -> None:
    assert latents_of((), example_inputs(dit().to(torch.bfloat16)).kwargs).dtype == torch.bfloat16


def test_a_required_argument_that_is_not_known_is_named_with_what_to_do_next() -> None:
    class Unusual(nn.Linear):
        def forward(self, hidden_states: Tensor, phase: Tensor) -> Tensor:  # type: ignore[override]
            return hidden_states + phase

    model = Unusual(2, 2)
    model.config = {"in_channels": 4}  # type: ignore[assignment]
    with pytest.raises(AnatomyError, match=r"Unusual needs 'phase'.*call survey\(model, inputs\)"):
        example_inputs(model)


def test_an_argument_whose_size_the_configuration_does_not_tell_is_named() -> None:
    class Bare(nn.Linear):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states

    with pytest.raises(AnatomyError, match="Bare needs 'hidden_states'"):
        example_inputs(Bare(2, 2))


@every_model
def test_the_first_call_of_a_pipeline_is_captured_and_the_model_left_as_it_was(build: Build) -> None:
    pipe = pipeline_of(build)
    generate(pipe)  # some pipelines hang something on their model
    model = denoiser(pipe)
    keys = set(model.__dict__)
    inputs = capture_inputs(model, lambda: generate(pipe))
    # One image, doubled by guidance, but for Flux.
    assert latents_of(inputs.args, inputs.kwargs).shape == ((1, 16, 16) if build is flux else (2, 4, 8, 8))
    assert set(model.__dict__) == keys
    predict(model, arguments(model))


def test_made_up_places_of_packed_patches_count_rows_and_columns() -> None:
    kwargs = example_inputs(flux()).kwargs
    assert kwargs["img_ids"].shape == (64, 3)
    assert kwargs["img_ids"][:9].int().tolist() == [[0, 0, column] for column in range(8)] + [[0, 1, 0]]
    assert kwargs["txt_ids"].shape == (8, 3)
    assert kwargs["guidance"].shape == (2,)
    assert "guidance" not in example_inputs(flux(guidance_embeds=False)).kwargs


def test_a_run_that_never_calls_the_model_is_an_error() -> None:
    with pytest.raises(AnatomyError, match="ended without a call of DiTTransformer2DModel"):
        capture_inputs(dit(), lambda: None)


def test_an_error_of_the_run_itself_passes_and_the_model_is_restored() -> None:
    model = dit()
    keys = set(model.__dict__)

    def run() -> None:
        raise RuntimeError("no prompt")

    with pytest.raises(RuntimeError, match="no prompt"):
        capture_inputs(model, run)
    assert set(model.__dict__) == keys


def test_latents_are_the_hidden_states_wherever_they_stand_among_the_keywords() -> None:
    latents, other = torch.zeros(2, 4), torch.zeros(3)
    assert latents_of((), {"timestep": other, "hidden_states": latents}) is latents
    assert latents_of((latents,), {"timestep": other}) is latents
    with pytest.raises(AnatomyError, match="no tensor of numbers among its arguments"):
        latents_of((1,), {"timestep": 2})
