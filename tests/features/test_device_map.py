"""Models whose blocks lie on two devices, as accelerate puts them there for `device_map`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes
from torch import nn

from dicache import apply
from dicache.anatomy import survey
from dicache.anatomy.fingerprint import fingerprint
from dicache.anatomy.inputs import Inputs
from dicache.profiler import storage
from dicache.profiler.profiling import profile_pipeline
from dicache.schedules import AdaCachePolicy, Rule, Schedule, Target
from tests import devices
from tests.profiler.test_two_models import PROMPTS, SAMPLING
from tests.spreading import (
    POLICIES,
    ROUNDING,
    STEPS,
    Told,
    attempted,
    in_processes,
    laws,
    made,
    pipeline_of_one,
    plan_of,
    replayed,
)
from tests.tiny import anatomy_of, arguments, first_block, flux, sample, scheduled, some_blocks, unet

if not devices.AVAILABLE:
    pytest.skip("this PyTorch takes no devices written in Python", allow_module_level=True)

# Of two streams in two kinds of blocks, of one stream, whose first block is alone on its device, and others.
MODELS = ("flux", "sd3", "pixart", "krea2", "sana", "wan")
OBEYING = ("flux", "krea2", "sana")  # those of which all laws are tried


def over_two_devices(model: Any) -> None:
    """Put the first blocks of a model on one device and the others on the next, with what comes behind them."""
    whole = compute_module_sizes(model)[""]
    sizes = {0: int(0.7 * whole), 1: 2 * whole}
    places = infer_auto_device_map(model, max_memory=sizes, no_split_module_classes=model._no_split_modules)
    dispatch_model(model, {path: f"fake:{place}" for path, place in places.items()}, main_device="fake:0")
    assert {str(weight.device) for weight in model.parameters()} == {"fake:0", "fake:1"}


def schedules_of(name: str, model: nn.Module) -> dict[str, Schedule]:
    """Return a plan, and for a Flux all policies."""
    made_for = {"plan": plan_of(survey(model, made(name)[1]), fingerprint(model))}
    if name == "flux":
        made_for |= {key: of(flux, threshold, steps=STEPS) for key, (of, threshold) in POLICIES.items()}
        made_for["behind three"] = first_block(flux, 0.5, steps=STEPS, first=3)  # which end on the other device
        changes = AdaCachePolicy(((1.0, 2),), (1, 3, 4), "block")  # on either device
        made_for["adacache"] = Schedule("adacache", {}, anatomy_of(flux), Target(), STEPS, policy=changes)
    return made_for


def spread(name: str) -> Told:
    """Compare a model that is spread with the same one on one device."""
    model, inputs = made(name)
    anatomy, weights, schedules = survey(model, inputs), fingerprint(model), schedules_of(name, model)
    wanted = {key: replayed(model, schedule, inputs) for key, schedule in schedules.items()}
    over_two_devices(model)
    found = {key: replayed(model, schedule, inputs) for key, schedule in schedules.items()}
    return {
        "same": survey(model, inputs) == anatomy and fingerprint(model) == weights,
        "letters": {key: (letters, found[key][0]) for key, (letters, _) in wanted.items()},
        "errors": {key: float((found[key][1] - out).abs().max() / out.abs().max()) for key, (_, out) in wanted.items()},
        "laws": laws(model, inputs, anatomy) if name in OBEYING else {},
    }


def profiled(folder: Path) -> Told:
    for file in ("whole.h5", "spread.h5"):
        pipe = pipeline_of_one()
        if file == "spread.h5":
            over_two_devices(pipe.transformer)
        profile_pipeline(pipe, "wan", folder / file, PROMPTS, sampling=SAMPLING, progress=False)
    return {}


def spread_unet() -> Told:
    """Cut a U-Net behind its way down."""
    model: Any = unet()
    inputs = Inputs((), arguments(model))
    whole = survey(model, inputs)
    schedule = scheduled(unet, Rule("skip", "C.C.", blocks=some_blocks(unet)))
    want = sample(model, steps=1)
    with apply(model, schedule) as cache:
        wanted = sample(model, cache)
    below = ("mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out")
    places = {name: f"fake:{int(name in below)}" for name, _ in model.named_children()}
    dispatch_model(model, places, main_device="fake:0")
    with apply(model, schedule) as cache:
        found = sample(model, cache)
    same = survey(model, inputs) == whole
    return {
        "same": same,
        "errors": [float((found - wanted).abs().max()), float((sample(model, steps=1) - want).abs().max())],
    }


def work(_: int, folder: str) -> None:
    torch.set_num_threads(1)
    devices.begin()
    said = {name: attempted(lambda: spread(name)) for name in MODELS}  # noqa: B023
    said["unet"] = attempted(spread_unet)
    said["profile"] = attempted(lambda: profiled(Path(folder)))
    Path(folder, "said.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made_in = tmp_path_factory.mktemp("devices")
    in_processes(1, work, str(made_in))
    return made_in


@pytest.fixture
def said(folder: Path) -> Callable[[str], Told]:
    told = json.loads((folder / "said.json").read_text())

    def of(case: str) -> Told:
        assert "failed" not in told[case], told[case]["failed"]
        found: Told = told[case]
        return found

    return of


@pytest.mark.parametrize("name", OBEYING)
def test_the_laws_hold_of_a_model_on_two_devices(said: Any, name: str) -> None:
    found = said(name)["laws"]
    assert set(found.values()) == {"kept"}, "\n".join(x for x in found.values() if x != "kept")


@pytest.mark.parametrize("name", MODELS)
def test_a_schedule_does_the_same_to_a_model_on_two_devices(said: Any, name: str) -> None:
    told = said(name)
    assert told["same"]
    for wanted, found in told["letters"].values():
        assert wanted == found
        assert {"C", "."} == set(wanted)
    assert all(error < ROUNDING for error in told["errors"].values()), told["errors"]


def test_a_u_net_on_two_devices_is_surveyed_and_follows_its_schedule(said: Callable[[str], Told]) -> None:
    told = said("unet")
    assert told["same"]
    assert max(told["errors"]) < ROUNDING


def test_a_profile_of_a_model_on_two_devices_is_that_of_the_model(said: Any, folder: Path) -> None:
    said("profile")
    one, two = storage.load(folder / "whole.h5"), storage.load(folder / "spread.h5")
    assert one.runs == two.runs
    for name, want in one.arrays.items():
        np.testing.assert_allclose(two.arrays[name], want, rtol=2e-3, atol=1e-5, err_msg=name)
