"""The step clock and the axis of noise levels."""

import copy
import inspect
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from dicache.anatomy import StepClock
from dicache.anatomy.clock import noise_levels, timesteps


class Count:
    """Counts what a clock says."""

    def __init__(self) -> None:
        self.generations: list[int] = []
        self.steps = 0

    def watch(self, scheduler: Any) -> StepClock:
        return StepClock(scheduler, self.on_generation, self.on_step)

    def on_generation(self, scheduler: Any) -> None:
        self.generations.append(len(scheduler.timesteps))

    def on_step(self) -> None:
        self.steps += 1


def run(scheduler: Any, steps: int) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    x = torch.ones(1, 2, 2, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    return x


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        (DDIMScheduler, 5),
        (DPMSolverMultistepScheduler, 5),
        (FlowMatchEulerDiscreteScheduler, 5),
        (HeunDiscreteScheduler, 2 * 5 - 1),
        (FlowMatchHeunDiscreteScheduler, 2 * 5 - 1),
        (PNDMScheduler, 5 + 1),  # repeats its second timestep
    ],
)
def test_a_step_lies_between_two_calls_of_step_however_often_a_timestep_is_repeated(kind: Any, steps: int) -> None:
    scheduler = kind(skip_prk_steps=True) if kind is PNDMScheduler else kind()
    count = Count()
    count.watch(scheduler)
    run(scheduler, 5)
    assert count.generations == [steps]
    assert count.steps == steps
    run(scheduler, 5)
    assert count.generations == [steps, steps]
    assert count.steps == 2 * steps


def test_a_watched_scheduler_gives_what_an_unwatched_one_gives() -> None:
    watched = HeunDiscreteScheduler()
    Count().watch(watched)
    assert torch.equal(run(watched, 4), run(HeunDiscreteScheduler(), 4))


def test_a_step_that_fails_is_not_counted() -> None:
    scheduler, count = DDIMScheduler(), Count()
    count.watch(scheduler)
    x = torch.ones(1, 2, 2, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 1, x)  # before the timesteps are set
    assert count.steps == 0


def test_pipelines_still_see_which_arguments_the_methods_take() -> None:
    plain, watched = DPMSolverMultistepScheduler(), DPMSolverMultistepScheduler()
    Count().watch(watched)
    for name in ("set_timesteps", "step"):
        assert inspect.signature(getattr(watched, name)) == inspect.signature(getattr(plain, name))


def test_detach_gives_the_instance_its_own_methods_back() -> None:
    scheduler, count = DDIMScheduler(), Count()
    keys = set(scheduler.__dict__)
    clock = count.watch(scheduler)
    assert set(scheduler.__dict__) > keys
    clock.detach()
    assert set(scheduler.__dict__) == keys
    run(scheduler, 3)
    assert count.steps == 0


def test_detach_puts_back_a_method_that_the_instance_had() -> None:
    scheduler = DDIMScheduler()
    mine = scheduler.step = scheduler.step  # a bound method, kept on the instance
    Count().watch(scheduler).detach()
    assert scheduler.__dict__["step"] is mine


def test_two_clocks_on_one_scheduler_may_be_detached_in_either_order() -> None:
    scheduler, first, second = DDIMScheduler(), Count(), Count()
    keys = set(scheduler.__dict__)
    one, two = first.watch(scheduler), second.watch(scheduler)
    one.detach()
    run(scheduler, 3)
    assert (first.steps, second.steps) == (0, 3)
    two.detach()
    assert set(scheduler.__dict__) == keys


def test_another_scheduler_of_the_class_is_not_watched() -> None:
    count = Count()
    count.watch(DDIMScheduler())
    run(DDIMScheduler(), 3)
    assert count.steps == 0


def test_a_copied_scheduler_steps_itself_and_is_not_watched() -> None:
    scheduler, count = EulerDiscreteScheduler(), Count()
    count.watch(scheduler)
    scheduler.set_timesteps(4)
    copied = copy.deepcopy(scheduler)
    x = torch.ones(1, 2, 2, 2)
    for t in copied.timesteps[:2]:
        x = copied.step(x, t, x).prev_sample
    assert count.steps == 0
    assert copied.step_index == 2
    assert scheduler.step_index is None  # has not begun
    copied.set_timesteps(7)
    assert count.generations == [4]
    assert len(scheduler.timesteps) == 4


def test_a_timestep_is_found_also_behind_arguments_that_only_some_samplers_take() -> None:
    scheduler: Any = CogVideoXDPMScheduler()
    clock = Count().watch(scheduler)
    scheduler.set_timesteps(3)
    x = torch.ones(1, 2, 2, 2)
    for step, t in enumerate(scheduler.timesteps):
        scheduler.step(0.1 * x, None if step == 0 else x, t, scheduler.timesteps[step - 1], x)
        assert clock.timestep is t
        assert torch.equal(clock.model_output, 0.1 * x)


def test_a_timestep_has_its_place_by_where_it_lies_also_where_it_is_repeated() -> None:
    scheduler: Any = HeunDiscreteScheduler()
    clock = Count().watch(scheduler)
    scheduler.set_timesteps(3)
    assert [clock.place(t) for t in scheduler.timesteps] == [0, 1, 2, 3, 4]
    assert scheduler.timesteps[1] == scheduler.timesteps[2]
    assert [clock.place(t.expand(4)) for t in scheduler.timesteps[2:]] == [2, 3, 4]
    assert [clock.place(t[None, None]) for t in scheduler.timesteps] == [0, 1, 2, 3, 4]
    for other in (scheduler.timesteps, scheduler.timesteps[1:3], scheduler.timesteps[1].clone(), 999, None):
        assert clock.place(other) is None
    before = scheduler.timesteps
    scheduler.set_timesteps(3)
    assert clock.place(before[1]) is None


@pytest.mark.parametrize("steps", [2, 10, 50])
@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    ],
)
def test_the_noise_level_falls_from_step_to_step(kind: type, steps: int) -> None:
    scheduler: Any = kind()
    scheduler.set_timesteps(steps)
    levels = noise_levels(scheduler)
    assert len(levels) == steps
    assert all(np.isfinite(levels))
    assert all(later < earlier for earlier, later in pairwise(levels))


def test_the_noise_level_of_a_repeated_timestep_is_repeated() -> None:
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(4)
    levels = noise_levels(scheduler)
    assert len(levels) == 7
    assert levels[1] == levels[2]
    assert levels[3] == levels[4]
    assert all(later <= earlier for earlier, later in pairwise(levels))


def test_equal_parts_of_noise_and_signal_are_level_zero_in_every_convention() -> None:
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(sigmas=[0.9, 0.5, 0.1])
    assert noise_levels(flow)[1] == pytest.approx(0, abs=1e-6)
    assert noise_levels(flow)[0] == pytest.approx(np.log(9), abs=1e-5)
    assert noise_levels(flow)[2] == pytest.approx(-np.log(9), abs=1e-5)

    half = SimpleNamespace(timesteps=torch.tensor([1, 0]), alphas_cumprod=torch.tensor([0.9, 0.5]))
    assert noise_levels(half) == pytest.approx((0, np.log(1 / 3)))

    exploding = SimpleNamespace(timesteps=torch.tensor([1, 0]), sigmas=torch.tensor([1.0, 0.1, 0.0]), config=None)
    assert noise_levels(exploding) == pytest.approx((0, np.log(0.1)))


def test_two_samplers_agree_on_the_noise_level_of_a_timestep() -> None:
    one, other = DDIMScheduler(), DPMSolverMultistepScheduler()
    one.set_timesteps(10)
    other.set_timesteps(timesteps=list(map(int, timesteps(one)))[:-1])  # it wants to end above zero
    assert noise_levels(other) == pytest.approx(noise_levels(one)[:-1], abs=1e-3)


def test_a_scheduler_that_tells_nothing_of_its_noise_is_an_error() -> None:
    with pytest.raises(ValueError, match="SimpleNamespace tells neither sigmas nor alphas"):
        noise_levels(SimpleNamespace(timesteps=torch.tensor([1, 0])))


def test_timesteps_are_those_of_the_scheduler_as_plain_numbers() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    assert timesteps(scheduler) == (750.0, 500.0, 250.0, 0.0)
