"""Devices, precision and memory; a GPU is played by a stand-in, since few machines that run the tests have one."""

from typing import Any

import pytest
import torch

from dicache.anatomy import memory
from dicache.models import devices
from dicache.models.devices import check_memory, device_of, dtype_of, placed
from dicache.models.loading import load
from dicache.models.names import ModelError
from tests.models.folders import folder

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_gpu_is_taken_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(None) == GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(None) == CPU


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="unknown device 'tpu'"):
        device_of("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"no device 'cuda': PyTorch .*; leave --device out, or pass cpu"):
        load("digits", device="cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("cuda:1").index == 1
    with pytest.raises(ModelError, match=r"no device 'cuda:2': PyTorch .* finds 2 on this machine"):
        device_of("cuda:2")


def test_precision_is_the_models_on_a_gpu_and_float32_on_a_cpu() -> None:
    assert dtype_of(None, GPU, "float16") == torch.float16
    assert dtype_of(None, CPU, "float16") == torch.float32
    assert dtype_of("bfloat16", CPU, "float16") == torch.bfloat16
    with pytest.raises(ModelError, match="unknown dtype 'fp8'; known: float32, float16, bfloat16"):
        dtype_of("fp8", CPU, "float16")


def test_weights_that_the_host_cannot_hold_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "host_memory", lambda: 16 * 10**9)
    check_memory("m", 4 * 10**9, torch.float32)
    message = r"m: its weights take 20\.0 GB in float32, but 16\.0 GB of memory are free; pass --dtype bfloat16 \(10\.0"
    with pytest.raises(ModelError, match=message):
        check_memory("m", 5 * 10**9, torch.float32)
    with pytest.raises(ModelError, match="use a machine with more, or a GPU"):
        check_memory("m", 9 * 10**9, torch.float32)
    monkeypatch.setattr(devices, "host_memory", lambda: 1000)
    with pytest.raises(ModelError, match=r"of memory are free"):
        load("digits", device="cpu")


def test_the_hosts_memory_is_known() -> None:
    assert 10**8 < memory.host_memory() < 10**14


@pytest.mark.parametrize(
    ("share", "way"),
    [(2.0, "to"), (0.9, "enable_model_cpu_offload"), (0.1, "enable_sequential_cpu_offload")],
)
def test_a_gpu_that_is_too_small_takes_a_part_at_a_time(
    monkeypatch: pytest.MonkeyPatch, share: float, way: str
) -> None:
    pipeline: Any = load(str(folder("sd3")), device="cpu")
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    needed = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    free = int(share * needed / devices.SHARE_OF_MEMORY)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    called: list[tuple[str, Any]] = []
    for name in ("to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"):

        def record(device: Any, name: str = name) -> Any:
            called.append((name, torch.device(device)))
            return pipeline

        monkeypatch.setattr(pipeline, name, record)
    assert placed(pipeline, GPU) is pipeline
    assert called == [(way, GPU)]
