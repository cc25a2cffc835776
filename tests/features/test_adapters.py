"""Adapters: LoRA by peft."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from dicache import Schedule, ScheduleError, apply
from dicache.anatomy import Anatomy, survey
from dicache.anatomy.fingerprint import fingerprint
from dicache.anatomy.inputs import Inputs
from dicache.runtime.apply import denoiser
from dicache.schedules import Rule
from tests.features.laws import either_order, every_method, schedule_of
from tests.tiny import (
    Build,
    anatomy_of,
    arguments,
    flux,
    generate,
    pipeline_of,
    sample,
    scheduled,
    sd3,
    unet,
)

# Every matrix of the blocks: those inside attentions and feed-forwards, and those that a block applies itself.
MATRICES = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "proj_out", "proj_mlp", "ff.net.0.proj", "ff.net.2"]
RANK = 2

with_lora = pytest.mark.parametrize("build", [flux, unet])


def load_lora(model: Any) -> None:
    """Put an adapter with random values on a model."""
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MATRICES, init_lora_weights=False))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.named_parameters()):
        if "lora" in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    model.requires_grad_(False).eval()


def parts(anatomy: Anatomy) -> Iterator[tuple[Any, ...]]:
    """Go through what an anatomy says of where things are, and not of what they cost."""
    for block in anatomy.blocks:
        yield block.module, block.norms, block.middle, block.streams, block.returns
        yield from ((site.branch, site.module, site.inner) for site in block.sites)


def surveyed(model: nn.Module) -> Anatomy:
    return survey(model, Inputs((), arguments(model)))


@with_lora
def test_a_survey_finds_the_same_parts_with_an_adapter_as_without(build: Build) -> None:
    model = build()
    load_lora(model)
    found = surveyed(model)
    assert list(parts(found)) == list(parts(anatomy_of(build)))
    assert found.segments == anatomy_of(build).segments
    assert 1 < found.macs / anatomy_of(build).macs < 1.5


def on(model: nn.Module, schedule: Schedule) -> Tensor:
    with apply(model, schedule) as cache:
        return sample(model, cache)


@either_order
@every_method
@with_lora
def test_an_adapter_may_come_before_or_after_the_schedule(build: Build, method: str, first: str) -> None:
    adapted, schedule = build(), schedule_of(build, method)
    without = on(build(), schedule)
    load_lora(adapted)
    plain = sample(adapted)
    assert torch.equal(on(adapted, scheduled(build)), plain)
    want = on(adapted, schedule)
    assert not torch.equal(want, plain)
    assert not torch.equal(want, without)

    model: Any = build()
    if first == "the feature first":
        load_lora(model)
    with apply(model, schedule) as cache:
        if first != "the feature first":
            assert torch.equal(sample(model, cache), without)
            load_lora(model)
        assert torch.equal(sample(model, cache), want)
        model.disable_adapters()
        assert torch.equal(sample(model, cache), without)
        model.enable_adapters()
        model.set_adapters(["default"], [0.5])
        half = sample(model, cache)
        model.delete_adapters("default")
        assert torch.equal(sample(model, cache), without)
    assert not torch.equal(half, want)
    assert torch.equal(on(model, schedule), without)


def test_an_adapter_on_a_matrix_that_is_reused_itself_does_not_run() -> None:
    model = flux()
    block = "single_transformer_blocks.0"
    with apply(model, scheduled(flux, Rule("reuse", "CC.."))) as cache:
        load_lora(model)
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        for path in ("proj_out.lora_A", "proj_mlp.lora_B", "attn.to_q.lora_A"):
            model.get_submodule(f"{block}.{path}.default").register_forward_hook(count)
        sample(model, cache)
    assert calls == 3 * 2


@with_lora
def test_a_fused_adapter_is_the_model_with_other_weights(build: Build) -> None:
    fused, model = build(), build()
    schedule = schedule_of(build, "reuse")
    for each in (fused, model):
        load_lora(each)
    fused.fuse_lora()  # type: ignore[operator]
    want = on(fused, schedule)
    with apply(model, schedule) as cache:
        assert not torch.equal(sample(model, cache), want)
        model.fuse_lora()  # type: ignore[operator]
        assert torch.equal(sample(model, cache), want)


@with_lora
def test_an_adapter_changes_the_fingerprint_and_is_refused_where_the_schedule_is_bound_to_it(build: Build) -> None:
    model: Any = build()
    own = fingerprint(model)
    schedule = schedule_of(build, "reuse", weights=own)
    load_lora(model)
    assert fingerprint(model) != own
    with pytest.raises(ScheduleError, match=f"made for weights {own}, found"):
        apply(model, schedule)
    with apply(model, schedule, allow=("weights",)) as cache:
        sample(model, cache)
    model.delete_adapters("default")
    assert fingerprint(model) == own
    with apply(model, schedule) as cache:
        sample(model, cache)
        load_lora(model)
        with pytest.raises(ScheduleError, match="The model was changed since the schedule was applied"):
            sample(model, cache)
        model.delete_adapters("default")
        sample(model, cache)


def test_a_pipeline_may_load_and_unload_an_adapter_between_generations() -> None:
    pipe = pipeline_of(sd3)
    with apply(pipe, schedule_of(sd3, "reuse")) as cache:
        without = generate(pipe)
        load_lora(denoiser(pipe))
        with_adapter = generate(pipe)
        pipe.unload_lora_weights()
        assert not torch.equal(with_adapter, without)
        assert torch.equal(generate(pipe), without)
        assert cache.stats.generations == 3
