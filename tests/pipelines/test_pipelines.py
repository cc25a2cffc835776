"""The laws of the runtime over diffusers' pipelines and samplers, against reuse that is written out by hand."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch

import dicache
from dicache import Cache, Schedule
from dicache.schedules import Plan, Rule, Target
from tests.pipelines.by_hand import ByHand
from tests.pipelines.samplers import NOISE, put, rounds
from tests.pipelines.table import PIPELINES, Sampled, anatomy_of

SAMPLERS: dict[str, tuple[str, ...]] = {
    "DiT": ("ddim", "dpm", "heun", "pndm"),
    "PixArtAlpha": (*NOISE, "pndm with Runge-Kutta steps"),
    "PixArtSigma": ("dpm", "euler", "heun"),
    "StableDiffusion3": ("flow-euler", "flow-heun"),
    "StableDiffusion3 that skips layers": ("flow-euler", "flow-heun"),
    "Flux": ("flow-euler",),
    "Flux with true guidance": ("flow-euler",),
    "CogVideoX": ("ddim of CogVideoX", "dpm of CogVideoX"),
    "Wan": ("flow-euler", "flow-heun", "flow-unipc"),
    "Wan of two": ("flow-euler", "flow-unipc"),
    "HunyuanVideo": ("flow-euler",),
    "LTX": ("flow-euler",),
    "Latte": ("ddim", "dpm", "heun", "kdpm2"),
    "Lumina2": ("flow-euler",),
    "Lumina2 that truncates guidance": ("flow-euler",),
    "QwenImage": ("flow-euler",),
    "Sana": ("flow-dpm", "flow-euler", "flow-heun"),
    "StableDiffusion": NOISE,
    "StableDiffusionXL": ("ddim", "heun", "pndm"),
}
COMBINED = [(name, sampler) for name, samplers in SAMPLERS.items() for sampler in samplers]
every_sampler = pytest.mark.parametrize(("name", "sampler"), COMBINED)


def has_rows_of_blocks(name: str) -> bool:
    """Whether blocks can be replaced in rows; what replaces a part of a U-Net is tested in `runtime/test_unets.py`."""
    return "unet" not in PIPELINES[name].models


def pipeline(name: str, sampler: str) -> Any:
    return put(PIPELINES[name].build(), sampler)


def letters_of(steps: int) -> str:
    return ("C.C.." * steps)[:steps]


def schedule(name: str, model: str, letters: str, *, whole: bool = False, context: str = "*") -> Schedule:
    action: Any = "skip" if whole else "reuse"
    plan = Plan(len(letters), (Rule(action, letters, context=context),) if "." in letters else ())
    return Schedule("test", {}, anatomy_of(name, model), Target(), len(letters), plan)


def applied(stack: ExitStack, pipe: Any, sampled: Sampled, **schedules: Schedule) -> dict[str, Cache]:
    """Apply a schedule to each model of a pipeline."""
    named = len(sampled.models) > 1
    return {
        model: stack.enter_context(dicache.apply(pipe, made, component=model if named else None))
        for model, made in schedules.items()
    }


@every_sampler
def test_a_schedule_that_computes_everything_changes_nothing_and_has_a_letter_for_each_step_of_each_pass(
    name: str, sampler: str
) -> None:
    sampled, steps = PIPELINES[name], rounds(sampler)
    want = sampled.sample(pipeline(name, sampler))
    pipe = pipeline(name, sampler)
    with ExitStack() as stack:
        made = {model: schedule(name, model, "C" * steps) for model in sampled.models}
        caches = applied(stack, pipe, sampled, **made)
        assert torch.equal(sampled.sample(pipe), want)
        for model, cache in caches.items():
            assert cache.stats.steps == sampled.letters(model, "C" * steps)
            assert cache.stats.calls == len(sampled.turns(model, steps))
    assert torch.equal(sampled.sample(pipe), want)


@pytest.mark.parametrize(
    ("name", "sampler", "whole"),
    [
        pytest.param(name, sampler, whole, id=f"{name}-{sampler}-{'blocks' if whole else 'branches'}")
        for name, sampler in COMBINED
        for whole in (False, True)
        if not whole or has_rows_of_blocks(name)
    ],
)
def test_a_schedule_that_reuses_gives_what_reuse_by_hand_gives_and_does_so_again(
    name: str, sampler: str, whole: bool
) -> None:
    sampled, steps = PIPELINES[name], rounds(sampler)
    letters = letters_of(steps)
    plain = pipeline(name, sampler)
    uncached = sampled.sample(plain)
    for model in sampled.models:
        turns = sampled.turns(model, steps)
        by_pass = {passed: letters for _, passed in turns}
        ByHand(getattr(plain, model), anatomy_of(name, model), by_pass, turns, whole=whole)
    want = sampled.sample(plain)
    assert not torch.equal(want, uncached)
    pipe = pipeline(name, sampler)
    with ExitStack() as stack:
        made = {model: schedule(name, model, letters, whole=whole) for model in sampled.models}
        caches = applied(stack, pipe, sampled, **made)
        for _ in range(2):
            assert torch.equal(sampled.sample(pipe), want)
            assert all(cache.stats.bytes_held == 0 for cache in caches.values())
        for cache in caches.values():
            assert set("".join(cache.stats.steps.values())) >= {"C", "."}
