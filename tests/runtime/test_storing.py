"""What is kept may lie in fewer bits, or in main memory, until it is read."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dicache import apply
from dicache.runtime.stats import bytes_of
from dicache.runtime.storing import DTYPES, Store, Stored
from dicache.schedules import Rule
from tests.features.laws import METHODS, schedule_of
from tests.runtime.test_collapse import tgate
from tests.tiny import Build, anatomy_of, dit, every_model, flux, generate, pipeline_of, pixart, sample, scheduled

HALF = 2**-8  # what rounding to bfloat16 changes at most, of a number
BITS = {torch.float16: 10, torch.bfloat16: 7, torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}  # of their mantissas

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_method = pytest.mark.parametrize("method", METHODS)


@every_dtype
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e30])
def test_what_is_stored_comes_back_rounded_whatever_its_size(dtype: torch.dtype, own: torch.dtype, size: float) -> None:
    made = (size * torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))).to(own)
    made[0, 0] = 0  # a token of nothing
    found = Store(dtype).get(Store(dtype).put(made))
    assert found.dtype == own
    most = made.abs().float().amax(dim=-1, keepdim=True)
    assert ((found - made).abs().float() <= 2.0 ** -BITS[dtype] * most).all()
    if own.itemsize <= dtype.itemsize:
        assert torch.equal(found, made)


def test_all_tensors_of_an_output_are_stored_and_what_is_none_of_them_stays() -> None:
    made: dict[str, Any] = {"image": torch.randn(1, 2, 8), "pair": (torch.ones(3, 4), torch.tensor([1, 2]), None)}
    stored = Store(torch.bfloat16).put(made)
    found = Store(torch.bfloat16).get(stored)
    assert isinstance(stored, Stored)
    assert torch.equal(found["image"], made["image"].bfloat16().float())
    assert torch.equal(found["pair"][0], made["pair"][0])
    assert torch.equal(found["pair"][1], made["pair"][1])  # integers are not rounded
    assert found["pair"][2] is None
    assert Store(torch.bfloat16).get(Store(torch.bfloat16).put(None)) is None


def test_a_dtype_that_cannot_hold_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"store_dtype must be one of float16, .*, found torch\.int8"):
        apply(dit(), scheduled(dit), store_dtype=torch.int8)


@every_model
@every_method
def test_half_the_memory_gives_nearly_the_same(build: Build, method: str) -> None:
    model, schedule = build(), schedule_of(build, method)
    plain = sample(model)
    with apply(model, schedule) as cache:
        want, whole = sample(model, cache), cache.stats
    with apply(model, schedule, store_dtype=torch.bfloat16) as cache:
        found, stats = sample(model, cache), cache.stats
    assert stats.steps == whole.steps
    assert stats.bytes_held == whole.bytes_held == 0
    assert not torch.equal(found, want)
    assert (found - want).abs().max() < 0.1 * (want - plain).abs().max()
    if method == "reuse" and not anatomy_of(build).links:  # of a U-Net, several outputs may be one tensor
        assert stats.peak_bytes_held < 0.55 * whole.peak_bytes_held


@every_dtype
def test_forecasts_are_made_of_what_is_stored(dtype: torch.dtype) -> None:
    model, schedule = dit(), scheduled(dit, Rule("reuse", "CC.C.", predictor="taylor", order=1))
    with apply(model, schedule) as cache:
        want = sample(model, cache, steps=5)
    with apply(model, schedule, store_dtype=dtype) as cache:
        found = sample(model, cache, steps=5)
    assert 0 < (found - want).abs().max() < 2.0 ** -BITS[dtype] * want.abs().max()


def test_in_main_memory_nothing_is_rounded() -> None:
    model, schedule = dit(), schedule_of(dit, "reuse")
    with apply(model, schedule) as cache:
        want = sample(model, cache)
    with apply(model, schedule, store_on_cpu=True) as cache:
        assert torch.equal(sample(model, cache), want)


@every_dtype
def test_the_mean_of_both_passes_is_taken_of_what_they_made(dtype: torch.dtype) -> None:
    pipe, schedule = pipeline_of(pixart), tgate(anatomy_of(pixart))
    plain = generate(pipe, steps=schedule.steps)
    with apply(pipe, schedule):
        want = generate(pipe, steps=schedule.steps)
    with apply(pipe, schedule, store_dtype=dtype) as cache:
        found = generate(pipe, steps=schedule.steps)
        assert cache.stats.collapsed_passes == 3
    assert 0 < (found - want).abs().max() < (want - plain).abs().max()


@pytest.mark.parametrize(("build", "method"), [(dit, "reuse"), (dit, "teacache"), (flux, "reuse")])
def test_compiled_steps_read_what_is_stored(build: Build, method: str) -> None:
    model, schedule = build(), schedule_of(build, method)
    with apply(model, schedule, store_dtype=torch.float16) as cache:
        want, stats = sample(model, cache), cache.stats
    torch._dynamo.reset()
    with apply(model, schedule, store_dtype=torch.float16, compile={"backend": "eager"}) as cache:
        assert torch.equal(sample(model, cache), want)
        assert cache.stats.peak_bytes_held <= stats.peak_bytes_held


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_copies_to_main_memory_and_back_change_nothing(method: str) -> None:
    def on_gpu() -> Tensor:
        with apply(model, schedule, store_on_cpu=on_cpu) as cache:
            return sample(model, cache)

    model, schedule = dit().cuda(), schedule_of(dit, method)
    on_cpu = False
    want = on_gpu()
    on_cpu = True
    assert torch.equal(on_gpu(), want)


def test_what_is_stored_is_counted_in_its_own_size() -> None:
    stored = Store(torch.float8_e4m3fn).put(torch.randn(2, 4, 64))
    assert bytes_of(stored) == 2 * 4 * 64 + 2 * 4 * 4 + 4  # numbers, a scale a token, and a form
