"""Loops that leave passes out, begin in the middle, or run on a model that was changed."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
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
    """A sampling loop that begins at a later timestep, as image-to-image pipelines do."""

    def __init__(self, scheduler: Any, start: int) -> None:
        self.pipe = pipeline_of(dit)
        self.pipe.scheduler = scheduler
        self.start = start

    def run(self) -> Tensor:
        scheduler, model = self.pipe.scheduler, self.pipe.transformer
        scheduler.set_timesteps(STEPS)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.start)
        given = arguments(model)
        for t in scheduler.timesteps[self.start :]:
            out = predict(model, {**given, "timestep": t.expand(2)})
            given["hidden_states"] = scheduler.step(out[:, :4], t, given["hidden_states"]).prev_sample
        latents: Tensor = given["hidden_states"]
        return latents


def test_a_loop_that_begins_in_the_middle_is_at_that_step_of_the_schedule() -> None:
    loop = MiddleLoop(DPMSolverMultistepScheduler(), 2)
    with dicache.apply(loop.pipe, scheduled(dit, Rule("reuse", "CCCC.C"))) as cache:
        loop.run()
        assert cache.stats.steps == {"0": "--CC.C"}


def test_a_loop_that_begins_in_the_middle_without_saying_so_is_refused() -> None:
    loop = MiddleLoop(DDIMScheduler(), 2)
    with (
        dicache.apply(loop.pipe, scheduled(dit, EVERY_OTHER)),
        pytest.raises(CacheError, match=r"began at timestep \d+, not at the first one, \d+"),
    ):
        loop.run()


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
