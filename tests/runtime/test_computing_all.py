"""Law 1: a plan that computes everything changes nothing, bit for bit."""

from collections import Counter

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler

from dicache import Schedule, apply
from dicache.runtime.apply import denoiser
from dicache.runtime.generation import Call
from dicache.schedules import Rule
from tests.counting import macs, operators
from tests.tiny import (
    Build,
    adaptive,
    anatomy_of,
    arguments,
    dit,
    every_model,
    first_block,
    generate,
    pipeline_of,
    pixart,
    predict,
    sample,
    scheduled,
    sd3,
    sd35,
)

ALL = ["no rules", "rules that never act", "threshold zero", "first block, threshold zero"]


def computing_all(build: Build, how: str, steps: int = 4) -> Schedule:
    if how == "threshold zero":
        return adaptive(build, threshold=0, steps=steps)
    if how == "first block, threshold zero":
        return first_block(build, threshold=0, steps=steps)
    return scheduled(build, Rule("reuse", "C" * steps), *([Rule("skip", "C" * steps)] if how != "no rules" else []))


@every_model
@pytest.mark.parametrize("how", ALL)
def test_a_bare_model_gives_the_same_outputs_at_all_steps(build: Build, how: str) -> None:
    model = build()
    want = sample(model)
    with apply(model, computing_all(build, how)) as cache:
        assert torch.equal(sample(model, cache), want)
        assert cache.stats.steps == {"0": "CCCC"}
        assert cache.stats.macs_fraction == cache.stats.planned_macs_fraction == 1


@every_model
@pytest.mark.parametrize("how", ALL)
def test_a_pipeline_gives_the_same_picture(build: Build, how: str) -> None:
    pipe = pipeline_of(build)
    want = generate(pipe)
    with apply(pipe, computing_all(build, how)) as cache:
        assert torch.equal(generate(pipe), want)
        assert torch.equal(generate(pipe), want)
    assert (cache.stats.generations, cache.stats.calls) == (2, 8)


@pytest.mark.parametrize("build", [dit, pixart, sd3, sd35])
def test_a_solver_that_calls_the_model_more_often_than_it_has_steps_gives_the_same_picture(build: Build) -> None:
    pipe = pipeline_of(build)
    pipe.scheduler = HeunDiscreteScheduler() if build in (dit, pixart) else FlowMatchHeunDiscreteScheduler()
    want = generate(pipe, steps=3)
    with apply(pipe, computing_all(build, "rules that never act", steps=5)) as cache:
        assert torch.equal(generate(pipe, steps=3), want)
        assert cache.stats.steps == {"0": "CCCCC"}


@every_model
def test_the_laws_would_show_a_difference_if_something_were_reused(build: Build) -> None:
    pipe = pipeline_of(build)
    want = generate(pipe)
    reusing = (scheduled(build, Rule("reuse", "C.CC", blocks="1")), adaptive(build, 9), first_block(build, 9))
    for schedule in reusing:
        with apply(pipe, schedule):
            assert not torch.equal(generate(pipe), want)


@every_model
def test_no_work_is_added_but_one_copy_of_what_tells_passes_apart(build: Build) -> None:
    model = build()
    given = arguments(model)
    want = operators(lambda: predict(model, given))
    with apply(model, computing_all(build, "rules that never act")) as cache:
        cache.begin_generation()
        cache.begin_step()
        copies = Counter({"clone": len(Call((), given, ()).conditions)})
        assert operators(lambda: predict(model, given)) == want + copies
        cache.begin_step()
        assert operators(lambda: predict(model, given)) == want
        cache.begin_step()
        assert macs(lambda: predict(model, given)) == anatomy_of(build).macs
    assert cache.stats.peak_bytes_held == 0


@every_model
def test_outside_its_sampling_loop_a_pipeline_calls_the_model_plainly(build: Build) -> None:
    pipe = pipeline_of(build)
    given = arguments(denoiser(pipe))
    want = predict(denoiser(pipe), given)
    with apply(pipe, scheduled(build, Rule("reuse", "C..."))) as cache:
        assert torch.equal(predict(denoiser(pipe), given), want)
        generate(pipe)
        assert torch.equal(predict(denoiser(pipe), given), want)
        assert cache.stats.calls == 4
