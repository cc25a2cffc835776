"""`torch.compile` on a model with a schedule. The compiler's front end alone is what may miss a forward."""

from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dicache import CacheError, apply
from dicache.runtime.apply import denoiser
from tests.features.laws import METHODS, schedule_of
from tests.tiny import STEPS, arguments, flux, generate, pipeline_of, sd3, time_of

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler warns of what it does not know


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small() -> nn.Module:
    """Two blocks of image and text and one of both in a row."""
    return flux(single_layers=1, num_layers=2)


def whole(model: Any, counter: Any) -> Any:
    model.compile(backend=counter)
    return model


def wrapped(model: Any, counter: Any) -> Any:
    return torch.compile(model, backend=counter)


def block_by_block(model: Any, counter: Any) -> Any:
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    return model


def outputs(model: nn.Module, call: Callable[..., Any], cache: Any = None) -> Tensor:
    """Call a model, or what it was compiled to, for one generation."""
    if cache is not None:
        cache.begin_generation()
    made = []
    for step in range(STEPS):
        if cache is not None:
            cache.begin_step()
        given = arguments(model) | {"timestep": time_of(model, 900 - 200 * step)}
        with torch.no_grad():
            made.append(call(**given).sample)
    return torch.stack(made)


@pytest.mark.parametrize(
    ("compiles", "method"),
    [(whole, "reuse"), (whole, "first-block"), (block_by_block, "reuse"), (block_by_block, "skip")],
)
def test_a_model_that_is_compiled_afterwards_follows_its_schedule(compiles: Any, method: str) -> None:
    schedule = schedule_of(small, method)
    model = small()
    plain = outputs(model, model)
    with apply(model, schedule) as cache:
        want, steps = outputs(model, model, cache), cache.stats.steps
    assert not torch.equal(want, plain)

    counter = CompileCounter()
    with apply(model, schedule) as cache:
        call = compiles(model, counter)
        assert torch.equal(outputs(model, call, cache), want)
        assert cache.stats.steps == steps
        compiled = counter.frame_count
        assert compiled > 0
        assert torch.equal(outputs(model, call, cache), want)
        if method in METHODS[:2]:
            assert counter.frame_count == compiled  # nothing is compiled again for the next generation
    assert torch.equal(outputs(model, call), plain)


@pytest.mark.parametrize("compiles", [whole, wrapped, block_by_block])
def test_a_model_that_was_compiled_before_is_refused(compiles: Any) -> None:
    model = compiles(small(), CompileCounter())
    with pytest.raises(CacheError, match=r"the model is compiled already, .* apply it uncompiled, and compile afterw"):
        apply(model, schedule_of(small, "reuse"))


def test_a_pipelines_model_may_be_exchanged_for_its_compiled_self() -> None:
    pipe, schedule = pipeline_of(sd3), schedule_of(sd3, "skip")
    with apply(pipe, schedule):
        want = generate(pipe)
    counter = CompileCounter()
    with apply(pipe, schedule) as cache:
        pipe.transformer = torch.compile(denoiser(pipe), backend=counter)
        for _ in range(2):
            assert torch.equal(generate(pipe), want)
        assert cache.stats.macs_fraction < 1
        assert counter.frame_count > 0
        pipe.transformer = torch.compile(sd3(), backend=counter)
        with pytest.raises(CacheError, match="transformer was replaced after the schedule was applied, by a Optimized"):
            generate(pipe)


def test_one_graph_of_a_whole_model_is_refused_since_the_schedule_stands_between_its_calls() -> None:
    model = small()
    with apply(model, schedule_of(small, "reuse")) as cache:
        call = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="compile it without fullgraph=True, or block by block"):
            outputs(model, call, cache)


def test_a_schedule_that_compiles_follows_adapters() -> None:
    model, schedule, counter = small(), schedule_of(small, "reuse"), CompileCounter()
    with apply(model, schedule, compile={"backend": counter}) as cache:
        bare = outputs(model, model, cache)
        compiled = counter.frame_count
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))  # type: ignore[operator]
        adapted = outputs(model, model, cache)
        assert counter.frame_count == 2 * compiled
        assert not torch.equal(adapted, bare)
    with apply(model, schedule) as cache:
        assert torch.equal(outputs(model, model, cache), adapted)


def test_a_schedule_that_compiles_refuses_offloading() -> None:
    model = accelerate.cpu_offload(sd3(), execution_device="cpu")
    with (
        apply(model, schedule_of(sd3, "reuse"), compile={"backend": "eager"}) as cache,
        pytest.raises(CacheError, match=r"could not be compiled to one graph: .* Take off what cannot be"),
    ):
        outputs(model, model, cache)
