"""Loops that leave passes out, begin in the middle, or run on a model that was changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch import Tensor

import dicache
from dicache.runtime import CacheError
from dicache.schedules import Rule
from tests.tiny import Build, arguments, dit, every_transformer, pipeline_of, predict, scheduled, time_of

STEPS = 6
EVERY_OTHER = Rule("reuse", "C.C.C.")


def two_passes(build: Build, cache_plan: Rule | None, left_out: set[tuple[int, int]]) -> list[Tensor]:
    """Return the outputs of two passes a step that differ in what they are conditioned on; some are left out."""
    model = build()
    given = [arguments(model, seed=seed) for seed in (0, 1)]
    for one in given:
        one["hidden_states"] = given[0]["hidden_states"]
    if "class_labels" in given[0]:
        given[1]["class_labels"] = given[1]["class_labels"] + 5
    cache = dicache.apply(model, scheduled(build, cache_plan)) if cache_plan else None
    if cache:
        cache.begin_generation()
    outputs = []
    for step in range(STEPS):
        if cache:
            cache.begin_step()
        for which, one in enumerate(given):
            if (step, which) not in left_out:
                outputs.append(predict(model, {**one, "timestep": time_of(model, 900 - 100 * step)}))
    return outputs


@every_transformer
@pytest.mark.parametrize("step", [1, 3, 5])
def test_the_second_pass_does_not_find_what_the_first_has_kept_when_that_one_is_left_out(
    build: Build, step: int
) -> None:
    whole = two_passes(build, EVERY_OTHER, set())
    part = two_passes(build, EVERY_OTHER, {(step, 0)})
    del whole[2 * step]
    # At this step and before it nothing has changed for the second pass.
    assert all(torch.equal(a, b) for a, b in zip(whole[: 2 * step + 1], part[: 2 * step + 1], strict=True))


@every_transformer
def test_a_pass_that_was_left_out_computes_when_it_comes_back(build: Build) -> None:
    plain = two_passes(build, None, {(2, 0)})
    cached = two_passes(build, EVERY_OTHER, {(2, 0)})
    # Of step 3 the first pass: its kept output is two steps old, and the plan would have made a new one at step 2.
    assert torch.equal(cached[5], plain[5])


class MiddleLoop:
    """A sampling loop that begins at a later timestep, as image-to-image pipelines do.

    Args:
        scheduler: What it samples with.
        start: The step that it begins with.
        told: What the model and the scheduler are told of a timestep.
    """

    def __init__(self, scheduler: Any, start: int, told: Callable[[Tensor], Any] = lambda t: t) -> None:
        self.pipe = pipeline_of(dit)
        self.pipe.scheduler = scheduler
        self.start, self.told = start, told

    def run(self) -> Tensor:
        scheduler, model = self.pipe.scheduler, self.pipe.transformer
        scheduler.set_timesteps(STEPS)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.start)
        given = arguments(model)
        for t in map(self.told, scheduler.timesteps[self.start :]):
            out = predict(model, {**given, "timestep": t.expand(2)})
            given["hidden_states"] = scheduler.step(out[:, :4], t, given["hidden_states"]).prev_sample
        latents: Tensor = given["hidden_states"]
        return latents


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, DDIMScheduler])  # the second has no begin_index
def test_a_loop_that_begins_in_the_middle_is_at_that_step_of_the_schedule(kind: Any) -> None:
    loop = MiddleLoop(kind(), 2)
    with dicache.apply(loop.pipe, scheduled(dit, Rule("reuse", "CCCC.C"))) as cache:
        for _ in range(2):
            loop.run()
            assert cache.stats.steps == {"0": "--CC.C"}


def test_a_loop_that_begins_at_a_timestep_that_is_repeated_is_at_that_step_of_the_schedule() -> None:
    for start in (1, 2):
        loop = MiddleLoop(PNDMScheduler(skip_prk_steps=True), start)
        rule = Rule("reuse", "CCCC.C.")
        with dicache.apply(loop.pipe, scheduled(dit, rule)) as cache:
            loop.run()
            assert loop.pipe.scheduler.timesteps[1] == loop.pipe.scheduler.timesteps[2]
            assert cache.stats.steps == {"0": "-" * start + "CCCC.C."[start:]}


@pytest.mark.parametrize("told", [Tensor.clone])
def test_a_loop_that_begins_in_the_middle_without_saying_so_is_refused(told: Callable[[Tensor], Any]) -> None:
    loop = MiddleLoop(DDIMScheduler(), 2, told)
    with (
        dicache.apply(loop.pipe, scheduled(dit, EVERY_OTHER)),
        pytest.raises(CacheError, match=r"ended a step at timestep 498, where step 0 of the schedule, at 830, was due"),
    ):
        loop.run()


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, DDIMScheduler])
def test_a_loop_that_ends_a_step_twice_is_refused(kind: Any) -> None:
    """As where several pictures are denoised with one scheduler in turns."""
    pipe = pipeline_of(dit)
    pipe.scheduler = kind()
    with dicache.apply(pipe, scheduled(dit, EVERY_OTHER)):
        pipe.scheduler.set_timesteps(STEPS)
        given, first = arguments(pipe.transformer), pipe.scheduler.timesteps[0]
        predict(pipe.transformer, {**given, "timestep": first.expand(2)})
        pipe.scheduler.step(given["hidden_states"], first, given["hidden_states"])
        with pytest.raises(CacheError, match=r"step at timestep \d+, where step 1 of the schedule, at \d+, was due"):
            pipe.scheduler.step(given["hidden_states"], first, given["hidden_states"])


def test_after_a_generation_the_blocks_are_plain() -> None:
    model = dit()
    block: Any = model.get_submodule("transformer_blocks.0")
    given = {
        "hidden_states": torch.ones(2, 16, 24),
        "timestep": torch.tensor([5, 5]),
        "class_labels": torch.tensor([1, 2]),
    }
    with torch.no_grad():
        want = block(**given)
        with dicache.apply(model, scheduled(dit, Rule("skip", "C.C."))) as cache:
            cache.begin_generation()
            for step in range(4):
                cache.begin_step()
                predict(model, arguments(model, timestep=900 - step))
            assert torch.equal(block(**given), want)
