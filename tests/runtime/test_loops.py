"""Loops that leave passes out, begin in the middle, or run on a model that was changed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch import Tensor, nn

import dicache
from dicache import Schedule, ScheduleError
from dicache.anatomy import survey
from dicache.runtime import CacheError
from dicache.schedules import AdaCachePolicy, FirstBlockPolicy, Plan, Rule, Target, TeaCachePolicy
from dicache.schedules.policies import Policy
from tests.tiny import Build, arguments, dit, every_transformer, pipeline_of, predict, scheduled, time_of
from tests.toys import Chain, toy_inputs

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


def leaving_out(
    schedule: Schedule, chain: Chain, turns: list[tuple[int, ...]]
) -> tuple[list[Tensor], list[Tensor], str]:
    """Return the outputs of steps that leave out some blocks, with a schedule and without it, and a letter a step."""

    def run(step: int) -> Tensor:
        chain.left_out = turns[step]
        inputs = toy_inputs(seed=step, timestep=900 - 100 * step)
        with torch.no_grad():
            out: Tensor = chain(*inputs.args, **inputs.kwargs)
        return out

    plain, cached = [run(step) for step in range(len(turns))], []
    with dicache.apply(chain, schedule) as cache:
        cache.begin_generation()
        for step in range(len(turns)):
            cache.begin_step()
            cached.append(run(step))
        return cached, plain, cache.stats.steps["0"]


def of_a_plan(*rules: Rule) -> Schedule:
    steps = len(rules[0].steps)
    return Schedule("test", {}, survey(Chain(), toy_inputs()), Target(), steps, Plan(steps, rules))


@pytest.mark.parametrize(
    ("rule", "turns", "computed"),
    [
        (Rule("reuse", "C.C."), [(), (), (1,), ()], {0, 2, 3}),
        (Rule("reuse", "C.CC."), [(), (), (1,), (), ()], {0, 2, 3}),
        (Rule("reuse", "CCC.", predictor="taylor", order=1), [(), (1,), (), ()], {0, 1, 2, 3}),
        (Rule("skip", "CCC.", predictor="taylor", order=1), [(), (0,), (), ()], {0, 1, 2, 3}),
        (Rule("reuse", "C.C."), [(1,), (1,), (1,), (1,)], {0, 2}),
    ],
)
def test_what_was_not_kept_anew_because_its_block_was_left_out_is_computed(
    rule: Rule, turns: list[tuple[int, ...]], computed: set[int]
) -> None:
    cached, plain, _ = leaving_out(of_a_plan(rule), Chain(), turns)
    assert {step for step, (a, b) in enumerate(zip(cached, plain, strict=True)) if torch.equal(a, b)} == computed


@pytest.mark.parametrize("turns", [[(1,), ()], [(1,), (1,), ()]])
def test_a_block_that_is_called_for_the_first_time_where_its_output_is_to_be_reused_is_refused(
    turns: list[tuple[int, ...]],
) -> None:
    letters = "C" + "." * (len(turns) - 1)
    with pytest.raises(ScheduleError, match=r"output of site 1\.attn is to be reused, and none was kept.*rule"):
        leaving_out(of_a_plan(Rule("reuse", letters)), Chain(), turns)


TEA = TeaCachePolicy(9, coefficients=(1.0, 0.0), input_range=(0.0, 100.0), last_steps=0)
FIRST = FirstBlockPolicy(9)
ADA = AdaCachePolicy(((1e9, 4),), (0,), "block", last_steps=0)


def of_a_policy(policy: Policy, chain: Chain, steps: int) -> Schedule:
    return Schedule("test", {}, survey(chain, toy_inputs()), Target(), steps, policy=policy)


@pytest.mark.parametrize(
    ("policy", "turns", "letters"),
    [
        (replace(TEA, first_steps=2), [(), (2,), (), ()], "CCC."),
        (replace(FIRST, first_steps=2), [(), (2,), (), ()], "CCC."),
        (replace(TEA, first_steps=2), [(), (1,), (), ()], "CCC."),
        (TEA, [(), (0,), (), ()], "CCC."),
        (TEA, [(0,), (), (), ()], "CC.."),
        (FIRST, [(), (0,), (), ()], "CCC."),
        (FIRST, [(0,), (), (), ()], "CC.."),
        (ADA, [(), (), (), ()], "CC.."),
        (ADA, [(), (0,), (), (), ()], "CCCC."),
        (ADA, [(), (2,), (), (), ()], "CCCC."),
    ],
)
def test_a_policy_computes_where_a_block_that_it_needs_was_left_out_in_the_step_before(
    policy: Policy, turns: list[tuple[int, ...]], letters: str
) -> None:
    chain = Chain(between=1)
    cached, plain, done = leaving_out(of_a_policy(policy, chain, len(turns)), chain, turns)
    assert done == letters
    assert all(torch.equal(*outputs) == (letter == "C") for letter, *outputs in zip(done, cached, plain, strict=True))


@pytest.mark.parametrize(("policy", "start"), [(TEA, 1), (FIRST, 2), (ADA, 1)])
def test_a_policy_that_skips_blocks_of_which_the_first_is_left_out_is_refused(policy: Policy, start: int) -> None:
    chain = Chain(between=start)
    with pytest.raises(ScheduleError, match=f"blocks {start} to 2 are skipped by what they add.* at block {start}"):
        leaving_out(of_a_policy(policy, chain, 3), chain, [(), (), (start,)])


class OwnScheduler:
    """Halves the noise at each step, and calls what it is given by names of its own."""

    def __init__(self) -> None:
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.linspace(900, 100, steps)
        self.sigmas = torch.linspace(9, 1, steps)

    def step(self, noise: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return x - 0.5 * noise


class OwnPipeline:
    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.scheduler = transformer, OwnScheduler()

    def __call__(self, steps: int) -> Tensor:
        self.scheduler.set_timesteps(steps)
        given = arguments(self.transformer)
        x: Tensor = given["hidden_states"]
        for t in self.scheduler.timesteps:
            with torch.no_grad():
                noise = self.transformer(**{**given, "hidden_states": x, "timestep": t.expand(2)}).sample[:, :4]
            x = self.scheduler.step(noise, t, x)
        return x


def test_a_pipeline_of_ones_own_whose_scheduler_has_other_names_follows_its_schedule() -> None:
    pipe = OwnPipeline(dit())
    want = pipe(4)
    with dicache.apply(pipe, scheduled(dit, Rule("reuse", "CCCC"))) as cache:
        assert torch.equal(pipe(4), want)
        assert cache.stats.steps == {"0": "CCCC"}
    with dicache.apply(pipe, scheduled(dit, Rule("reuse", "C.C."))) as cache:
        assert not torch.equal(pipe(4), want)
        assert cache.stats.steps == {"0": "C.C."}
    assert torch.equal(pipe(4), want)
