"""Pipelines of diffusers with tiny models, what they are given, and in which order they call their models."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dicache.anatomy import Anatomy, survey
from dicache.anatomy.inputs import capture_inputs
from tests.pipelines import models
from tests.tiny import CAPTION, POOLED, TEXT_TOKENS, dit, flux, generate, pipeline_of, pixart, sd3, unet, unet_xl

STEPS = 5  # inference steps
PIXELS = 64  # of a side

Order = Callable[[int, int], tuple[str, ...]]  # of a step and the number of steps, the passes as they are called


@dataclass(frozen=True)
class Sampled:
    """A pipeline and what it calls its models for, as its source has it.

    Attributes:
        build: Makes the pipeline.
        call: Given it, `steps`, `batch`, `seed` and options, returns what it makes: latents where it lets.
        order: The guidance passes of a step in the order of the calls: its own names for them, where it enters a
            `cache_context`, else their places.
        models: The models that it calls at its steps, and at which of all steps each.
    """

    build: Callable[[], Any]
    call: Callable[..., Tensor]
    order: Order
    models: dict[str, Callable[[int], range]] = field(default_factory=lambda: {"transformer": range})

    def sample(self, pipe: Any, **options: Any) -> Tensor:
        """Return what the pipeline makes in the inference steps that all tests take."""
        return self.call(pipe, **{"steps": STEPS, **options})

    def turns(self, model: str, steps: int) -> list[tuple[int, str]]:
        """Return the step and the pass of every call of a model, in order."""
        return [(step, name) for step in self.models[model](steps) for name in self.order(step, steps)]

    def letters(self, model: str, letters: str) -> dict[str, str]:
        """Return those of the steps at which each pass is called, `-` for others, up to its last one."""
        made: dict[str, str] = {}
        for step, name in self.turns(model, len(letters)):
            made[name] = made.get(name, "").ljust(step, "-") + letters[step]
        return made


def call(given: Callable[[int], dict[str, Any]], pipe: Any, **asked: Any) -> Tensor:
    """Sample from a pipeline that is given what `given` makes for a batch."""
    batch, seed, steps = asked.pop("batch", 1), asked.pop("seed", 0), asked.pop("steps", STEPS)
    generator = torch.Generator().manual_seed(seed)
    options = {**given(batch), "num_inference_steps": steps, "generator": generator, **asked}
    made: Tensor = pipe(**options, return_dict=False)[0]
    return made


def always(*passes: str) -> Order:
    return lambda step, steps: passes


def of_noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


def prompts(batch: int) -> dict[str, Any]:
    """Return the embeddings of the prompts and of no prompt."""
    cond, uncond = of_noise(batch, TEXT_TOKENS, CAPTION, seed=1)
    return {"prompt_embeds": cond, "negative_prompt_embeds": uncond}


def pooled(batch: int) -> dict[str, Any]:
    cond, uncond = of_noise(batch, POOLED, seed=2)
    return {"pooled_prompt_embeds": cond, "negative_pooled_prompt_embeds": uncond}


def masks(
    batch: int, name: str = "prompt_attention_mask", negative: str = "negative_prompt_attention_mask"
) -> dict[str, Any]:
    return {each: torch.ones(batch, TEXT_TOKENS, dtype=torch.long) for each in (name, negative)}


def picture() -> dict[str, Any]:
    return {"height": PIXELS, "width": PIXELS, "output_type": "latent"}


def video() -> dict[str, Any]:
    return {**picture(), "num_frames": 5}


def given_to_pixart_sigma(batch: int) -> dict[str, Any]:
    plain = {"use_resolution_binning": False, "negative_prompt": None}
    return {**prompts(batch), **masks(batch), **picture(), **plain}


def given_to_latte(batch: int) -> dict[str, Any]:
    plain = {"clean_caption": False, "mask_feature": False, "negative_prompt": None, "video_length": 3}
    return {**prompts(batch), **picture(), **plain}


def given_to_cogvideox(batch: int) -> dict[str, Any]:
    return {**prompts(batch), **video()}


def given_to_hunyuan_video(batch: int) -> dict[str, Any]:
    both = {**prompts(batch), **pooled(batch), **masks(batch)}
    return {**{name: value for name, value in both.items() if not name.startswith("negative")}, **video()}


def given_to_ltx(batch: int) -> dict[str, Any]:
    return {**prompts(batch), **masks(batch), **video(), "num_frames": 9}


def given_to_lumina2(batch: int) -> dict[str, Any]:
    return {**prompts(batch), **masks(batch), **picture()}


def given_to_qwen_image(batch: int) -> dict[str, Any]:
    return {**prompts(batch), **masks(batch, "prompt_embeds_mask", "negative_prompt_embeds_mask"), **picture()}


def given_to_sana(batch: int) -> dict[str, Any]:
    plain = {"use_resolution_binning": False, "negative_prompt": None}
    return {**prompts(batch), **masks(batch), **picture(), **plain}


def generate_with_true_guidance(pipe: Any, *, batch: int = 1, **options: Any) -> Tensor:
    options = {"true_cfg_scale": 3.0, **options}
    negative = {name: value for name, value in {**prompts(batch), **pooled(batch)}.items() if "negative" in name}
    return generate(pipe, batch=batch, **negative, **options)


SKIPS_LAYERS: dict[str, Any] = {
    "skip_guidance_layers": [1],
    "skip_layer_guidance_start": 0.1,
    "skip_layer_guidance_stop": 0.7,
}


def with_skipped_layers(step: int, steps: int) -> tuple[str, ...]:
    """Return a pass of both halves and, inside the window above, one that leaves a block out."""
    return ("0", "1") if 0.1 * STEPS < step < 0.7 * STEPS else ("0",)


BATCHED, NAMED = always("0"), always("cond", "uncond")
PIPELINES: dict[str, Sampled] = {
    "DiT": Sampled(partial(pipeline_of, dit), generate, BATCHED),
    "PixArtAlpha": Sampled(partial(pipeline_of, pixart), generate, BATCHED),
    "PixArtSigma": Sampled(models.pixart_sigma_pipeline, partial(call, given_to_pixart_sigma), BATCHED),
    "StableDiffusion3": Sampled(partial(pipeline_of, sd3), generate, BATCHED),
    "StableDiffusion3 that skips layers": Sampled(
        partial(pipeline_of, sd3), partial(generate, **SKIPS_LAYERS), with_skipped_layers
    ),
    "Flux": Sampled(partial(pipeline_of, flux), generate, always("cond")),
    "Flux with true guidance": Sampled(partial(pipeline_of, flux), generate_with_true_guidance, NAMED),
    "CogVideoX": Sampled(models.cogvideox_pipeline, partial(call, given_to_cogvideox), always("cond_uncond")),
    "Wan": Sampled(models.wan_pipeline, partial(call, given_to_cogvideox), NAMED),
    "Wan of two": Sampled(
        models.wan_of_two_pipeline,
        partial(call, given_to_cogvideox),
        NAMED,
        {"transformer": lambda steps: range(3), "transformer_2": lambda steps: range(3, steps)},
    ),
    "HunyuanVideo": Sampled(models.hunyuan_video_pipeline, partial(call, given_to_hunyuan_video), always("cond")),
    "LTX": Sampled(models.ltx_pipeline, partial(call, given_to_ltx), always("cond_uncond")),
    "Latte": Sampled(models.latte_pipeline, partial(call, given_to_latte), BATCHED),
    "Lumina2": Sampled(models.lumina2_pipeline, partial(call, given_to_lumina2), always("0", "1")),
    "Lumina2 that truncates guidance": Sampled(
        models.lumina2_pipeline,
        partial(call, given_to_lumina2, cfg_trunc_ratio=0.6),
        lambda step, steps: ("0", "1") if (step + 1) / STEPS <= 0.6 else ("0",),
    ),
    "QwenImage": Sampled(models.qwen_image_pipeline, partial(call, given_to_qwen_image), NAMED),
    "Sana": Sampled(models.sana_pipeline, partial(call, given_to_sana), BATCHED),
    "StableDiffusion": Sampled(partial(pipeline_of, unet), generate, BATCHED, {"unet": range}),
    "StableDiffusionXL": Sampled(partial(pipeline_of, unet_xl), generate, BATCHED, {"unet": range}),
}


@cache
def anatomy_of(name: str, model: str) -> Anatomy:
    """Return the anatomy of a model of a pipeline of the table."""
    sampled = PIPELINES[name]
    pipe = sampled.build()
    part: nn.Module = getattr(pipe, model)
    return survey(part, capture_inputs(part, lambda: sampled.sample(pipe)))
