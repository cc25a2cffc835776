"""Weights that are elsewhere until they are needed: accelerate's hooks and diffusers' groups."""

from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks.group_offloading import LazyPrefetchGroupOffloadingHook
from diffusers.hooks.hooks import HookRegistry
from torch import nn

from dicache import CacheError, ScheduleError, apply
from dicache.anatomy.fingerprint import fingerprint
from dicache.runtime.apply import denoiser
from dicache.schedules import Rule
from tests.counting import attributes
from tests.features.laws import Feature, either_order, every_method, holds, schedule_of
from tests.tiny import Build, arguments, flux, generate, pipeline_of, pixart, predict, sample, scheduled, unet

CPU = torch.device("cpu")


def offloaded(model: nn.Module) -> None:
    cpu_offload(model, execution_device=CPU)  # the weights go to the meta device


def dispatched(model: nn.Module) -> None:
    dispatch_model(model, {"": "cpu"}, force_hooks=True)


def by_leaves(model: Any) -> None:
    model.enable_group_offload(onload_device=CPU, offload_type="leaf_level")


def by_blocks(model: Any) -> None:
    model.enable_group_offload(onload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


@either_order
@every_method
@pytest.mark.parametrize(
    ("build", "feature"),
    [
        (pixart, offloaded),
        (flux, dispatched),
        (flux, by_leaves),
        (unet, by_leaves),
        (pixart, by_blocks),
    ],
)
def test_a_schedule_gives_the_same_on_an_offloaded_model(
    build: Build, feature: Feature, method: str, first: str
) -> None:
    holds(build, feature, method, first)


class Loads(ModelHook):  # type: ignore[misc]
    """Counts the calls in which a module's weights are needed."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@either_order
@pytest.mark.parametrize("method", ["reuse", "skip"])
def test_weights_of_what_is_reused_or_skipped_are_not_loaded(method: str, first: str) -> None:
    model, loads = pixart(), Counter[str]()
    schedule = schedule_of(pixart, method)

    def watched() -> dict[str, Loads]:
        hooks = {}
        for path, part in model.named_modules():
            if isinstance(part, nn.Linear):
                hooks[path] = Loads()
                add_hook_to_module(part, hooks[path])
        return hooks

    if first == "the feature first":
        hooks = watched()
    with apply(model, schedule) as cache:
        if first != "the feature first":
            hooks = watched()
        sample(model, cache)
    loads.update({path: hook.calls for path, hook in hooks.items()})
    middle = {path: calls for path, calls in loads.items() if path.startswith("transformer_blocks.1.")}
    assert len(middle) > 8
    assert set(middle.values()) == {2}
    assert loads["proj_out"] == 4


@either_order
@every_method
@pytest.mark.parametrize("build", [pixart, unet])
def test_a_pipeline_that_offloads_its_models_follows_the_schedule_in_every_generation(
    build: Build, method: str, first: str
) -> None:
    schedule = schedule_of(build, method)
    reference = pipeline_of(build)
    plain = generate(reference)
    with apply(reference, schedule):
        want = generate(reference)
    assert not torch.equal(plain, want)

    pipe = pipeline_of(build)
    if first == "the feature first":
        pipe.enable_model_cpu_offload(device="cpu")
    with apply(pipe, schedule) as cache:
        if first != "the feature first":
            pipe.enable_model_cpu_offload(device="cpu")
        for generation in range(1, 4):  # after each the pipeline takes its hooks off and puts them on again
            assert torch.equal(generate(pipe), want)
            assert cache.stats.calls == 4 * generation
        pipe.remove_all_hooks()
        assert torch.equal(generate(pipe), want)
        pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipe), plain)
    pipe.remove_all_hooks()
    assert torch.equal(generate(pipe), plain)


def test_a_hook_of_the_model_itself_that_was_there_before_comes_back() -> None:
    model = pixart()
    hook = Loads()
    add_hook_to_module(model, hook)
    before = attributes(model)
    with apply(model, schedule_of(pixart, "reuse")) as cache:
        sample(model, cache)
    assert attributes(model) == before
    assert hook.calls == 4


def test_a_hook_that_was_put_on_the_model_afterwards_outlives_the_schedule() -> None:
    model, hook = pixart(), Loads()
    plain = sample(model)
    with apply(model, schedule_of(pixart, "reuse")) as cache:
        add_hook_to_module(model, hook)
        sample(model, cache)
    assert hook.calls == 4
    assert torch.equal(sample(model), plain)
    assert hook.calls == 8
    remove_hook_from_module(model)
    assert torch.equal(sample(model), plain)
    assert hook.calls == 8
    with apply(model, schedule_of(pixart, "reuse")) as cache:
        assert not torch.equal(sample(model, cache), plain)


def test_a_hook_that_comes_while_a_generation_runs_is_refused_and_the_model_restored() -> None:
    model = pixart()
    plain = sample(model)
    block = model.get_submodule("transformer_blocks.1")
    cache = apply(model, scheduled(pixart, Rule("skip", "C..C", blocks="1-2")))
    with cache:
        cache.begin_generation()
        given = arguments(model)
        for step in range(3):
            cache.begin_step()
            if step == 2:
                add_hook_to_module(block, Loads())
            predict(model, given)
        cache.begin_step()
        with pytest.raises(CacheError, match=r"forward of transformer_blocks\.1 was replaced while a generation was"):
            predict(model, given)
    assert torch.equal(sample(model), plain)


def test_a_request_that_began_before_the_model_was_changed_is_refused() -> None:
    model = pixart()
    given = arguments(model)
    with apply(model, schedule_of(pixart, "reuse")) as cache:
        old, new = cache.request(), cache.request()
        with old:
            cache.begin_generation()
            cache.begin_step()
            predict(model, given)
        with new:
            cache.begin_generation()  # nothing is on the modules now
        by_leaves(model)
        with new:
            cache.begin_generation()
        with old:
            cache.begin_step()
            with pytest.raises(CacheError, match="was changed while a generation was running"):
                predict(model, given)


def test_the_fingerprint_of_offloaded_weights_is_that_of_the_weights() -> None:
    want = fingerprint(pixart())
    for feature in (offloaded, dispatched, by_leaves):
        model = pixart()
        feature(model)
        assert fingerprint(model) == want
    offloaded(model := pixart())
    apply(model, scheduled(pixart, weights=want)).detach()
    with pytest.raises(ScheduleError, match="made for weights 0123, found"):
        apply(model, scheduled(pixart, weights="0123"))


@pytest.mark.parametrize("method", ["skip", "teacache", "first-block"])
def test_groups_of_several_blocks_are_refused_where_the_block_that_loads_them_may_be_skipped(method: str) -> None:
    model: Any = pixart()
    model.enable_group_offload(onload_device=CPU, offload_type="block_level", num_blocks_per_group=2)
    with pytest.raises(CacheError, match=r"groups of several blocks.* use num_blocks_per_group=1 or"):
        apply(model, schedule_of(pixart, method))


def test_groups_of_several_blocks_are_fine_where_every_block_runs() -> None:
    def by_two(model: Any) -> None:
        model.enable_group_offload(onload_device=CPU, offload_type="block_level", num_blocks_per_group=2)

    holds(pixart, by_two, "reuse", "the feature first")


def test_groups_that_prefetch_are_refused_until_they_know_the_order_of_the_layers() -> None:
    model = pixart()
    by_leaves(model)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(LazyPrefetchGroupOffloadingHook(), "lazy_prefetch_group_offloading")
    with pytest.raises(CacheError, match=r"use_stream=True, .* call it once before dicache\.apply"):
        apply(model, schedule_of(pixart, "reuse"))
    want = predict(model, arguments(model))
    with apply(model, scheduled(pixart)) as cache:
        cache.begin_generation()
        cache.begin_step()
        assert torch.equal(predict(model, arguments(model)), want)


def test_a_model_that_was_exchanged_in_the_pipeline_is_refused() -> None:
    pipe = pipeline_of(pixart)
    with apply(pipe, schedule_of(pixart, "reuse")):
        generate(pipe)
        pipe.transformer = pixart()
        with pytest.raises(CacheError, match="transformer was replaced after the schedule was applied, by a PixArt"):
            generate(pipe)
    assert "forward" not in vars(denoiser(pipe))
