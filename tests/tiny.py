"""Tiny models with random weights, what to call them with, and the loops and pipelines that sample from them."""

from collections.abc import Callable, Generator, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from torch import Tensor, nn

from dicache import Cache, Schedule
from dicache.anatomy import Anatomy, survey
from dicache.schedules import Plan, Rule, Target, TeaCachePolicy

BATCH = 2
CHANNELS = 4
SIZE = 8  # of the latents, in pixels
TOKENS = 16  # patches of two by two
WIDTH = 24
TEXT_TOKENS = 8
CAPTION = 16  # channels of the text
STEPS = 4

Build = Callable[[], nn.Module]


def dit() -> nn.Module:
    """Four blocks of attention and MLP, modulated by timestep and class inside each block (ada_norm_zero)."""
    return randomised(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS,
            num_layers=4,
            sample_size=SIZE,
            num_embeds_ada_norm=1000,
        )
    )


def pixart() -> nn.Module:
    """Three blocks of attention, cross-attention and MLP, modulated from outside (ada_norm_single)."""
    return randomised(
        PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS,
            num_layers=3,
            sample_size=SIZE,
            cross_attention_dim=WIDTH,
            caption_channels=CAPTION,
        )
    )


both_models = pytest.mark.parametrize("build", [dit, pixart])


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value, so that no gate is closed and every block matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@cache
def anatomy_of(build: Build) -> Anatomy:
    return survey(build())


def scheduled(build: Build, *rules: Rule, **made_for: Any) -> Schedule:
    """Return a schedule of a plan; without rules it computes everything."""
    plan = Plan(len(rules[0].steps) if rules else STEPS, rules)
    return Schedule("test", {}, anatomy_of(build), Target(**made_for), plan.steps, plan)


def adaptive(build: Build, threshold: float, steps: int = STEPS, **settings: Any) -> Schedule:
    """Return a schedule of TeaCache's policy that adds up the changes as they are measured."""
    policy = TeaCachePolicy(threshold, coefficients=(1.0, 0.0), input_range=(0.0, 100.0), **settings)
    return Schedule("teacache", {}, anatomy_of(build), Target(), steps, policy=policy)


def arguments(model: nn.Module, *, batch: int = BATCH, seed: int = 0, timestep: int = 500) -> dict[str, Any]:
    """Return what a call of a model takes."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    given = {
        "hidden_states": noise(batch, CHANNELS, SIZE, SIZE),
        "timestep": torch.full((batch,), timestep),
    }
    if isinstance(model, DiTTransformer2DModel):
        return {**given, "class_labels": torch.arange(batch)}
    return {
        **given,
        "encoder_hidden_states": noise(batch, TEXT_TOKENS, CAPTION),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def predict(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """Call a model once."""
    with torch.no_grad():
        out: Tensor = model(**given).sample
    return out


def denoise(
    model: nn.Module, cache: Cache | None = None, *, steps: int = STEPS, batch: int = BATCH, seed: int = 0
) -> Generator[Tensor]:
    """Sample from a bare model; yield its output at each step. Each output changes the next step's latents."""
    if cache is not None:
        cache.begin_generation()
    given = arguments(model, batch=batch, seed=seed)
    for step in range(steps):
        if cache is not None:
            cache.begin_step()
        given["timestep"] = torch.full((batch,), 900 - 800 * step // steps)
        out = predict(model, given)
        given["hidden_states"] = given["hidden_states"] - out[:, :CHANNELS] / steps
        yield out


def sample(model: nn.Module, cache: Cache | None = None, **options: Any) -> Tensor:
    """Sample from a bare model; return its outputs of all steps."""
    return torch.stack(list(denoise(model, cache, **options)))


def replay(model: nn.Module, cache: Cache, calls: Iterable[dict[str, Any]]) -> list[Tensor]:
    """Call a bare model once a step with what is given, whatever comes out."""
    cache.begin_generation()
    outputs = []
    for given in calls:
        cache.begin_step()
        outputs.append(predict(model, given))
    return outputs


def pipeline_of(build: Build) -> Any:
    """Return a pipeline with a model, a tiny autoencoder and, where it takes text, no text encoder."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=CHANNELS, norm_num_groups=4, sample_size=SIZE).eval()
    transformer = build()
    pipe: Any
    if isinstance(transformer, DiTTransformer2DModel):
        pipe = DiTPipeline(transformer, vae, DDIMScheduler())
    else:
        pipe = PixArtAlphaPipeline(None, None, vae, transformer, DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, *, steps: int = STEPS, batch: int = 1, seed: int = 0, **options: Any) -> Tensor:
    """Sample from a pipeline with guidance, which doubles the batch; return its images, or its latents."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(pipe, DiTPipeline):
        labels = list(range(batch))
        images: Tensor = pipe(
            labels, num_inference_steps=steps, generator=generator, output_type="pt", **options
        ).images
        return images
    dtype = pipe.transformer.dtype
    text = torch.randn(2, batch, TEXT_TOKENS, CAPTION, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.long)
    latents: Tensor = pipe(
        prompt_embeds=text[0],
        prompt_attention_mask=mask,
        negative_prompt=None,
        negative_prompt_embeds=text[1],
        negative_prompt_attention_mask=mask,
        height=SIZE,
        width=SIZE,
        use_resolution_binning=False,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        **options,
    ).images
    return latents
