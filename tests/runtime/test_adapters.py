"""Adapters take the place of modules between two generations: the next one is what it would be on a fresh cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

from dicache import ScheduleError, apply
from dicache.anatomy.fingerprint import fingerprint
from dicache.runtime.apply import denoiser
from tests.runtime.test_hazards import aborted_picture, every_method, fresh_picture, picture, schedule_of
from tests.tiny import Build, flux, generate, pipeline_of, sd3, unet


def loaded(model: Any) -> None:
    torch.manual_seed(0)
    modules = ["to_q", "to_out.0", "net.2", "proj_mlp", "proj_out", "conv1", "conv2"]
    model.add_adapter(LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    model.eval()


def scaled(model: Any) -> None:
    loaded(model)
    model.set_adapters(["default"], weights=[0.3])


def unloaded(model: Any) -> None:
    loaded(model)
    model.unload_lora()


@pytest.mark.parametrize("build", [flux, unet])  # of these it takes the place of modules that a schedule reuses
@every_method
@pytest.mark.parametrize("change", [loaded, scaled, unloaded])
def test_an_adapter_that_comes_between_two_generations_and_goes(
    build: Build, method: str, change: Callable[..., None]
) -> None:
    pipe, untouched = pipeline_of(build), pipeline_of(build)
    change(denoiser(untouched))
    with apply(pipe, schedule_of(build, method)) as cache, apply(untouched, schedule_of(build, method)) as other:
        aborted_picture(pipe)
        change(denoiser(pipe))
        assert torch.equal(generate(pipe), generate(untouched))
        assert cache.stats.steps == other.stats.steps
        if change is loaded:
            denoiser(pipe).unload_lora()  # type: ignore[operator]
            assert torch.equal(generate(pipe), fresh_picture(build, method))


def test_an_adapter_is_other_weights_than_those_that_a_schedule_states() -> None:
    pipe = pipeline_of(sd3)
    with apply(pipe, schedule_of(sd3, "FORA", weights=fingerprint(pipe.transformer))):
        picture(pipe)
        loaded(pipe.transformer)
        with pytest.raises(ScheduleError, match=r"weights \w+, found \w+\. The model was changed since"):
            generate(pipe)
        pipe.transformer.unload_lora()
        assert torch.equal(generate(pipe), fresh_picture(sd3, "FORA"))
