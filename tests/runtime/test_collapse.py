"""Guidance that collapses: one pass is computed from some step on, and pipelines know nothing of it."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LatteTransformer3DModel,
    LCMScheduler,
)
from diffusers.pipelines.latte.pipeline_latte import LattePipeline
from torch import Tensor, nn

from dicache import Schedule, ScheduleError, apply
from dicache.anatomy import Anatomy, survey
from dicache.anatomy.inputs import Inputs
from dicache.calibrate.methods import planned_schedule
from dicache.calibrate.tgate import TGate
from dicache.schedules import Plan, Rule, Target
from tests.counting import macs
from tests.tiny import (
    CAPTION,
    CHANNELS,
    SIZE,
    TEXT_TOKENS,
    WIDTH,
    anatomy_of,
    arguments,
    dit,
    generate,
    pipeline_of,
    pixart,
    randomised,
    time_of,
)

GUIDANCE = 4.5
STEPS = 8
FRAMES = 3
# T-GATE's tables for 8 steps with the gate at 5, self-attention every 3 steps before it and every 2 behind it, warm-up
# 1: C computed, S also stored, A also stored as the mean of both passes, r the stored one.
CROSS = "CCCCArrr"
SELF = "CSrSArSr"
SETTINGS = TGate(gate=5, sp_interval=3, fi_interval=2, warm_up=1)


def tgate(anatomy: Anatomy, settings: TGate = SETTINGS, steps: int = STEPS) -> Schedule:
    return planned_schedule(settings, anatomy, Target(), steps)


class Reference:
    """T-GATE around the attention modules of a model, by its table and without dicache.

    Args:
        model: Whose attention it replaces.
        cross: A letter a step for cross-attention.
        own: The same for self-attention.
        mean: Whether what is stored at A is the mean over the halves of the batch.
    """

    def __init__(self, model: nn.Module, cross: str = CROSS, own: str = SELF, *, mean: bool) -> None:
        self.step, self.mean = 0, mean
        for name, module in model.named_modules():
            if name.endswith((".attn1", ".attn2")):
                module.forward = self.gated(module.forward, cross if name.endswith("2") else own)

    def gated(self, forward: Callable[..., Tensor], letters: str) -> Callable[..., Tensor]:
        stored: list[Tensor] = []

        def run(*args: Any, **kwargs: Any) -> Tensor:
            letter = letters[self.step]
            if letter == "r":
                return stored[-1]
            out = forward(*args, **kwargs)
            if letter == "A" and self.mean:
                first, second = out.chunk(2)
                stored.append((first + second) / 2)
            elif letter in "AS":
                stored.append(out)
            return out

        return run


def text_of(batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return the text that `tests.tiny.generate` gives: of the prompts, and of no prompt."""
    text = torch.randn(2, batch, TEXT_TOKENS, CAPTION, generator=torch.Generator().manual_seed(seed))
    return text[0], text[1]


def reference(
    pipe: Any,
    *,
    batch: int = 1,
    guidance: float = GUIDANCE,
    cross: str = CROSS,
    own: str = SELF,
    collapses: bool = True,
    per_prompt: int = 1,
    seed: int = 0,
) -> Tensor:
    """Sample from a PixArt or a Latte in a loop written out here: both passes up to the gate, then the unguided one."""
    guided = guidance > 1
    gated = Reference(pipe.transformer, cross, own, mean=guided and collapses)
    scheduler, latte = pipe.scheduler, isinstance(pipe, LattePipeline)
    scheduler.set_timesteps(len(cross))
    generator = torch.Generator().manual_seed(seed)
    shape = (CHANNELS, FRAMES, SIZE, SIZE) if latte else (CHANNELS, SIZE, SIZE)
    latents = torch.randn(batch * per_prompt, *shape, generator=generator) * scheduler.init_noise_sigma
    prompts, nothing = (part.repeat_interleave(per_prompt, dim=0) for part in text_of(batch))
    more = {} if latte else {"encoder_attention_mask": torch.ones(batch * per_prompt, TEXT_TOKENS)}
    if not latte:
        more["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    for step, t in enumerate(scheduler.timesteps):
        gated.step = step
        both = guided and (cross[step] != "r" or not collapses)
        text = torch.cat([nothing, prompts]) if both else nothing if guided else prompts
        x = scheduler.scale_model_input(torch.cat([latents] * 2) if both else latents, t)
        if not latte:
            more["encoder_attention_mask"] = torch.ones(len(x), TEXT_TOKENS)
        with torch.no_grad():
            out = pipe.transformer(x, encoder_hidden_states=text, timestep=t.expand(len(x)), **more).sample
        if both:
            uncond, cond = out.chunk(2)
            out = uncond + guidance * (cond - uncond)
        extra = {"generator": generator} if "Ancestral" in type(scheduler).__name__ else {}
        latents = scheduler.step(out.chunk(2, dim=1)[0], t, latents, return_dict=False, **extra)[0]
    return latents


def replayed(pipe: Any, schedule: Schedule | None, **options: Any) -> tuple[Tensor, Any]:
    with apply(pipe, schedule) if schedule else nullcontext() as cache:
        made = latte_video(pipe, **options) if isinstance(pipe, LattePipeline) else generate(pipe, **options)
        return made, cache and cache.stats


options = pytest.mark.parametrize("batch", [1, 2, 3])


@options
@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
def test_a_pipeline_that_knows_nothing_of_it_makes_what_the_methods_own_loop_makes(batch: int, guidance: float) -> None:
    want = reference(pipeline_of(pixart), batch=batch, guidance=guidance)
    schedule = tgate(anatomy_of(pixart))
    got, stats = replayed(pipeline_of(pixart), schedule, batch=batch, guidance_scale=guidance, steps=STEPS)
    assert torch.equal(got, want)
    uncached, _ = replayed(pipeline_of(pixart), None, batch=batch, guidance_scale=guidance, steps=STEPS)
    assert not torch.allclose(got, uncached, atol=1e-3)
    assert stats.collapsed_passes == (3 if guidance > 1 else 0)
    assert stats.macs_fraction == pytest.approx(schedule.macs_fraction(guided=guidance > 1))




def latte_video(pipe: Any, **options: Any) -> Tensor:
    raise NotImplementedError
