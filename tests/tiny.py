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
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatteTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from dicache import Cache, Schedule
from dicache.anatomy import Anatomy, survey
from dicache.anatomy.inputs import Inputs
from dicache.schedules import FirstBlockPolicy, Plan, Rule, Target, TeaCachePolicy

BATCH = 2
CHANNELS = 4
SIZE = 8  # of the latents, in pixels
TOKENS = 16  # patches of two by two
WIDTH = 24
TEXT_TOKENS = 8
CAPTION = 16  # channels of the text
POOLED = 20  # channels of the whole text's embedding
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


def sd3(**config: Any) -> nn.Module:
    """Three blocks of image and text that meet in one attention; the last makes no text."""
    return randomised(
        SD3Transformer2DModel(
            sample_size=SIZE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            joint_attention_dim=CAPTION,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=POOLED,
            pos_embed_max_size=SIZE,
            **config,
        )
    )


def sd35() -> nn.Module:
    """The same, with an attention of the image alone beside the joint one in the first two blocks."""
    return sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")


def flux(single_layers: int = 2, **config: Any) -> nn.Module:
    """Three blocks of image and text, then two of both in a row whose attention and MLP leave by one projection."""
    return randomised(
        FluxTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_single_layers=single_layers,
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            joint_attention_dim=CAPTION,
            pooled_projection_dim=POOLED,
            axes_dims_rope=(4, 4, 4),
            **{"num_layers": 3, "guidance_embeds": True, **config},
        )
    )


def latte(frames: int = 3) -> nn.Module:
    """Two blocks over the places of a frame and two over the frames of a place, in turn."""
    return randomised(
        LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS,
            num_layers=2,
            sample_size=SIZE,
            patch_size=2,
            cross_attention_dim=WIDTH,
            caption_channels=CAPTION,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            attention_bias=True,
            activation_fn="gelu-approximate",
            video_length=frames,
        )
    )


def unet(**config: Any) -> nn.Module:
    """Three stages down and up, as in Stable Diffusion 1.5: attention in the first two, none in the last."""
    return randomised(
        UNet2DConditionModel(
            **{
                "sample_size": SIZE,
                "in_channels": CHANNELS,
                "out_channels": CHANNELS,
                "block_out_channels": (8, 16, 16),
                "layers_per_block": 2,
                "norm_num_groups": 4,
                "cross_attention_dim": CAPTION,
                "attention_head_dim": 2,
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                **config,
            }
        )
    )


def unet_xl(**config: Any) -> nn.Module:
    """As in Stable Diffusion XL: no attention in the first stage, several transformer blocks in a row in the others.

    It is told the size of the picture and the whole text's embedding.
    """
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=POOLED + 6 * 2,
        **config,
    )


def unet_small() -> nn.Module:
    return unet(layers_per_block=1)


def unet_xl_small() -> nn.Module:
    return unet_xl(layers_per_block=1)


both_models = pytest.mark.parametrize("build", [dit, pixart])
every_transformer = pytest.mark.parametrize("build", [dit, pixart, sd3, sd35, flux])
both_unets = pytest.mark.parametrize("build", [unet, unet_xl])
every_model = pytest.mark.parametrize("build", [dit, pixart, sd3, sd35, flux, unet_small, unet_xl_small])


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value, so that no gate is closed and every block matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@cache
def anatomy_of(build: Build) -> Anatomy:
    model = build()
    return survey(model, Inputs((), arguments(model)))


def scheduled(build: Build, *rules: Rule, **made_for: Any) -> Schedule:
    """Return a schedule of a plan; without rules it computes everything."""
    plan = Plan(len(rules[0].steps) if rules else STEPS, rules)
    return Schedule("test", {}, anatomy_of(build), Target(**made_for), plan.steps, plan)


def adaptive(build: Build, threshold: float, steps: int = STEPS, **settings: Any) -> Schedule:
    """Return a schedule of TeaCache's policy that adds up the changes as they are measured."""
    if anatomy_of(build).links:
        pytest.skip("a policy skips a row of blocks, which a U-Net does not have")
    policy = TeaCachePolicy(threshold, coefficients=(1.0, 0.0), input_range=(0.0, 100.0), **settings)
    return Schedule("teacache", {}, anatomy_of(build), Target(), steps, policy=policy)


def first_block(build: Build, threshold: float, steps: int = STEPS, **settings: Any) -> Schedule:
    """Return a schedule of FirstBlockCache's policy."""
    if anatomy_of(build).links:
        pytest.skip("a policy skips a row of blocks, which a U-Net does not have")
    policy = FirstBlockPolicy(threshold, **settings)
    return Schedule("first-block", {}, anatomy_of(build), Target(), steps, policy=policy)


def arguments(model: nn.Module, *, batch: int = BATCH, seed: int = 0, timestep: int = 500) -> dict[str, Any]:
    """Return what a call of a model takes."""
    generator = torch.Generator().manual_seed(seed)
    dtype: Any = model.dtype  # what it computes in, also where its weights are held in another

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if isinstance(model, UNet2DConditionModel):
        given: dict[str, Any] = {
            "sample": noise(batch, CHANNELS, SIZE, SIZE),
            "timestep": time_of(model, timestep, batch),
            "encoder_hidden_states": noise(batch, TEXT_TOKENS, CAPTION),
        }
        if model.config["addition_embed_type"] == "text_time":
            sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * batch).to(dtype)
            given["added_cond_kwargs"] = {"text_embeds": noise(batch, POOLED), "time_ids": sizes}
        return given
    packed = isinstance(model, FluxTransformer2DModel)
    given = {
        "hidden_states": noise(batch, TOKENS, 4 * CHANNELS) if packed else noise(batch, CHANNELS, SIZE, SIZE),
        "timestep": time_of(model, timestep, batch),
    }
    if isinstance(model, DiTTransformer2DModel):
        return {**given, "class_labels": torch.arange(batch)}
    given["encoder_hidden_states"] = noise(batch, TEXT_TOKENS, CAPTION)
    if isinstance(model, PixArtTransformer2DModel):
        return {**given, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    given["pooled_projections"] = noise(batch, POOLED)
    if not packed:
        return given
    places = torch.cartesian_prod(torch.arange(1), torch.arange(SIZE // 2), torch.arange(SIZE // 2))
    return {
        **given,
        "img_ids": places.to(dtype),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3, dtype=dtype),
        "guidance": torch.full((batch,), 3.5, dtype=dtype),
    }


def time_of(model: nn.Module, timestep: int, batch: int = BATCH) -> Tensor:
    """Return a timestep as a model takes it: from 0 to 1000, or from 0 to 1."""
    if isinstance(model, FluxTransformer2DModel):
        return torch.full((batch,), timestep / 1000, dtype=model.dtype)
    return torch.full((batch,), timestep)


def block_of(model: nn.Module, build: Build, index: int) -> nn.Module:
    """Return one of a model's blocks."""
    return model.get_submodule(anatomy_of(build).blocks[index].module)


def some_blocks(build: Build) -> str:
    """Return a range of blocks that can be skipped: two, or of a U-Net those inside a skip connection but the first."""
    anatomy = anatomy_of(build)
    inside = map(anatomy.enclosed, range(1, len(anatomy.links)))
    start, stop = (1, 3) if not anatomy.links else next(x for x in inside if not anatomy.obstacle(*x, delta=True))
    return f"{start}-{stop - 1}"


def entrance(model: nn.Module, build: Build) -> nn.Module:
    """Return the module that runs first in the first branch: its input is the modulated one."""
    first = anatomy_of(build).blocks[0]
    return model.get_submodule(f"{first.module}.{first.sites[0].entrance}")


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first tensor among the arguments of a module's call."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


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
        given["timestep"] = time_of(model, 900 - 800 * step // steps, batch)
        out = predict(model, given)
        name = "sample" if "sample" in given else "hidden_states"
        latents = given[name]
        given[name] = latents - out[:, : latents.shape[1]] / steps  # the rest is a variance
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
    elif isinstance(transformer, SD3Transformer2DModel):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = StableDiffusion3Pipeline(transformer, scheduler, vae, None, None, None, None, None, None)
    elif isinstance(transformer, UNet2DConditionModel):
        ddim = DDIMScheduler(clip_sample=False, steps_offset=1)
        if transformer.config["addition_embed_type"] == "text_time":
            pipe = StableDiffusionXLPipeline(vae, None, None, None, None, transformer, ddim, add_watermarker=False)
        else:
            pipe = StableDiffusionPipeline(vae, None, None, transformer, ddim, None, None, None, False)
    elif isinstance(transformer, FluxTransformer2DModel):
        pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)
    else:
        pipe = PixArtAlphaPipeline(None, None, vae, transformer, DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, *, steps: int = STEPS, batch: int = 1, seed: int = 0, **options: Any) -> Tensor:
    """Sample from a pipeline, with guidance that doubles the batch where it is not an argument of the model.

    Returns its images, or its latents.
    """
    options = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed), **options}
    if isinstance(pipe, DiTPipeline):
        images = pipe(list(range(batch)), output_type="pt", **options).images
        return torch.as_tensor(images)  # older versions of diffusers return an array
    options |= {"height": SIZE, "width": SIZE, "output_type": "latent"}
    made = torch.Generator().manual_seed(1)
    dtype = (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).dtype
    text = torch.randn(2, batch, TEXT_TOKENS, CAPTION, generator=made).to(dtype)
    pooled = torch.randn(2, batch, POOLED, generator=made).to(dtype)
    options["prompt_embeds"] = text[0]
    if isinstance(pipe, StableDiffusionPipeline):
        options["negative_prompt_embeds"] = text[1]
    elif isinstance(pipe, PixArtAlphaPipeline):
        mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.long)
        options |= {
            "prompt_attention_mask": mask,
            "negative_prompt": None,
            "negative_prompt_embeds": text[1],
            "negative_prompt_attention_mask": mask,
            "use_resolution_binning": False,
        }
    else:
        options["pooled_prompt_embeds"] = pooled[0]
    if isinstance(pipe, (StableDiffusion3Pipeline, StableDiffusionXLPipeline)):
        options |= {"negative_prompt_embeds": text[1], "negative_pooled_prompt_embeds": pooled[1]}
    latents: Tensor = pipe(**options).images
    return latents
