"""`torch.compile` on a model with a schedule. The compiler's front end alone is what may miss a forward."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dicache import CacheError, Schedule, apply
from dicache.runtime.apply import denoiser
from dicache.schedules import Rule
from tests.features.laws import METHODS, schedule_of
from tests.tiny import Build, STEPS, arguments, flux, generate, pipeline_of, sample, scheduled, sd3, time_of, unet

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler warns of what it does not know


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
        given = arguments(model, seed=step) | {"timestep": time_of(model, 900 - 200 * step)}
        with torch.no_grad():
            made.append(call(**given).sample)
    return torch.stack(made)


@pytest.mark.parametrize(
    ("compiles", "method", "graphs"),
    [
        (whole, "reuse", 3),  # a graph for each distinct row: computed, computed and kept, reused
        (whole, "skip", 3),
        (whole, "first-block", None),
        (wrapped, "reuse", 3),
        (block_by_block, "reuse", None),
        (block_by_block, "skip", None),
    ],
)
def test_a_model_that_is_compiled_afterwards_follows_its_schedule(compiles: Any, method: str, graphs: Any) -> None:
    schedule = schedule_of(flux, method)
    model = flux()
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
        assert compiled == graphs if graphs else compiled > 0
        assert torch.equal(outputs(model, call, cache), want)
        if method in METHODS[:2]:
            assert counter.frame_count == compiled  # nothing is compiled again for the next generation
    assert torch.equal(outputs(model, call), plain)
