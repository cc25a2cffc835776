"""8-bit weights by torchao."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dicache import ScheduleError, apply
from dicache.anatomy.fingerprint import fingerprint
from dicache.schedules import Rule
from tests.features.laws import METHODS, every_method, schedule_of
from tests.features.test_adapters import on, surveyed
from tests.tiny import Build, anatomy_of, dit, flux, sample, scheduled, some_blocks

# Not among the packages of the environment: diffusers imports it wherever it is, and warns of what its builds lack.
sys.path.append(str(Path(sys.prefix) / "extra"))
torchao = pytest.importorskip("torchao.quantization")
quantize_ = torchao.quantize_
QUANTISED = [torchao.Int8WeightOnlyConfig(), torchao.Int8DynamicActivationInt8WeightConfig()]
every_quantisation = pytest.mark.parametrize("config", QUANTISED, ids=["weights", "weights and activations"])


@every_method
@every_quantisation
@pytest.mark.parametrize("build", [dit, flux])
def test_a_schedule_and_quantised_weights_work_together(build: Build, config: Any, method: str) -> None:
    model = build()
    single = on(build(), schedule_of(build, method))
    quantize_(model, config)
    plain = sample(model)
    assert torch.equal(on(model, scheduled(build)), plain)
    both = on(model, schedule_of(build, method))
    assert not torch.equal(both, plain)
    assert not torch.equal(both, single)
    if method in METHODS[:2]:  # the same steps; a policy may take a step for another by what rounding has changed
        assert (both - single).norm() < 0.1 * single.norm()
    assert torch.equal(sample(model), plain)


@every_quantisation
def test_quantised_after_applying_is_followed_at_the_next_generation(config: Any) -> None:
    first, model = dit(), dit()
    quantize_(first, config)
    want = on(first, schedule_of(dit, "reuse"))
    with apply(model, schedule_of(dit, "reuse")) as cache:
        sample(model, cache)
        quantize_(model, config)
        assert torch.equal(sample(model, cache), want)


@every_quantisation
def test_predicted_outputs_work_on_quantised_weights(config: Any) -> None:
    model = dit()
    quantize_(model, config)
    schedule = scheduled(dit, Rule("skip", "CC.C", blocks=some_blocks(dit), predictor="taylor", order=1))
    held = on(model, scheduled(dit, Rule("skip", "CC.C", blocks=some_blocks(dit))))
    taylor = on(model, schedule)
    assert taylor.isfinite().all()
    assert torch.equal(taylor[:2], held[:2])
    assert not torch.equal(taylor[2], held[2])


@every_quantisation
@pytest.mark.parametrize("build", [dit, flux])
def test_a_survey_of_quantised_weights_finds_and_counts_the_same(build: Build, config: Any) -> None:
    model = build()
    quantize_(model, config)
    assert surveyed(model) == anatomy_of(build)


@every_quantisation
def test_quantised_weights_have_a_fingerprint_of_their_own(config: Any) -> None:
    own = fingerprint(dit())
    models = [dit(), dit()]
    for model in models:
        quantize_(model, config)
    assert fingerprint(models[0]) == fingerprint(models[1]) != own
    apply(models[0], schedule_of(dit, "reuse", weights=fingerprint(models[1]))).detach()
    with pytest.raises(ScheduleError, match=f"made for weights {own}, found"):
        apply(models[0], schedule_of(dit, "reuse", weights=own))
