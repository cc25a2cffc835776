"""Held outputs that are corrected by a trend: each guidance pass, and each half of its batch, by its own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dicache import Schedule, ScheduleError, apply
from dicache.schedules import Corrections, Rule, Target
from dicache.schedules.corrections import Form
from tests.tiny import (
    BATCH,
    TOKENS,
    WIDTH,
    Build,
    anatomy_of,
    arguments,
    dit,
    every_transformer,
    generate,
    pipeline_of,
    pixart,
    predict,
    sample,
    scheduled,
)

LETTERS = "C..C."
REUSED = (1, 2, 4)
STEPS = len(LETTERS)


def tensors_of(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [part for part in out if part is not None]


def modules(model: nn.Module, build: Build) -> dict[str, nn.Module]:
    """Return the module of each site."""
    return {
        block.key(site): model.get_submodule(f"{block.module}.{site.module}")
        for block in anatomy_of(build).blocks
        for site in block.sites
    }


def sizes(build: Build) -> dict[str, tuple[int, int]]:
    """Return the tokens of all tensors that a site gives, and their channels."""
    model, found = build(), dict[str, tuple[int, int]]()

    def seen(key: str) -> Any:
        def look(_module: Any, _args: Any, out: Any) -> None:
            tensors = tensors_of(out)
            found[key] = sum(tensor.shape[1] for tensor in tensors), tensors[0].shape[2]

        return look

    handles = [module.register_forward_hook(seen(key)) for key, module in modules(model, build).items()]
    predict(model, arguments(model))
    for handle in handles:
        handle.remove()
    return found


def corrections(
    build: Build,
    weight: float,
    form: Form = "multiply",
    *,
    contexts: Mapping[str, int],
    steps: tuple[int, ...] = REUSED,
) -> Corrections:
    """Return random trends for all sites at some steps."""
    generator = np.random.default_rng(0)
    letters = "".join("." if step in steps else "C" for step in range(STEPS))
    return Corrections(
        form,
        weight,
        contexts,
        dict.fromkeys(anatomy_of(build).sites, letters),
        {
            f"{context}/{key}/{step}": generator.standard_normal((parts, *size)).astype(np.float32)
            for context, parts in contexts.items()
            for key, size in sizes(build).items()
            for step in steps
        },
    )


def corrected(build: Build, weight: float, form: Form = "multiply", **options: Any) -> Schedule:
    return replace(scheduled(build, Rule("reuse", LETTERS)), corrections=corrections(build, weight, form, **options))


def by_hand(build: Build, found: Corrections, context: str, batch: int) -> nn.Module:
    """Return a model that computes everything, and whose branches give what they should instead."""
    model, step, held = build(), -1, dict[str, Any]()

    def begin(*_: Any) -> None:
        nonlocal step
        step += 1

    def overwrite(key: str) -> Any:
        def act(_module: Any, _args: Any, out: Any) -> Any:
            if LETTERS[step] == "C":
                held[key] = out
                return out
            if found.sites[key][step] == "C":
                return held[key]
            trend = torch.from_numpy(found.tensors[f"{context}/{key}/{step}"])
            trend = trend.repeat_interleave(batch // len(trend), dim=0)  # the halves lie one after the other
            kept = tensors_of(held[key])
            parts = trend.split([tensor.shape[1] for tensor in kept], dim=1)
            made = [
                C * (1 + found.weight * T) if found.form == "multiply" else C + found.weight * T
                for C, T in zip(kept, parts, strict=True)
            ]
            return made[0] if isinstance(out, Tensor) else tuple(made)

        return act

    model.register_forward_pre_hook(begin)
    for key, module in modules(model, build).items():
        module.register_forward_hook(overwrite(key))
    return model


@every_transformer
@pytest.mark.parametrize("form", ["multiply", "add"])
@pytest.mark.parametrize(("parts", "batch"), [(1, 1), (1, 3), (2, 2), (2, 4)])
def test_what_is_held_is_corrected_as_by_hand(build: Build, form: Form, parts: int, batch: int) -> None:
    schedule = corrected(build, 0.3, form, contexts={"0": parts})
    assert schedule.corrections is not None
    want = sample(by_hand(build, schedule.corrections, "0", batch), steps=STEPS, batch=batch)
    model = build()
    with apply(model, schedule) as cache:
        got = sample(model, cache, steps=STEPS, batch=batch)
        assert torch.equal(sample(model, cache, steps=STEPS, batch=batch), got)
    assert torch.equal(got, want)


@every_transformer
@pytest.mark.parametrize("form", ["multiply", "add"])
def test_a_weight_of_zero_holds_bit_for_bit(build: Build, form: Form) -> None:
    outputs = []
    for schedule in (corrected(build, 0.0, form, contexts={"0": 2}), scheduled(build, Rule("reuse", LETTERS))):
        model = build()
        with apply(model, schedule) as cache:
            outputs.append(sample(model, cache, steps=STEPS))
    assert torch.equal(*outputs)


@every_transformer
def test_only_the_steps_that_are_named_are_corrected(build: Build) -> None:
    schedule = corrected(build, 0.3, contexts={"0": 1}, steps=(4,))
    assert schedule.corrections is not None
    want = sample(by_hand(build, schedule.corrections, "0", BATCH), steps=STEPS)
    model = build()
    with apply(model, schedule) as cache:
        assert torch.equal(sample(model, cache, steps=STEPS), want)


@pytest.mark.parametrize("build", [dit, pixart])
def test_each_guidance_pass_is_corrected_by_its_own_trend(build: Build) -> None:
    schedule = corrected(build, 0.3, contexts={"0": 1, "1": 1})
    assert schedule.corrections is not None
    hands = [by_hand(build, schedule.corrections, context, BATCH) for context in ("0", "1")]
    model = build()
    with apply(model, schedule) as cache:
        cache.begin_generation()
        for step in range(STEPS):
            cache.begin_step()
            for seed, hand in enumerate(hands):
                given = arguments(model, seed=seed, timestep=900 - 100 * step)
                assert torch.equal(predict(model, given), predict(hand, given))


def test_a_pipeline_corrects_both_halves_of_its_batch() -> None:
    schedule = corrected(dit, 0.3, contexts={"0": 2})
    assert schedule.corrections is not None
    plain = pipeline_of(dit)
    plain.transformer = by_hand(dit, schedule.corrections, "0", 4)
    want = generate(plain, steps=STEPS, batch=2)
    pipe = pipeline_of(dit)
    with apply(pipe, schedule):
        assert torch.equal(generate(pipe, steps=STEPS, batch=2), want)


def test_the_trends_on_the_device_are_counted_and_freed() -> None:
    schedule = corrected(dit, 0.3, contexts={"0": 2})
    model = dit()
    with apply(model, schedule) as cache:
        for _ in range(2):
            sample(model, cache, steps=STEPS)
            assert cache.stats.bytes_of_corrections == len(anatomy_of(dit).sites) * len(REUSED) * 2 * TOKENS * WIDTH * 4
            assert cache.stats.bytes_held == 0
    assert cache.stats.bytes_of_corrections == 0


def test_another_batch_or_size_than_the_trends_are_for_is_refused() -> None:
    model = dit()
    with (
        apply(model, corrected(dit, 0.3, contexts={"0": 2})) as cache,
        pytest.raises(ScheduleError, match=r"16 tokens of 24 channels in 2 parts .* for a batch of 3\. Calibrate with"),
    ):
        sample(model, cache, steps=STEPS, batch=3)
    with (
        apply(model, corrected(dit, 0.3, contexts={"cond": 1})) as cache,
        pytest.raises(ScheduleError, match=r"corrects the guidance passes cond, but the pipeline has a pass 0"),
    ):
        sample(model, cache, steps=STEPS)


def test_trends_are_for_one_size_and_for_the_passes_of_guidance_whatever_is_allowed() -> None:
    model = dit()
    of_a_wider_picture = replace(corrected(dit, 0.3, contexts={"0": 1}), target=Target(latents=(4, 4, 16)))
    with (
        apply(model, of_a_wider_picture, allow={"latents"}) as cache,
        pytest.raises(
            ScheduleError, match=r"latents \(4, 4, 16\), found \(4, 8, 8\), and corrects what it holds token by"
        ),
    ):
        sample(model, cache, steps=STEPS)  # as many tokens, in other places
    pipe = pipeline_of(dit)
    guided = replace(corrected(dit, 0.3, contexts={"0": 2}), target=Target(guidance=4.0))
    with apply(pipe, guided, allow={"guidance"}):
        with pytest.raises(
            ScheduleError, match=r"guidance 4, found 1, and corrects what it holds in each of the passes"
        ):
            generate(pipe, steps=STEPS, batch=2, guidance_scale=1.0)  # two pictures, and not two passes of one
        generate(pipe, steps=STEPS, batch=2, guidance_scale=2.0)


def test_an_output_held_from_another_step_than_the_trend_is_of_is_not_corrected() -> None:
    model = dit()
    outputs = []
    for schedule in (corrected(dit, 0.3, contexts={"0": 1}), scheduled(dit, Rule("reuse", LETTERS))):
        with apply(model, schedule) as cache:
            cache.begin_generation()
            cache.begin_step()  # the pass does not come before step 1, which must be computed then
            calls = []
            for step in range(1, 3):
                cache.begin_step()
                calls.append(predict(model, arguments(model, seed=step)))
            outputs.append(calls)
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_half_precision_is_corrected_in_half_precision() -> None:
    schedule = corrected(dit, 0.3, contexts={"0": 1})
    model = dit().to(torch.bfloat16)
    with apply(model, schedule) as cache:
        out = sample(model, cache, steps=STEPS)
        assert cache.stats.bytes_of_corrections == len(anatomy_of(dit).sites) * len(REUSED) * TOKENS * WIDTH * 2
    assert out.dtype == torch.bfloat16


def test_a_model_whose_dtype_changes_between_generations_and_back_is_corrected_each_time() -> None:
    schedule, model, other = corrected(pixart, 0.1, "multiply", contexts={"0": 2}), pixart(), pixart()
    with apply(model, schedule) as cache:
        for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
            with apply(other.to(dtype), schedule) as fresh:
                want = sample(other, fresh, steps=schedule.steps)
            assert torch.equal(sample(model.to(dtype), cache, steps=schedule.steps), want)
