"""Autocast, inference mode and gradients."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from dicache import CacheError, apply
from dicache.schedules import Rule
from tests.features.laws import every_method, schedule_of
from tests.tiny import STEPS, Build, arguments, dit, flux, generate, pipeline_of, sample, scheduled, some_blocks, unet

Mode = Callable[[], AbstractContextManager[Any]]


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def call(model: Any, given: dict[str, Any]) -> Tensor:
    """Call a model as it is, with gradients if they are on."""
    out: Tensor = model(**given).sample
    return out


def steps_in(build: Build, modes: list[Mode], cache_of: Any = None) -> list[Tensor]:
    """Call a model for one generation, each step in its own mode."""
    model = build()
    outputs = []
    with nullcontext() if cache_of is None else apply(model, cache_of) as cache:
        if cache is not None:
            cache.begin_generation()
        for step, mode in enumerate(modes):
            if cache is not None:
                cache.begin_step()
            with torch.no_grad(), mode():
                outputs.append(call(model, arguments(model, seed=step)).clone())
    return outputs


@every_method
@pytest.mark.parametrize("mode", [autocast, torch.inference_mode])
@pytest.mark.parametrize("build", [dit, flux, unet])
def test_a_schedule_works_in_every_mode(build: Build, mode: Mode, method: str) -> None:
    model = build()
    outside = sample(model)
    with mode():
        plain = sample(model)
        with apply(model, scheduled(build)) as cache:
            assert torch.equal(sample(model, cache), plain)
        with apply(model, schedule_of(build, method)) as cache:
            got = sample(model, cache)
            assert cache.stats.macs_fraction < 1
        assert not torch.equal(got, plain)
        assert torch.equal(sample(model), plain)
    with apply(model, schedule_of(build, method)) as cache:
        want = sample(model, cache)
    assert torch.equal(got, want) == (mode is torch.inference_mode)
    assert (got - want).norm() <= 1.5 * (plain - outside).norm()  # no more than what the mode does without a schedule


@pytest.mark.parametrize("action", ["reuse", "skip"])
@pytest.mark.parametrize("inside", [autocast, torch.inference_mode])
@pytest.mark.parametrize("turned", ["on", "off"])
@pytest.mark.parametrize("build", [dit, unet])
def test_what_was_kept_in_another_mode_is_not_used(build: Build, turned: str, inside: Mode, action: Any) -> None:
    blocks = some_blocks(build) if action == "skip" else "*"
    schedule = scheduled(build, Rule(action, "C...", blocks=blocks))
    modes: list[Mode] = [nullcontext, nullcontext, inside, inside]
    if turned == "off":
        modes.reverse()
    plain = steps_in(build, modes)
    cached = steps_in(build, modes, schedule)
    same = [torch.equal(one, other) for one, other in zip(plain, cached, strict=True)]
    assert same == [True, False, True, False]  # the third step starts afresh
    assert [x.dtype for x in plain] == [x.dtype for x in cached]


def test_a_pipeline_may_be_called_inside_autocast_and_outside_in_turns() -> None:
    pipe = pipeline_of(dit)
    with apply(pipe, scheduled(dit, Rule("reuse", "CC.."))):
        want = generate(pipe)
        with autocast():
            inside = generate(pipe)
        assert torch.equal(generate(pipe), want)
        with autocast():
            assert torch.equal(generate(pipe), inside)


@every_method
def test_a_call_with_gradients_is_refused_and_nothing_is_kept_of_it(method: str) -> None:
    model = dit()
    given = arguments(model)
    with apply(model, schedule_of(dit, method)) as cache:
        cache.begin_generation()
        cache.begin_step()
        with pytest.raises(CacheError, match=r"with gradients enabled.* call it inside torch\.no_grad\(\) or"):
            call(model, given)
        assert not cache.kept()
        model.requires_grad_(False)
        given["hidden_states"].requires_grad_()
        with pytest.raises(CacheError, match="with gradients enabled"):
            call(model, given)


@every_method
def test_where_nothing_asks_for_gradients_they_may_be_enabled(method: str) -> None:
    model = dit().requires_grad_(False)
    with apply(model, schedule_of(dit, method)) as cache:
        want = sample(model, cache)
    outputs = []
    with apply(model, schedule_of(dit, method)) as cache:
        cache.begin_generation()
        given = arguments(model)
        for step in range(STEPS):
            cache.begin_step()
            given["timestep"] = torch.full_like(given["timestep"], 900 - 800 * step // STEPS)
            outputs.append(call(model, given))
            given["hidden_states"] = given["hidden_states"] - outputs[-1][:, :4] / STEPS
            assert not outputs[-1].requires_grad
    assert torch.equal(torch.stack(outputs), want)
