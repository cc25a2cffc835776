"""Adaptive policies (law 10): decided inside the model's first branch, so that nothing runs twice."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dicache import Schedule, apply
from dicache.anatomy import survey
from dicache.schedules import Target, TeaCachePolicy
from dicache.schedules.policies import Negative
from tests.counting import alike, macs, operators
from tests.tiny import (
    BATCH,
    STEPS,
    TEXT_TOKENS,
    TOKENS,
    WIDTH,
    Build,
    adaptive,
    anatomy_of,
    arguments,
    denoise,
    entrance,
    every_transformer,
    first_tensor,
    flux,
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


@every_transformer
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
    assert plain["convolution"] == skipped["convolution"] == (build is not flux)  # the patches are embedded once
    assert skipped["native_layer_norm"] == len(anatomy_of(build).blocks[0].norms) + 1  # and the last one
    assert not any("scaled_dot_product" in name for name in skipped)


@every_transformer
def test_a_computed_step_runs_everything_once(build: Build) -> None:
    model = build()
    given = arguments(model)
    with apply(model, adaptive(build, threshold=0)) as cache:
        replay(model, cache, [given])
        cache.begin_step()
        assert macs(lambda: predict(model, given)) == anatomy_of(build).macs


@every_transformer
def test_the_work_that_the_stats_tell_is_the_work_that_was_done(build: Build) -> None:
    model = build()
    anatomy = anatomy_of(build)
    with apply(model, adaptive(build, threshold=9)) as cache:
        done = macs(lambda: sample(model, cache))
        assert cache.stats.steps == {"0": "C..C"}
        assert cache.stats.macs * anatomy.macs == pytest.approx(done)
        assert (cache.stats.computed_sites, cache.stats.skipped_sites) == (2 * len(anatomy.sites),) * 2


@every_transformer
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


def single_blocks() -> nn.Module:
    return flux(num_layers=0)


def test_a_decision_in_a_fused_branch_is_taken_before_any_of_its_modules_runs() -> None:
    model = single_blocks()
    given = arguments(model)
    with apply(model, adaptive(single_blocks, threshold=9)) as cache:
        replay(model, cache, [given])
        cache.begin_step()
        assert macs(lambda: predict(model, given)) == head_macs(model, single_blocks)
        assert cache.stats.steps == {"0": "C."}


@every_transformer
def test_a_skip_adds_the_last_delta_of_the_whole_body(build: Build) -> None:
    model = build()
    anatomy = anatomy_of(build)
    ends = []
    for start, stop in anatomy.segments:
        entered: list[Tensor] = []
        left: list[Tensor] = []
        first, last = (model.get_submodule(anatomy.blocks[index].module) for index in (start, stop - 1))
        first.register_forward_pre_hook(partial(follow_input, entered), with_kwargs=True)
        last.register_forward_hook(partial(follow_output, left))
        ends.append((entered, left))
    with apply(model, adaptive(build, threshold=9)) as cache:
        sample(model, cache)
    for entered, left in ends:
        assert torch.equal(left[1], entered[1] + (left[0] - entered[0]))
        assert torch.equal(left[2], entered[2] + (left[0] - entered[0]))


def follow_input(seen: list[Tensor], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the image tokens that enter a block."""
    seen.append(first_tensor(args, kwargs))


def follow_output(seen: list[Tensor], *call: Any) -> None:
    """Note the image tokens that leave a block, last where there are others."""
    seen.append(call[2][-1] if isinstance(call[2], tuple) else call[2])


def signals(model: nn.Module, build: Build) -> list[Tensor]:
    """Follow the modulated input of the first block."""
    seen: list[Tensor] = []
    entrance(model, build).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(first_tensor(args, kwargs).clone()), with_kwargs=True
    )
    return seen


@every_transformer
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.2, 0.3, 0.5, 1.0])
def test_the_decisions_are_those_of_the_policy_on_the_modulated_input(build: Build, threshold: float) -> None:
    model = build()
    seen = signals(model, build)
    schedule = adaptive(build, threshold, steps=8)
    policy = schedule.policy
    assert isinstance(policy, TeaCachePolicy)
    with apply(model, schedule) as cache:
        sample(model, cache, steps=8)

    letters, memory, distances = "", policy.remember(), []
    for step, now in enumerate(seen):
        before = seen[step - 1] if step else None
        x = None if before is None else float((now - before).abs().mean() / before.abs().mean())
        letters += "C" if policy.decide(step, 8, x, memory) else "."
        distances.append(memory.distance)
    assert cache.stats.steps == {"0": letters}
    assert cache.stats.distances == {"0": [None if d is None else pytest.approx(d, rel=1e-5) for d in distances]}


@every_transformer
def test_the_thresholds_of_these_tests_skip_some_steps_and_not_others(build: Build) -> None:
    model = build()
    with apply(model, adaptive(build, threshold=0.2, steps=8)) as cache:
        sample(model, cache, steps=8)
        assert 2 <= cache.stats.steps["0"].count(".") <= 4


@every_transformer
def test_first_and_last_steps_are_computed_whatever_the_threshold(build: Build) -> None:
    model = build()
    with apply(model, adaptive(build, threshold=99, steps=8, first_steps=3, last_steps=2)) as cache:
        sample(model, cache, steps=8)
        assert cache.stats.steps == {"0": "CCC...CC"}


@every_transformer
def test_a_signal_that_is_not_a_number_computes(build: Build) -> None:
    model = build()
    broken = arguments(model)
    broken["hidden_states"] = torch.full_like(broken["hidden_states"], torch.nan)
    with apply(model, adaptive(build, threshold=99)) as cache:
        replay(model, cache, [broken] * STEPS)
        assert cache.stats.steps == {"0": "CCCC"}


@every_transformer
def test_what_is_kept_is_one_input_one_delta_and_next_to_nothing(build: Build) -> None:
    model = build()
    anatomy = anatomy_of(build)
    token = BATCH * WIDTH * 4  # bytes
    text = 2 * TEXT_TOKENS if build is flux else 0  # in both segments; SD3's last block makes none
    delta = len(anatomy.segments) * TOKENS + text
    # A zero for each branch of the first block, and one more for the text of a joint attention.
    zeros = sum(1 + (site.branch == "joint_attn") for site in anatomy.blocks[0].sites)
    held = []
    with apply(model, adaptive(build, threshold=0.2, steps=8)) as cache:
        for _ in denoise(model, cache, steps=8):
            held.append(cache.stats.bytes_held)
    assert held[:-1] == [token * (TOKENS + delta) + 4 * zeros] * 7
    assert cache.stats.peak_bytes_held == held[0]


@every_transformer
def test_a_pipeline_decides_like_a_bare_model_and_keeps_nothing_afterwards(build: Build) -> None:
    pipe = pipeline_of(build)
    with apply(pipe, adaptive(build, threshold=99)) as cache:
        first = generate(pipe)
        assert list(cache.stats.steps.values()) == ["C..C"]
        assert cache.stats.bytes_held == 0
        assert cache.stats.peak_bytes_held > 0
        assert torch.equal(generate(pipe), first)


@every_transformer
def test_a_bare_model_keeps_nothing_after_its_last_step(build: Build) -> None:
    model = build()
    with apply(model, adaptive(build, threshold=99)) as cache:
        sample(model, cache)
        assert cache.stats.bytes_held == 0


@every_transformer
def test_what_a_negative_prediction_adds_is_up_to_the_policy(build: Build) -> None:
    letters = {}
    cases: list[tuple[float, Negative]] = [(1.0, "clamp"), (-1.0, "clamp"), (-1.0, "abs"), (-1.0, "reference")]
    for coefficient, negative in cases:
        schedule = adaptive(build, threshold=0.2, steps=8)
        assert isinstance(schedule.policy, TeaCachePolicy)
        policy = replace(schedule.policy, coefficients=(coefficient, 0.0), negative=negative)
        model = build()
        with apply(model, replace(schedule, policy=policy)) as cache:
            sample(model, cache, steps=8)
            letters[coefficient, negative] = cache.stats.steps["0"]
    assert letters[-1.0, "clamp"] == letters[-1.0, "reference"] == "C......C"  # the sum never rises
    assert letters[-1.0, "abs"] == letters[1.0, "clamp"] != "C......C"
