"""A pipeline of which two models share the steps, as in Wan 2.2: each has a schedule of its own."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

import dicache
from dicache.anatomy import survey
from dicache.anatomy.inputs import capture_inputs
from dicache.runtime import CacheError
from dicache.schedules import Schedule, Target, TeaCachePolicy
from tests.tiny import first_tensor, randomised

STEPS = 10
TEXT = 8  # channels
NAMES = ("transformer", "transformer_2")


def model(seed: int) -> nn.Module:
    return randomised(
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=TEXT,
            freq_dim=8,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        seed,
    )


def pipeline() -> Any:
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=model(0),
        transformer_2=model(1),
        boundary_ratio=0.7,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 1, 5, TEXT, generator=generator)
    latents: Tensor = pipe(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=STEPS,
        **{"guidance_scale": 3.0, **options},
        generator=generator,
        output_type="latent",
    ).frames
    return latents


def schedule(pipe: Any, name: str, policy: TeaCachePolicy) -> Schedule:
    part = getattr(pipe, name)
    anatomy = survey(part, capture_inputs(part, lambda: generate(pipe)))
    return Schedule("teacache", {}, anatomy, Target(), STEPS, policy=policy)


def policies() -> dict[str, TeaCachePolicy]:
    """Return a polynomial for each: the changes as they are, and twice as much."""
    first = TeaCachePolicy(0.12, coefficients=(1.0, 0.0), input_range=(0.0, 9.0), last_steps=0)
    return {"transformer": first, "transformer_2": TeaCachePolicy(0.3, (2.0, 0.0), (0.0, 9.0))}


def follow(part: nn.Module) -> list[Tensor]:
    """Note the modulated input of the first block at each call."""
    seen: list[Tensor] = []
    part.get_submodule("blocks.0.attn1").register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(first_tensor(args, kwargs).clone()), with_kwargs=True
    )
    return seen


def by_the_rule(policy: TeaCachePolicy, seen: list[Tensor], first: int) -> str:
    """Return the letters of one guidance pass that is first called at step `first`."""
    letters, memory = "-" * first, policy.remember()
    for place, now in enumerate(seen):
        before = seen[place - 1] if place else None
        x = None if before is None else float((now - before).abs().mean() / before.abs().mean())
        letters += "C" if policy.decide(first + place, STEPS, x, memory) else "."
    return letters


def test_each_model_decides_by_its_own_polynomial_in_its_own_steps() -> None:
    pipe, given = pipeline(), policies()
    schedules = {name: schedule(pipe, name, given[name]) for name in NAMES}
    seen = {name: follow(getattr(pipe, name)) for name in NAMES}
    with (
        dicache.apply(pipe, schedules["transformer"], component="transformer") as high,
        dicache.apply(pipe, schedules["transformer_2"], component="transformer_2") as low,
    ):
        generate(pipe)
        steps = {"transformer": high.stats.steps, "transformer_2": low.stats.steps}
        again = generate(pipe)
        assert {"transformer": high.stats.steps, "transformer_2": low.stats.steps} == steps
    first = 0
    for name in NAMES:
        calls = seen[name][: len(seen[name]) // 2]  # of the first generation; two passes a step
        want = {passed: by_the_rule(given[name], calls[i::2], first) for i, passed in enumerate(("cond", "uncond"))}
        assert {passed: letters.ljust(len(want[passed]), "-") for passed, letters in steps[name].items()} == want
        assert all("." in letters and "C" in letters for letters in want.values())
        first += len(calls) // 2
    assert first == STEPS
    assert not torch.equal(again, generate(pipe))  # something was skipped


def test_computing_all_of_both_changes_nothing_and_leaves_no_trace() -> None:
    pipe = pipeline()
    want = generate(pipe)
    nothing = TeaCachePolicy(0.0, (1.0, 0.0), (0.0, 9.0))
    caches = [dicache.apply(pipe, schedule(pipe, name, nothing), component=name) for name in NAMES]
    assert torch.equal(generate(pipe), want)
    for cache in caches:  # the first that was applied goes first
        cache.detach()
        assert torch.equal(generate(pipe), want)
    assert not any("forward" in vars(part) for part in (*pipe.transformer.modules(), *pipe.transformer_2.modules()))
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (None, "two models that share its steps, transformer and transformer_2"),
        ("unet", "no model 'unet' that it calls at its steps; it has transformer, transformer_2"),
    ],
)
def test_which_model_a_schedule_is_for_must_be_said(component: str | None, message: str) -> None:
    pipe = pipeline()
    made: Callable[[], Schedule] = lambda: schedule(pipe, "transformer", policies()["transformer"])  # noqa: E731
    with pytest.raises(CacheError, match=message):
        dicache.apply(pipe, made(), component=component)


def test_the_second_model_has_a_guidance_of_its_own() -> None:
    pipe = pipeline()
    for name in NAMES:
        made = replace(schedule(pipe, name, policies()[name]), target=Target(guidance=3.0))
        with dicache.apply(pipe, made, component=name), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", dicache.CacheWarning)
            generate(pipe, guidance_scale_2=2.0)
        said = [str(each.message) for each in caught if "guidance" in str(each.message)]
        assert len(said) == (name == "transformer_2")
        assert all("guidance 3, found 2:" in each for each in said)
