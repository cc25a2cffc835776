"""Uses that could only give a wrong picture are refused with what to do instead."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dicache import CacheError, Schedule, apply
from dicache.anatomy import survey
from dicache.schedules import Plan, Rule, Target
from tests.counting import attributes
from tests.tiny import (
    STEPS,
    Build,
    arguments,
    dit,
    every_transformer,
    generate,
    pipeline_of,
    predict,
    sample,
    scheduled,
)
from tests.toys import Chain, SharedBlock, toy_inputs


@every_transformer
def test_a_model_in_training_is_refused(build: Build) -> None:
    model = build().train()
    with pytest.raises(CacheError, match=r"is in training mode; call its eval\(\) first"):
        apply(model, scheduled(build))


@every_transformer
@pytest.mark.parametrize("part", ["", "transformer_blocks.1"])
def test_a_compiled_model_is_refused(build: Build, part: str) -> None:
    model = build()
    model.get_submodule(part).compile()  # nothing is compiled before the first call
    with pytest.raises(CacheError, match="the model is compiled already"):
        apply(model, scheduled(build))


@every_transformer
def test_a_second_schedule_on_one_model_is_refused_and_the_first_goes_on(build: Build) -> None:
    pipe, other = pipeline_of(build), pipeline_of(build)
    schedule = scheduled(build, Rule("reuse", "C.C."))
    with apply(pipe, schedule), apply(other, schedule):
        before = attributes(pipe.transformer)
        for target in (pipe, pipe.transformer):
            with pytest.raises(CacheError, match=r"a test schedule is already attached .* call its detach\(\) first"):
                apply(target, scheduled(build))
        assert attributes(pipe.transformer) == before
        assert torch.equal(generate(pipe), generate(other))


@every_transformer
def test_a_scheduler_that_was_replaced_after_applying_is_refused(build: Build) -> None:
    pipe = pipeline_of(build)
    with apply(pipe, scheduled(build, Rule("reuse", "C..."))):
        generate(pipe)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        with pytest.raises(CacheError, match="scheduler was replaced after the schedule was applied"):
            generate(pipe)


@every_transformer
def test_a_bare_model_must_be_told_its_generation_and_its_steps(build: Build) -> None:
    model = build()
    given = arguments(model)
    with apply(model, scheduled(build)) as cache:
        with pytest.raises(CacheError, match=r"call begin_generation\(\) before the sampling loop"):
            predict(model, given)
        with pytest.raises(CacheError, match=r"begin_step\(\) without a generation"):
            cache.begin_step()
        cache.begin_generation()
        with pytest.raises(CacheError, match=r"begin_step\(\) in each of its turns"):
            predict(model, given)


@every_transformer
def test_a_sampling_loop_longer_than_the_schedule_is_refused(build: Build) -> None:
    model = build()
    with apply(model, scheduled(build)) as cache:
        sample(model, cache)
        with pytest.raises(CacheError, match=f"the schedule has {STEPS} steps and all of them have begun"):
            cache.begin_step()
        with pytest.raises(CacheError, match="all of them have begun"):
            sample(model, cache, steps=STEPS + 1)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (SimpleNamespace(), "SimpleNamespace is neither a torch module nor a pipeline with a scheduler"),
        (SimpleNamespace(transformer=dit()), "neither a torch module nor a pipeline with a scheduler"),
        (
            SimpleNamespace(transformer=dit(), transformer_2=dit(), scheduler=None),
            "has two models that share its steps, transformer and transformer_2",
        ),
    ],
    ids=["nothing", "no scheduler", "two transformers"],
)
def test_what_is_neither_a_model_nor_a_pipeline_of_one_is_refused(target: Any, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        apply(target, scheduled(dit))


def test_settings_of_apply_that_do_not_exist_are_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="fit must be exact or resample, found 'stretch'"):
        apply(dit(), scheduled(dit), fit="stretch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allow names 'colour'; what may be allowed to differ is model, weights"):
        apply(dit(), scheduled(dit), allow={"colour"})


def test_a_module_that_is_called_less_often_than_it_was_is_refused() -> None:
    class Textless(SharedBlock):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            if not encoder_hidden_states.any():
                return hidden_states + self.ff(hidden_states), encoder_hidden_states
            return super().forward(hidden_states, encoder_hidden_states)

    model, inputs = Chain(Textless), toy_inputs()
    plan = Plan(2, (Rule("reuse", "C.", branch="mlp.context"),))
    schedule = Schedule("test", {}, survey(model, inputs), Target(), 2, plan)
    with apply(model, schedule) as cache, torch.no_grad():
        cache.begin_generation()
        cache.begin_step()
        model(*inputs.args, **inputs.kwargs)
        given = dict(inputs.kwargs, encoder_hidden_states=torch.zeros_like(inputs.kwargs["encoder_hidden_states"]))
        cache.begin_step()
        with pytest.raises(CacheError, match="was called another number of times in this guidance pass"):
            model(*inputs.args, **given)
