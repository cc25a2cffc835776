"""Pipelines that begin from a picture leave the first steps out: the schedule's own first steps are left out too."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXVideoToVideoPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    WanVideoToVideoPipeline,
)
from torch import Tensor, nn

import dicache
from dicache import Schedule
from dicache.anatomy import Anatomy, survey
from dicache.anatomy.inputs import capture_inputs
from dicache.schedules import Plan, Rule, Target
from tests.pipelines import models
from tests.pipelines.by_hand import ByHand
from tests.pipelines.samplers import order, put, rounds
from tests.pipelines.table import STEPS, of_noise, pooled, prompts, video
from tests.tiny import CHANNELS, SIZE, flux, generate, pipeline_of, randomised, sd3, unet, unet_xl

STRENGTH = 0.6
LEFT_OUT = 2  # of the five inference steps
PASSES = ("0",)


@dataclass(frozen=True)
class FromPicture:
    """A pipeline that begins from a picture or a video.

    Attributes:
        build: Makes it.
        given: Its arguments beside the generator, the strength and the number of steps.
        samplers: To run it with.
        passes: Of guidance, in the order of the calls.
    """

    build: Callable[[], Any]
    given: Callable[[], dict[str, Any]]
    samplers: tuple[str, ...]
    passes: tuple[str, ...] = PASSES

    def sample(self, pipe: Any, **options: Any) -> Tensor:
        given = {"strength": STRENGTH, "generator": torch.Generator().manual_seed(0), **self.given(), **options}
        made: Tensor = pipe(num_inference_steps=STEPS, output_type="latent", return_dict=False, **given)[0]
        return made


def made_of(kind: Any, pipe: Any) -> Any:
    """Return a pipeline of another kind with the parts of one, and an autoencoder that shifts its latents."""
    torch.manual_seed(0)
    channels = pipe.transformer.config.in_channels if kind is StableDiffusion3InpaintPipeline else CHANNELS
    vae = AutoencoderKL(
        block_out_channels=(8,), latent_channels=channels, norm_num_groups=4, sample_size=SIZE, shift_factor=0.1
    )
    more = {"requires_safety_checker": False} if "safety_checker" in pipe.components else {}
    return models.quiet(kind(**{**pipe.components, "vae": vae.eval()}, **more))


def image() -> Tensor:
    return of_noise(1, 3, SIZE, SIZE, seed=3)[0].clamp(-1, 1) / 2 + 0.5


def mask() -> Tensor:
    return torch.arange(SIZE)[None, None, None, :].expand(1, 1, SIZE, SIZE) / SIZE


def picture() -> dict[str, Any]:
    return {**prompts(1), "image": image()}


def picture_and_pooled() -> dict[str, Any]:
    return {**picture(), **pooled(1)}


def masked(given: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    return lambda: {**given(), "mask_image": mask(), "height": SIZE, "width": SIZE}


def for_flux(**options: Any) -> Callable[[], dict[str, Any]]:
    positive = {name: value for name, value in picture_and_pooled().items() if not name.startswith("negative")}
    return lambda: {**positive, "height": SIZE, "width": SIZE, **options}


def sd3_of_16_channels() -> nn.Module:
    """Return the only kind that its pipeline for inpainting takes."""
    config: Any = sd3().config
    return randomised(SD3Transformer2DModel.from_config({**config, "in_channels": 16, "out_channels": 16}))


def clip(shape: tuple[int, ...]) -> Callable[[], dict[str, Any]]:
    latents = of_noise(*shape, seed=4)[0]
    sizes = {name: value for name, value in video().items() if name in ("height", "width")}
    return lambda: {**prompts(1), **sizes, "latents": latents}


def built(kind: Any, model: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: made_of(kind, pipeline_of(model))


def cogvideox() -> Any:
    return models.quiet(CogVideoXVideoToVideoPipeline(**models.cogvideox_pipeline().components))


def wan() -> Any:
    parts = models.wan_pipeline().components
    return models.quiet(WanVideoToVideoPipeline(**{k: v for k, v in parts.items() if k != "transformer_2"}))


SAID = ("dpm", "deis", "euler", "heun", "kdpm2", "kdpm2-ancestral", "lcm")  # by a scheduler's `begin_index`
NOT_SAID = ("ddim", "pndm")
PIPELINES = {
    "StableDiffusion": FromPicture(built(StableDiffusionImg2ImgPipeline, unet), picture, (*SAID, *NOT_SAID)),
    "StableDiffusion inpainting": FromPicture(
        built(StableDiffusionInpaintPipeline, unet), masked(picture), ("euler", "heun", *NOT_SAID)
    ),
    "StableDiffusionXL": FromPicture(
        built(StableDiffusionXLImg2ImgPipeline, unet_xl), picture_and_pooled, ("heun", *NOT_SAID)
    ),
    "StableDiffusion3": FromPicture(
        built(StableDiffusion3Img2ImgPipeline, sd3), picture_and_pooled, ("flow-euler", "flow-heun")
    ),
    "StableDiffusion3 inpainting": FromPicture(
        built(StableDiffusion3InpaintPipeline, sd3_of_16_channels),
        masked(picture_and_pooled),
        ("flow-euler", "flow-heun"),
    ),
    "Flux": FromPicture(built(FluxImg2ImgPipeline, flux), for_flux(), ("flow-euler",)),
    "Flux inpainting": FromPicture(built(FluxInpaintPipeline, flux), for_flux(mask_image=mask()), ("flow-euler",)),
    "CogVideoX": FromPicture(
        cogvideox, clip((1, 2, CHANNELS, 8, 8)), ("ddim of CogVideoX", "dpm of CogVideoX"), ("cond_uncond",)
    ),
    "Wan": FromPicture(wan, clip((1, CHANNELS, 2, 8, 8)), ("flow-euler", "flow-unipc"), ("0", "1")),
}
every_sampler = pytest.mark.parametrize(
    ("name", "sampler"), [(name, sampler) for name, one in PIPELINES.items() for sampler in one.samplers]
)


def model_of(pipe: Any) -> tuple[str, Any]:
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    return name, getattr(pipe, name)


@cache
def anatomy_of(name: str) -> Anatomy:
    pipe = PIPELINES[name].build()
    _, model = model_of(pipe)
    return survey(model, capture_inputs(model, lambda: PIPELINES[name].sample(pipe)))


@every_sampler
def test_a_pipeline_that_begins_in_the_middle_is_at_that_step_of_the_schedule(name: str, sampler: str) -> None:
    given, steps, start = PIPELINES[name], rounds(sampler), LEFT_OUT * order(sampler)
    letters = ("C" * (start + 1) + "..C." * steps)[:steps]  # at another place a step too many or too few is reused
    plain = put(given.build(), sampler)
    uncached = given.sample(plain)
    turns = [(step, passed) for step in range(start, steps) for passed in given.passes]
    ByHand(model_of(plain)[1], anatomy_of(name), dict.fromkeys(given.passes, letters), turns)
    want = given.sample(plain)
    assert not torch.equal(want, uncached)
    pipe = put(given.build(), sampler)
    plan = Plan(steps, (Rule("reuse", letters),))
    with dicache.apply(pipe, Schedule("test", {}, anatomy_of(name), Target(), steps, plan)) as cache:
        for _ in range(2):
            assert torch.equal(given.sample(pipe), want)
            assert cache.stats.steps == dict.fromkeys(given.passes, "-" * start + letters[start:])
        assert torch.equal(given.sample(pipe, strength=1.0), whole(name, sampler, letters))
        assert cache.stats.steps == dict.fromkeys(given.passes, letters)


def whole(name: str, sampler: str, letters: str) -> Tensor:
    """Return what reuse by hand makes where no step is left out."""
    given, pipe = PIPELINES[name], put(PIPELINES[name].build(), sampler)
    turns = [(step, passed) for step in range(len(letters)) for passed in given.passes]
    ByHand(model_of(pipe)[1], anatomy_of(name), dict.fromkeys(given.passes, letters), turns)
    return given.sample(pipe, strength=1.0)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_two_pipelines_that_share_the_steps_are_each_at_their_own(sampler: str) -> None:
    """As the base and the refiner of Stable Diffusion XL: the first stops at a noise level, the second begins there."""
    letters, name, first = "C.CC.", "StableDiffusionXL", 3
    schedule = Schedule("test", {}, anatomy_of(name), Target(), STEPS, Plan(STEPS, (Rule("reuse", letters),)))
    latents = of_noise(1, CHANNELS, SIZE, SIZE, seed=7)[0]
    for options, turns, want in (
        ({"denoising_end": 0.6}, range(first), letters[:first]),
        ({"denoising_start": 0.6, "image": latents}, range(first, STEPS), "-" * first + letters[first:]),
    ):
        begins = "denoising_start" in options
        build = PIPELINES[name].build if begins else lambda: pipeline_of(unet_xl)
        plain, pipe = put(build(), sampler), put(build(), sampler)

        def sample(pipe: Any, options: dict[str, Any] = options, begins: bool = begins) -> Tensor:
            return PIPELINES[name].sample(pipe, **options) if begins else generate(pipe, steps=STEPS, **options)

        ByHand(plain.unet, anatomy_of(name), {"0": letters}, [(step, "0") for step in turns])
        with dicache.apply(pipe, schedule) as cache:
            for _ in range(2):
                assert torch.equal(sample(pipe), sample(plain))
                assert cache.stats.steps == {"0": want}
