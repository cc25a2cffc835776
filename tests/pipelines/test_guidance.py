"""How pipelines lay out their guidance: which pass a schedule acts in, and which calls are taken for passes of one."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPAGPipeline
from torch import Tensor, nn

import dicache
from dicache import Schedule
from dicache.anatomy import Anatomy, survey
from dicache.anatomy.inputs import capture_inputs
from dicache.schedules import Plan, Rule, Target
from tests.pipelines.by_hand import ByHand
from tests.pipelines.models import quiet
from tests.pipelines.table import PIPELINES, STEPS, Sampled, always, anatomy_of, call, of_noise, prompts
from tests.tiny import CHANNELS, SIZE, pipeline_of, unet

LETTERS = "C.C.."
# Pipelines of one model whose guidance is two passes: what its scale is called, and how several pictures of a prompt
# are asked for, where they repeat the embeddings that they are given.
SCALES = {
    "DiT": ("guidance_scale", None),
    "PixArtAlpha": ("guidance_scale", "num_images_per_prompt"),
    "PixArtSigma": ("guidance_scale", "num_images_per_prompt"),
    "StableDiffusion3": ("guidance_scale", None),
    "Flux with true guidance": ("true_cfg_scale", None),
    "CogVideoX": ("guidance_scale", None),
    "Wan": ("guidance_scale", None),
    "LTX": ("guidance_scale", None),
    "Latte": ("guidance_scale", "num_images_per_prompt"),
    "Lumina2": ("guidance_scale", None),
    "QwenImage": ("true_cfg_scale", None),
    "Sana": ("guidance_scale", "num_images_per_prompt"),
    "StableDiffusion": ("guidance_scale", "num_images_per_prompt"),
    "StableDiffusionXL": ("guidance_scale", "num_images_per_prompt"),
}
UNGUIDED = {"CogVideoX": "cond_uncond", "LTX": "cond_uncond"}  # the one pass, where it has a name that is not `cond`
SEQUENTIAL = ["Flux with true guidance", "Wan", "QwenImage", "Lumina2"]


def model_of(name: str, pipe: Any) -> tuple[str, nn.Module]:
    (part,) = PIPELINES[name].models
    return part, getattr(pipe, part)


def reusing(anatomy: Anatomy, letters: str = LETTERS, context: str = "*") -> Schedule:
    return Schedule("test", {}, anatomy, Target(), STEPS, Plan(STEPS, (Rule("reuse", letters, context=context),)))


def by_hand(
    name: str, letters: dict[str, str], turns: list[tuple[int, str]] | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return what a pipeline makes with reuse by hand, and without it."""
    sampled = PIPELINES[name]
    pipe = sampled.build()
    uncached = sampled.sample(pipe, **options)
    part, model = model_of(name, pipe)
    ByHand(model, anatomy_of(name, part), letters, turns or sampled.turns(part, STEPS))
    return sampled.sample(pipe, **options), uncached


def replayed(name: str, schedule: Schedule, **options: Any) -> tuple[Tensor, Any]:
    sampled = PIPELINES[name]
    pipe = sampled.build()
    with dicache.apply(pipe, schedule) as cache:
        first = sampled.sample(pipe, **options)
        assert torch.equal(sampled.sample(pipe, **options), first)
    return first, cache.stats


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("which", [0, 1])
def test_a_rule_for_one_pass_acts_in_it_alone(name: str, which: int) -> None:
    part, _ = model_of(name, PIPELINES[name].build())
    passes = PIPELINES[name].order(0, STEPS)
    want, uncached = by_hand(name, {passes[which]: LETTERS})
    got, stats = replayed(name, reusing(anatomy_of(name, part), context=passes[which]))
    assert torch.equal(got, want)
    assert not torch.equal(got, uncached)
    assert stats.steps == {passes[which]: LETTERS, passes[1 - which]: "C" * STEPS}


def test_a_rule_for_the_pass_that_skips_layers_acts_in_it_alone() -> None:
    name = "StableDiffusion3 that skips layers"
    want, uncached = by_hand(name, {"1": "CCC.C"})
    got, stats = replayed(name, reusing(anatomy_of(name, "transformer"), "CCC.C", context="1"))
    assert torch.equal(got, want)
    assert not torch.equal(got, uncached)
    assert stats.steps == {"0": "CCCCC", "1": "-CC."}


@pytest.mark.parametrize("layers", [[0], [2], [0, 2]])
def test_a_pass_that_leaves_out_a_block_at_which_a_range_begins_or_ends_computes(layers: list[int]) -> None:
    name = "StableDiffusion3 that skips layers"
    anatomy = anatomy_of(name, "transformer")

    def skipping(context: str) -> Schedule:
        plan = Plan(STEPS, (Rule("skip", LETTERS, context=context),))
        return Schedule("test", {}, anatomy, Target(), STEPS, plan)

    want, _ = replayed(name, skipping("0"), skip_guidance_layers=layers)
    got, stats = replayed(name, skipping("*"), skip_guidance_layers=layers)
    assert torch.equal(got, want)
    assert stats.steps == {"0": LETTERS, "1": "-CCC"}


@pytest.mark.parametrize("name", SCALES)
def test_without_guidance_there_is_one_pass(name: str) -> None:
    scale, _ = SCALES[name]
    part, _ = model_of(name, PIPELINES[name].build())
    named = any(not passed.isdigit() for passed in PIPELINES[name].order(0, STEPS))
    only = UNGUIDED.get(name, "cond") if named else "0"
    want, uncached = by_hand(name, {only: LETTERS}, [(step, only) for step in range(STEPS)], **{scale: 1.0})
    got, stats = replayed(name, reusing(anatomy_of(name, part)), **{scale: 1.0})
    assert torch.equal(got, want)
    assert not torch.equal(got, uncached)
    assert stats.steps == {only: LETTERS}


@pytest.mark.parametrize("name", SCALES)
def test_several_prompts_and_several_pictures_of_each(name: str) -> None:
    part, _ = model_of(name, PIPELINES[name].build())
    several = SCALES[name][1]
    options: dict[str, Any] = {"batch": 2, **({several: 3} if several else {})}
    letters = dict.fromkeys(PIPELINES[name].order(0, STEPS), LETTERS)
    want, uncached = by_hand(name, letters, **options)
    got, _ = replayed(name, reusing(anatomy_of(name, part)), **options)
    assert len(got) == (6 if several else 2)
    assert torch.equal(got, want)
    assert not torch.equal(got, uncached)


@pytest.mark.parametrize("name", ["PixArtAlpha", "StableDiffusion3", "StableDiffusion"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("gate", [1, 3])
def test_samples_of_equal_seeds_are_not_taken_for_two_passes_however_early_guidance_collapses(
    name: str, guidance: float, gate: int
) -> None:
    """A batch of two without guidance is called as a batch of one with guidance is."""
    noise = of_noise(CHANNELS, SIZE, SIZE, seed=5)[:1].expand(2, -1, -1, -1)
    options: dict[str, Any] = {"batch": 2, "latents": noise, "guidance_scale": guidance}
    part, _ = model_of(name, PIPELINES[name].build())
    schedule = Schedule("test", {}, anatomy_of(name, part), Target(), STEPS, Plan(STEPS, (), gate))
    got, stats = replayed(name, schedule, **options)
    pipe = PIPELINES[name].build()
    collapse_by_hand(model_of(name, pipe)[1], gate if guidance > 1 else STEPS)
    assert torch.equal(got, PIPELINES[name].sample(pipe, **options))
    assert stats.collapsed_passes == (2 * (STEPS - gate) if guidance > 1 else 0)  # of two generations


def collapse_by_hand(model: nn.Module, gate: int, calls_a_step: int = 1) -> None:
    """Make a plain model compute the first of two passes from a step on, and give that for both."""
    forward: Callable[..., Any] = model.forward
    calls: list[Any] = []

    def half(value: Any, of: int) -> Any:
        if isinstance(value, dict):
            return {name: half(part, of) for name, part in value.items()}
        return value[: of // 2] if isinstance(value, Tensor) and value.ndim and len(value) == of else value

    def run(*args: Any, **kwargs: Any) -> Any:
        step, place = divmod(len(calls), calls_a_step)
        batch = len(args[0] if args else kwargs["hidden_states"])
        calls.append(None)
        if step < gate:
            return forward(*args, **kwargs)
        if calls_a_step == 2:
            calls[-1] = forward(*args, **kwargs) if place == 0 else calls[-2]
            return calls[-1] if place == 0 else tuple(x.clone() for x in calls[-1])
        out = forward(*(half(value, batch) for value in args), **{k: half(v, batch) for k, v in kwargs.items()})
        if isinstance(out, tuple):
            return tuple(torch.cat([x, x]) for x in out)
        return type(out)(torch.cat([out.sample, out.sample]))

    model.forward = run


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_that_collapses_is_the_first_pass_alone(name: str, batch: int) -> None:
    sampled, gate = PIPELINES[name], 2
    passes = len(sampled.order(0, STEPS))
    pipe = sampled.build()
    uncached = sampled.sample(pipe, batch=batch)
    part, model = model_of(name, pipe)
    collapse_by_hand(model, gate, passes)
    want = sampled.sample(pipe, batch=batch)
    assert not torch.equal(want, uncached)
    schedule = Schedule("test", {}, anatomy_of(name, part), Target(), STEPS, Plan(STEPS, (), gate))
    got, stats = replayed(name, schedule, batch=batch)
    assert torch.equal(got, want)
    assert stats.collapsed_passes == 2 * (STEPS - gate)


@pytest.mark.parametrize("name", ["Flux", "HunyuanVideo"])
def test_guidance_that_a_model_reads_as_an_argument_has_nothing_to_collapse(name: str) -> None:
    uncached = PIPELINES[name].sample(PIPELINES[name].build(), batch=2)
    schedule = Schedule("test", {}, anatomy_of(name, "transformer"), Target(), STEPS, Plan(STEPS, (), 2))
    got, stats = replayed(name, schedule, batch=2)
    assert torch.equal(got, uncached)
    assert stats.collapsed_passes == 0


def edit() -> Any:
    """Return a pipeline that is guided by a text and by a picture: a batch of three passes."""
    parts = pipeline_of(lambda: unet(in_channels=2 * CHANNELS)).components
    return quiet(StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False))


def perturbed() -> Any:
    """Return a pipeline whose third pass has no self-attention in the middle."""
    parts = pipeline_of(unet).components
    return quiet(StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers="mid"))


def given_to_edit(batch: int) -> dict[str, Any]:
    return {**prompts(batch), "image": of_noise(batch, CHANNELS, SIZE, SIZE, seed=6)[0], "output_type": "latent"}


def given_to_perturbed(batch: int) -> dict[str, Any]:
    return {**prompts(batch), "height": SIZE, "width": SIZE, "output_type": "latent"}


THREE = {
    "edit": Sampled(edit, partial(call, given_to_edit), always("0"), {"unet": range}),
    "perturbed": Sampled(perturbed, partial(call, given_to_perturbed), always("0"), {"unet": range}),
}


@cache
def anatomy_of_three(name: str) -> Anatomy:
    pipe = THREE[name].build()
    return survey(pipe.unet, capture_inputs(pipe.unet, lambda: THREE[name].sample(pipe)))


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("batch", [1, 2])
def test_three_passes_in_a_batch_are_kept_together_and_do_not_collapse(name: str, batch: int) -> None:
    sampled, anatomy = THREE[name], anatomy_of_three(name)
    plain = sampled.build()
    uncached = sampled.sample(plain, batch=batch)
    ByHand(plain.unet, anatomy, {"0": LETTERS}, sampled.turns("unet", STEPS))
    want = sampled.sample(plain, batch=batch)
    assert not torch.equal(want, uncached)
    pipe = sampled.build()
    with dicache.apply(pipe, reusing(anatomy)) as cache:
        assert torch.equal(sampled.sample(pipe, batch=batch), want)
        assert cache.stats.steps == {"0": LETTERS}
    with dicache.apply(pipe, Schedule("test", {}, anatomy, Target(), STEPS, Plan(STEPS, (), 2))) as cache:
        assert torch.equal(sampled.sample(pipe, batch=batch), uncached)
        assert cache.stats.collapsed_passes == 0
