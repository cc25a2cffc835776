"""Hooks of diffusers that change how, or whether, layers run."""

from typing import Any

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    apply_first_block_cache,
    apply_layer_skip,
    apply_layerwise_casting,
)
from torch import nn

from dicache import CacheError, apply
from dicache.schedules import Rule
from tests.features.laws import either_order, every_method, schedule_of
from tests.tiny import Build, dit, flux, pixart, sample, scheduled, sd3, unet

CONFIGS = [
    FirstBlockCacheConfig(0.1),
    PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: 500),
    FasterCacheConfig(current_timestep_callback=lambda: 500, is_guidance_distilled=True, tensor_format="BCHW"),
]


def cast(model: nn.Module) -> None:
    """Hold the weights in half precision and compute in single precision, as is done with 8 and 16 bits."""
    apply_layerwise_casting(model, torch.float16, torch.float32)


def rounded(build: Build) -> nn.Module:
    """Return a model with the weights that layerwise casting leaves."""
    model, other = build(), build()
    cast(model)
    other.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    return other


@either_order
@every_method
@pytest.mark.parametrize("build", [dit, unet])
def test_a_schedule_gives_on_cast_layers_what_it_gives_on_rounded_weights(
    build: Build, method: str, first: str
) -> None:
    schedule = schedule_of(build, method)
    reference = rounded(build)
    plain = sample(reference)
    with apply(reference, schedule) as cache:
        want, steps = sample(reference, cache), cache.stats.steps
    assert not torch.equal(plain, want)

    model = build()
    if first == "the feature first":
        cast(model)
    with apply(model, schedule) as cache:
        if first != "the feature first":
            cast(model)
        assert torch.equal(sample(model, cache), want)
        assert cache.stats.steps == steps
    assert torch.equal(sample(model), plain)
    with apply(model, scheduled(build)) as cache:
        assert torch.equal(sample(model, cache), plain)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_another_cache_on_the_model_is_refused_before_and_after(config: Any) -> None:
    model: Any = flux()
    plain = sample(model)
    model.enable_cache(config)
    message = rf"another cache enabled, diffusers' {type(config).__name__}, .* call its disable_cache\(\) first"
    with pytest.raises(CacheError, match=message):
        apply(model, schedule_of(flux, "reuse"))
    model.disable_cache()
    with apply(model, scheduled(flux)) as cache:
        assert torch.equal(sample(model, cache), plain)
        model.enable_cache(config)
        with pytest.raises(CacheError, match=message):
            sample(model, cache)
        model.disable_cache()
        assert torch.equal(sample(model, cache), plain)


def test_a_cache_that_was_put_on_by_its_hooks_alone_is_refused() -> None:
    model = flux()
    apply_first_block_cache(model, FirstBlockCacheConfig(0.1))
    with pytest.raises(CacheError, match=r"transformer_blocks\.0 has the hook fbc_leader_block_hook of diffusers"):
        apply(model, schedule_of(flux, "reuse"))


def test_guidance_that_skips_layers_is_refused() -> None:
    model = sd3()
    with apply(model, schedule_of(sd3, "reuse")) as cache:
        apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks"))
        with pytest.raises(CacheError, match=r"transformer_blocks\.1.* has the hook .*layer_skip.* of diffusers"):
            sample(model, cache)


@pytest.mark.parametrize("build", [pixart, unet])
def test_gradient_checkpointing_is_refused_before_and_after(build: Build) -> None:
    model: Any = build()
    model.enable_gradient_checkpointing()
    message = r"has gradient checkpointing enabled.* call its disable_gradient_checkpointing\(\) first"
    with pytest.raises(CacheError, match=message):
        apply(model, scheduled(build))
    model.disable_gradient_checkpointing()
    with apply(model, scheduled(build, Rule("reuse", "CC.."))) as cache:
        sample(model, cache)
        model.enable_gradient_checkpointing()
        with pytest.raises(CacheError, match=message):
            cache.begin_generation()
