"""Adaptive policies (law 10): decided inside the model's first branch, so that nothing runs twice."""

import pytest
import torch
from torch import Tensor, nn

from dicache import Schedule, apply
from dicache.anatomy import survey
from dicache.schedules import Target, TeaCachePolicy
from tests.counting import alike, macs, operators
from tests.tiny import (
    BATCH,
    STEPS,
    TOKENS,
    WIDTH,
    Build,
    adaptive,
    anatomy_of,
    arguments,
    both_models,
    denoise,
    generate,
    pipeline_of,
    predict,
    replay,
    sample,
)
from tests.toys import CHAINS, Chain, every_chain, toy_inputs


def head_macs(model: nn.Module, build: Build) -> int:
    """Return the work of a call that runs nothing of the body but what its first branch's input needs."""
    first = anatomy_of(build).blocks[0]
    body = sum(block.macs for block in anatomy_of(build).blocks)
    around = anatomy_of(build).macs - body
    return around + first.macs - sum(site.macs for site in first.sites)  # the first block's modulation still runs


@both_models
def test_a_skipped_step_runs_the_head_once_and_no_branch(build: Build) -> None:
    model = build()
    given = arguments(model)
    plain = operators(lambda: predict(model, given))
    with apply(model, adaptive(build, threshold=9)) as cache:
        replay(model, cache, [given])
        cache.begin_step()
        skipped = operators(lambda: predict(model, given))
        assert cache.stats.steps == {"0": "C."}
        cache.begin_step()
        assert macs(lambda: predict(model, given)) == head_macs(model, build)
        assert cache.stats.steps == {"0": "C.."}
    assert plain["convolution"] == skipped["convolution"] == 1  # the patches are embedded once
    assert skipped["native_layer_norm"] == 2 + 1  # the two of the first block and the last one
    assert not any("scaled_dot_product" in name for name in skipped)


@both_models
def test_a_computed_step_runs_everything_once(build: Build) -> None:
    model = build()
    given = arguments(model)
    with apply(model, adaptive(build, threshold=0)) as cache:
        replay(model, cache, [given])
        cache.begin_step()
        assert macs(lambda: predict(model, given)) == anatomy_of(build).macs


@both_models
def test_the_work_that_the_stats_tell_is_the_work_that_was_done(build: Build) -> None:
    model = build()
    anatomy = anatomy_of(build)
    with apply(model, adaptive(build, threshold=9)) as cache:
        done = macs(lambda: sample(model, cache))
        assert cache.stats.steps == {"0": "C..C"}
        assert cache.stats.macs * anatomy.macs == pytest.approx(done)
        assert (cache.stats.computed_sites, cache.stats.skipped_sites) == (2 * len(anatomy.sites),) * 2


@both_models
def test_equal_inputs_are_skipped_and_give_the_same_but_for_rounding(build: Build) -> None:
    model = build()
    given = arguments(model)
    want = predict(model, given)
    with apply(model, adaptive(build, threshold=1e-6)) as cache:
        outputs = replay(model, cache, [given] * STEPS)
        assert cache.stats.steps == {"0": "C..C"}
    assert torch.equal(outputs[0], want)
    assert alike(outputs[1], want)
    assert alike(outputs[2], want)
    assert torch.equal(outputs[3], want)


@every_chain
def test_equal_inputs_of_a_toy_are_skipped_and_give_the_same_but_for_rounding(chain: str) -> None:
    model, inputs = Chain(**CHAINS[chain]), toy_inputs()
    policy = TeaCachePolicy(0.1, coefficients=(1.0, 0.0), input_range=(0.0, 1.0))
    schedule = Schedule("teacache", {}, survey(model, inputs), Target(), STEPS, policy=policy)
    outputs = []
    with apply(model, schedule) as cache, torch.no_grad():
        cache.begin_generation()
        for _ in range(STEPS):
            cache.begin_step()
            outputs.append(model(*inputs.args, **inputs.kwargs))
        assert cache.stats.steps == {"0": "C..C"}
    with torch.no_grad():
        want = model(*inputs.args, **inputs.kwargs)
    for out in outputs:
        assert alike(out, want)


@both_models
def test_a_skip_adds_the_last_delta_of_the_whole_body(build: Build) -> None:
    model = build()
    entered: list[Tensor] = []
    left: list[Tensor] = []
    blocks = model.get_submodule("transformer_blocks")
    blocks.get_submodule("0").register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    last = str(len(anatomy_of(build).blocks) - 1)
    blocks.get_submodule(last).register_forward_hook(lambda *call: left.append(call[2]))
    with apply(model, adaptive(build, threshold=9)) as cache:
        sample(model, cache)
    assert torch.equal(left[1], entered[1] + (left[0] - entered[0]))
    assert torch.equal(left[2], entered[2] + (left[0] - entered[0]))


def signals(model: nn.Module) -> list[Tensor]:
    """Follow the modulated input of the first block."""
    seen: list[Tensor] = []
    attention = model.get_submodule("transformer_blocks.0.attn1")
    attention.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    return seen


@both_models
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.2, 0.3, 0.5, 1.0])
def test_the_decisions_are_those_of_the_policy_on_the_modulated_input(build: Build, threshold: float) -> None:
    model = build()
    seen = signals(model)
    schedule = adaptive(build, threshold, steps=8)
    policy = schedule.policy
    assert isinstance(policy, TeaCachePolicy)
    with apply(model, schedule) as cache:
        sample(model, cache, steps=8)

    letters, accumulated = "", 0.0
    for step, now in enumerate(seen):
        before = seen[step - 1] if step else None
        x = None if before is None else float((now - before).abs().mean() / before.abs().mean())
        compute, accumulated = policy.decide(step, 8, x, accumulated)
        letters += "C" if compute else "."
    assert cache.stats.steps == {"0": letters}


@both_models
def test_the_thresholds_of_these_tests_skip_some_steps_and_not_others(build: Build) -> None:
    model = build()
    with apply(model, adaptive(build, threshold=0.2, steps=8)) as cache:
        sample(model, cache, steps=8)
        assert 2 <= cache.stats.steps["0"].count(".") <= 4


@both_models
def test_first_and_last_steps_are_computed_whatever_the_threshold(build: Build) -> None:
    model = build()
    with apply(model, adaptive(build, threshold=99, steps=8, first_steps=3, last_steps=2)) as cache:
        sample(model, cache, steps=8)
        assert cache.stats.steps == {"0": "CCC...CC"}


@both_models
def test_a_signal_that_is_not_a_number_computes(build: Build) -> None:
    model = build()
    broken = arguments(model)
    broken["hidden_states"] = torch.full_like(broken["hidden_states"], torch.nan)
    with apply(model, adaptive(build, threshold=99)) as cache:
        replay(model, cache, [broken] * STEPS)
        assert cache.stats.steps == {"0": "CCCC"}


@both_models
def test_what_is_kept_is_one_input_one_delta_and_next_to_nothing(build: Build) -> None:
    model = build()
    tokens = BATCH * TOKENS * WIDTH * 4  # bytes of the stream
    sites = len(anatomy_of(build).blocks[0].sites)
    held = []
    with apply(model, adaptive(build, threshold=0.2, steps=8)) as cache:
        for _ in denoise(model, cache, steps=8):
            held.append(cache.stats.bytes_held)
    assert held[:-1] == [2 * tokens + 4 * sites] * 7  # a zero for each branch of the first block
    assert cache.stats.peak_bytes_held == held[0]


@both_models
def test_a_pipeline_decides_like_a_bare_model_and_keeps_nothing_afterwards(build: Build) -> None:
    pipe = pipeline_of(build)
    with apply(pipe, adaptive(build, threshold=99)) as cache:
        first = generate(pipe)
        assert cache.stats.steps == {"0": "C..C"}
        assert cache.stats.bytes_held == 0
        assert cache.stats.peak_bytes_held > 0
        assert torch.equal(generate(pipe), first)


@both_models
def test_a_bare_model_keeps_nothing_after_its_last_step(build: Build) -> None:
    model = build()
    with apply(model, adaptive(build, threshold=99)) as cache:
        sample(model, cache)
        assert cache.stats.bytes_held == 0
