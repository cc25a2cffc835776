"""What is exported to diffusers runs in diffusers' own hooks, twice in a row, as it is replayed here."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import CacheContext, _set_cache_context

from dicache.calibrate.methods import planned_schedule
from dicache.calibrate.pab import Pab
from dicache.calibrate.taylorseer import TaylorSeer
from dicache.formats import export, find
from dicache.models.loading import load
from dicache.profiler.describing import survey_pipeline, target_of
from dicache.runtime import apply
from dicache.schedules import FirstBlockPolicy, Plan, Rule, Schedule
from tests.formats.running import SAMPLING, STEPS, farthest, generations

ROUNDING = 1e-5  # of a pixel, with Taylor expansions whose terms are added up in another order


@pytest.fixture(scope="module")
def digits() -> Any:
    with torch.no_grad():
        yield load("digits")


@pytest.fixture(scope="module")
def made_for(digits: Any) -> dict[str, Any]:
    anatomy, _, steps = survey_pipeline(digits, SAMPLING)
    return {"anatomy": anatomy, "target": target_of(digits, anatomy, SAMPLING), "steps": steps}


def exported(schedule: Schedule, name: str) -> dict[str, Any]:
    made = export(schedule, find(name))
    assert not made.losses.beyond
    kwargs: dict[str, Any] = json.loads(made.text)["kwargs"]
    return kwargs


@contextmanager
def hooked(model: Any, apply: Any, config: Any) -> Iterator[Any]:
    """Put diffusers' hooks onto a model that has no `enable_cache`, and yield what resets them."""
    modules = list(model.modules())
    apply(model, config)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.invalidate_child_registries_cache()

    def reset() -> None:
        registry.reset_stateful_hooks()
        _set_cache_context(model, CacheContext("batched"))

    try:
        yield reset
    finally:
        for module in modules:
            found = getattr(module, "_diffusers_hook", None)
            if found is not None:
                for name in list(found.hooks):
                    found.remove_hook(name, recurse=False)
        registry.invalidate_child_registries_cache()


def replayed(pipeline: Any, schedule: Schedule) -> tuple[Any, Any]:
    with apply(pipeline, schedule):
        return generations(pipeline)


@pytest.mark.parametrize("letters", ["C.C.CC..", "CC...C.C"])
def test_magcache_computes_the_steps_of_any_mask_and_makes_the_same_image(
    digits: Any, made_for: dict[str, Any], letters: str
) -> None:
    schedule = Schedule("drawn", {}, plan=Plan(STEPS, (Rule("skip", letters),)), **made_for)
    config = diffusers.MagCacheConfig(**exported(schedule, "diffusers-magcache"))
    with hooked(digits.transformer, diffusers.hooks.apply_mag_cache, config):
        images, steps = generations(digits)  # nothing is reset in between
    wanted = [i for i, letter in enumerate(letters) if letter == "C"]
    assert steps == [[wanted] * 6] * 2
    same, _ = replayed(digits, schedule)
    assert farthest(images, same) == 0


@pytest.mark.parametrize(("order", "limit"), [(0, 0.0), (1, ROUNDING), (2, ROUNDING)])
def test_taylorseer_computes_the_steps_of_the_plan_and_makes_the_same_image(
    digits: Any, made_for: dict[str, Any], order: int, limit: float
) -> None:
    method = TaylorSeer(3, order, 2, anchor="diffusers")
    schedule = planned_schedule(method, made_for["anatomy"], made_for["target"], STEPS)
    kwargs = exported(schedule, "diffusers-taylorseer")
    kwargs["taylor_factors_dtype"] = getattr(torch, kwargs["taylor_factors_dtype"])
    config = diffusers.TaylorSeerCacheConfig(**kwargs)
    with hooked(digits.transformer, diffusers.hooks.apply_taylorseer_cache, config) as reset:
        images, steps = generations(digits, before=reset)
    assert schedule.plan is not None
    assert steps == [[list(schedule.plan.computed_steps)] * 6] * 2
    same, _ = replayed(digits, schedule)
    assert farthest(images, same) <= limit


def test_broadcast_computes_attention_at_the_steps_of_the_plan_and_makes_the_same_image(
    digits: Any, made_for: dict[str, Any]
) -> None:
    schedule = Pab({"attn": 3}, (150, 900)).schedule(
        made_for["anatomy"], made_for["target"], STEPS, made_for["target"].timesteps
    )
    told: list[float] = []
    listening = digits.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(float(kwargs["timestep"].flatten()[0])), with_kwargs=True
    )
    kwargs = exported(schedule, "diffusers-pab")
    config = diffusers.PyramidAttentionBroadcastConfig(**kwargs, current_timestep_callback=lambda: told[-1])
    with hooked(digits.transformer, diffusers.apply_pyramid_attention_broadcast, config) as reset:
        images, steps = generations(digits, before=reset)
    listening.remove()
    attention = [i for i, letter in enumerate(schedule.table()["5.attn"]) if letter == "C"]
    assert len(attention) < STEPS
    assert steps == [[attention, list(range(STEPS))] * 3] * 2
    same, _ = replayed(digits, schedule)
    assert farthest(images, same) == 0


def test_first_block_decides_alike_and_makes_the_same_image(digits: Any, made_for: dict[str, Any]) -> None:
    schedule = Schedule("first-block", {}, policy=FirstBlockPolicy(0.3, at_threshold="reuse"), **made_for)
    config = diffusers.FirstBlockCacheConfig(**exported(schedule, "diffusers-first-block"))
    with hooked(digits.transformer, diffusers.hooks.apply_first_block_cache, config) as reset:
        images, steps = generations(digits, before=reset)
    same, wanted = replayed(digits, schedule)
    assert 0 < len(steps[0][2]) < STEPS
    assert steps == wanted
    assert farthest(images, same) == 0
