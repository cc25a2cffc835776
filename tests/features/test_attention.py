"""What changes how attentions and convolutions compute, or the autoencoder: their processors, backends and formats."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from dicache import apply
from dicache.runtime.apply import denoiser
from dicache.schedules import Rule
from tests.features.laws import Feature, either_order, every_method, holds, schedule_of
from tests.tiny import (
    CAPTION,
    STEPS,
    Build,
    arguments,
    dit,
    flux,
    generate,
    pipeline_of,
    predict,
    sample,
    scheduled,
    sd3,
    unet,
)


def other_processors(model: Any) -> None:
    model.set_attn_processor(AttnProcessor())


def fused(model: Any) -> None:
    model.fuse_qkv_projections()


@pytest.fixture(autouse=True)
def the_backend_of_before() -> Iterator[None]:
    """`set_attention_backend` sets that of all models."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def another_backend(model: Any) -> None:
    model.set_attention_backend("_native_math")


def channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@either_order
@every_method
@pytest.mark.parametrize(
    ("build", "feature"),
    [
        (unet, other_processors),
        (sd3, fused),
        (flux, fused),
        (flux, another_backend),
        (unet, channels_last),
        (dit, channels_last),
    ],
)
def test_a_schedule_gives_the_same_however_the_layers_compute(
    build: Build, feature: Feature, method: str, first: str
) -> None:
    holds(build, feature, method, first, exact=False)


def test_processors_may_change_in_the_middle_of_a_generation() -> None:
    model: Any = unet()
    given = arguments(model)
    with apply(model, scheduled(unet, Rule("reuse", "C.C."))) as cache:
        cache.begin_generation()
        for step in range(STEPS):
            model.set_attn_processor(AttnProcessor() if step % 2 else AttnProcessor2_0())
            cache.begin_step()
            predict(model, given)
        assert cache.stats.macs_fraction < 1


@pytest.mark.parametrize("method", ["reuse", "skip"])
@pytest.mark.parametrize("build", [dit, unet])
def test_a_sliced_and_tiled_autoencoder_is_none_of_its_business(build: Build, method: str) -> None:
    options: Any = {"output_type": "pt"} if build is unet else {}
    reference = pipeline_of(build)
    reference.vae.enable_slicing()
    reference.vae.enable_tiling()
    with apply(reference, schedule_of(build, method)) as cache:
        want = generate(reference, batch=2, **options)
        reused = cache.stats.macs_fraction
    pipe = pipeline_of(build)
    with apply(pipe, schedule_of(build, method)) as cache:
        whole = generate(pipe, batch=2, **options)
        pipe.vae.enable_slicing()
        pipe.vae.enable_tiling()
        assert torch.equal(generate(pipe, batch=2, **options), want)
        assert cache.stats.macs_fraction == pytest.approx(reused)
    assert reused < 1
    assert whole.shape == want.shape


# IP-Adapter

IMAGE = 12  # channels of an image's embedding
IMAGE_TOKENS = 4  # diffusers takes it for granted


def load_ip_adapter(model: Any) -> None:
    """Let the cross-attentions see tokens of an image as well, made from an embedding of it."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    weights: dict[str, torch.Tensor] = {}
    cross = [name for name in model.attn_processors if "attn2" in name]
    for index, name in enumerate(cross):
        width = model.get_submodule(name.removesuffix(".processor")).to_k.out_features
        weights |= {f"{2 * index + 1}.to_{x}_ip.weight": random(width, CAPTION) for x in "kv"}
    projection = {
        "proj.weight": random(IMAGE_TOKENS * CAPTION, IMAGE),
        "proj.bias": random(IMAGE_TOKENS * CAPTION),
        "norm.weight": random(CAPTION),
        "norm.bias": random(CAPTION),
    }
    model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    model.eval()


def with_image(model: nn.Module, cache: Any = None) -> torch.Tensor:
    """Call a model with an image at each step; return its outputs."""
    if cache is not None:
        cache.begin_generation()
    outputs = []
    for step in range(STEPS):
        if cache is not None:
            cache.begin_step()
        given = arguments(model, timestep=900 - 200 * step, seed=step)
        image = torch.randn(len(given["sample"]), 1, IMAGE, generator=torch.Generator().manual_seed(3))
        given["added_cond_kwargs"] = {"image_embeds": [image]}
        outputs.append(predict(model, given))
    return torch.stack(outputs)


@either_order
@pytest.mark.parametrize("method", ["reuse", "skip"])
def test_an_ip_adapter_may_come_before_or_after_the_schedule(method: str, first: str) -> None:
    reference = unet()
    load_ip_adapter(reference)
    plain = with_image(reference)
    with apply(reference, scheduled(unet)) as cache:
        assert torch.equal(with_image(reference, cache), plain)
    with apply(reference, schedule_of(unet, method)) as cache:
        want = with_image(reference, cache)
    assert not torch.equal(want, plain)

    model = unet()
    if first == "the feature first":
        load_ip_adapter(model)
    with apply(model, schedule_of(unet, method)) as cache:
        if first != "the feature first":
            sample(model, cache)
            load_ip_adapter(model)
        assert torch.equal(with_image(model, cache), want)
    assert torch.equal(with_image(model), plain)


def test_a_pipeline_keeps_its_components_own_settings() -> None:
    pipe = pipeline_of(unet)
    pipe.enable_attention_slicing()
    plain = generate(pipe)
    with apply(pipe, scheduled(unet)):
        assert torch.equal(generate(pipe), plain)
        pipe.disable_attention_slicing()
        generate(pipe)
    assert not vars(denoiser(pipe)).get("forward")
