"""Laws 5, 6 and 8: a generation is what it would be in a fresh process, whatever came before it or runs beside it.

The hazards are those that caches of diffusion models are known to stumble over; each is the name of a row.
"""

import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache as remembered
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dicache import Cache, Schedule, ScheduleError, apply, runtime
from dicache.anatomy.clock import noise_levels
from dicache.runtime.apply import denoiser
from dicache.schedules import Rule, Target
from tests.counting import alike, broken, interrupted
from tests.runtime.interleaving import in_threads, out_of_phase, request
from tests.tiny import (
    SIZE,
    STEPS,
    Build,
    adaptive,
    arguments,
    denoise,
    dit,
    every_model,
    first_block,
    flux,
    generate,
    pipeline_of,
    predict,
    replay,
    sample,
    scheduled,
    sd3,
    unet,
)

PLANS = {
    "FORA": Rule("reuse", "C.."),
    "body skip": Rule("skip", "C."),
    "Taylor": Rule("reuse", "CC..", predictor="taylor", order=1),
}
every_plan = pytest.mark.parametrize("method", PLANS)
every_method = pytest.mark.parametrize("method", [*PLANS, "TeaCache", "first block"])
some_models = pytest.mark.parametrize("build", [dit, flux, unet])  # passes in one batch, called one by one, and a U-Net


def schedule_of(build: Build, method: str, steps: int = STEPS, **made_for: Any) -> Schedule:
    if method == "TeaCache":
        schedule = adaptive(build, threshold=0.5, steps=steps)
    elif method == "first block":
        schedule = first_block(build, threshold=0.9, steps=steps)
    else:
        rule = PLANS[method]
        schedule = scheduled(build, replace(rule, steps=(rule.steps * steps)[:steps]))
    return replace(schedule, target=Target(**made_for))


# Generations of a bare model, one after the other


def finished(model: nn.Module, cache: Cache) -> None:
    sample(model, cache, seed=7)


def failed_between_steps(model: nn.Module, cache: Cache) -> None:
    with broken(model, call=2):
        sample(model, cache, seed=7)


def interrupted_between_steps(model: nn.Module, cache: Cache) -> None:
    turns = denoise(model, cache, seed=7)
    next(turns)
    next(turns)
    with pytest.raises(KeyboardInterrupt):
        turns.throw(KeyboardInterrupt())


def failed_inside_a_block(model: nn.Module, cache: Cache) -> None:
    with broken(model.get_submodule(cache.schedule.anatomy.blocks[2].module), call=0):
        sample(model, cache, seed=7)


def interrupted_inside_the_first_branch(model: nn.Module, cache: Cache) -> None:
    first = cache.schedule.anatomy.blocks[0]
    calls: list[object] = []

    def interrupt(*call: object) -> None:
        calls.append(call)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = model.get_submodule(f"{first.module}.{first.sites[0].entrance}").register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            sample(model, cache, seed=7)
    finally:
        hook.remove()


def of_another_batch_size(model: nn.Module, cache: Cache) -> None:
    sample(model, cache, seed=7, batch=3)


def of_another_size(model: nn.Module, cache: Cache) -> None:
    replay(model, cache, [smaller(arguments(model, seed=seed)) for seed in range(2)])


def of_another_precision(model: nn.Module, cache: Cache) -> None:
    model.double()
    interrupted_between_steps(model, cache)
    model.float()


def smaller(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call for latents of half the size."""
    if "img_ids" in given:
        many = len(given["img_ids"]) // 2
        return {**given, "hidden_states": given["hidden_states"][:, :many], "img_ids": given["img_ids"][:many]}
    name = "sample" if "sample" in given else "hidden_states"
    return {**given, name: given[name][..., : SIZE // 2, : SIZE // 2]}


@remembered
def fresh(build: Build, method: str) -> Tensor:
    model = build()
    with apply(model, schedule_of(build, method)) as cache:
        return sample(model, cache)


@every_model
@every_method
@pytest.mark.parametrize(
    "before",
    [
        pytest.param(finished, id="two generations, no reset"),
        pytest.param(failed_between_steps, id="exception between steps, new run"),
        pytest.param(interrupted_between_steps, id="interrupt between steps, new run"),
        pytest.param(failed_inside_a_block, id="exception inside a block, new run"),
        pytest.param(interrupted_inside_the_first_branch, id="interrupt inside a block, new run"),
        pytest.param(of_another_batch_size, id="batch 3, then batch 2"),
        pytest.param(of_another_size, id="another size"),
        pytest.param(of_another_precision, id="another precision"),
    ],
)
def test_a_generation_after_another(build: Build, method: str, before: Callable[..., None]) -> None:
    model = build()
    with apply(model, schedule_of(build, method)) as cache:
        before(model, cache)
        assert torch.equal(sample(model, cache), fresh(build, method))
        assert cache.stats.generations == 2


@every_method
def test_an_interrupt_at_any_line_of_the_runtime_leaves_nothing_behind(method: str) -> None:
    model, schedule, folder = dit(), schedule_of(dit, method), str(Path(runtime.__file__).parent)
    with apply(model, schedule) as cache:
        lines = interrupted(lambda: sample(model, cache, seed=7), folder, -1)
    wrong = []
    for line in range(lines // 120, lines, lines // 60):
        model = dit()  # forwards are made in the first generation
        with apply(model, schedule) as cache:
            interrupted(lambda: sample(model, cache, seed=7), folder, line)  # noqa: B023
            if not torch.equal(sample(model, cache), fresh(dit, method)):
                wrong.append(line)
    assert wrong == []


@every_model
@every_method
def test_a_second_cache_on_the_model_starts_clean_as_well(build: Build, method: str) -> None:
    model = build()
    with apply(model, schedule_of(build, method)) as cache:
        interrupted_between_steps(model, cache)
    with apply(model, schedule_of(build, method)) as cache:
        assert torch.equal(sample(model, cache), fresh(build, method))


def digests() -> str:
    """Return what identifies, to the bit, what each method gives on a model that was just made."""
    cases = [(build, method) for build in (dit, sd3, flux) for method in (*PLANS, "TeaCache", "first block")]
    return " ".join(hashlib.sha256(fresh(*case).numpy().tobytes()).hexdigest() for case in cases)


def test_a_fresh_process_gives_the_same() -> None:
    code = "import torch; torch.set_num_threads(1); from tests.runtime.test_hazards import digests; print(digests())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fresh.cache_clear()
    try:
        assert done.stdout.split() == digests().split()
    finally:
        torch.set_num_threads(threads)


# Generations of a pipeline, one after the other


def picture(pipe: Any) -> None:
    generate(pipe, seed=7)


def pictures(pipe: Any) -> None:
    generate(pipe, seed=7, batch=3)


def unguided_picture(pipe: Any) -> None:
    generate(pipe, seed=7, guidance_scale=1.0)


def aborted_picture(pipe: Any) -> None:
    with broken(denoiser(pipe), call=2):
        generate(pipe, seed=7)


def failed_picture(pipe: Any) -> None:
    mlp = next(module for path, module in denoiser(pipe).named_modules() if path.endswith(".ff"))
    with broken(mlp, call=0):
        generate(pipe, seed=7)


@remembered
def fresh_picture(build: Build, method: str) -> Tensor:
    pipe = pipeline_of(build)
    with apply(pipe, schedule_of(build, method)):
        return generate(pipe)


@every_model
@every_method
@pytest.mark.parametrize(
    "before",
    [
        pytest.param(picture, id="two generations, no reset"),
        pytest.param(pictures, id="batch 3, then batch 1"),
        pytest.param(unguided_picture, id="without guidance, then with it"),
        pytest.param(aborted_picture, id="exception between steps, new run"),
        pytest.param(failed_picture, id="exception inside a block, new run"),
    ],
)
def test_a_picture_after_another(build: Build, method: str, before: Callable[..., None]) -> None:
    pipe = pipeline_of(build)
    with apply(pipe, schedule_of(build, method)):
        before(pipe)
        assert torch.equal(generate(pipe), fresh_picture(build, method))


@remembered
def levels_of(build: Build, steps: int) -> tuple[float, ...]:
    pipe = pipeline_of(build)
    generate(pipe, steps=steps)
    return noise_levels(pipe.scheduler)


@some_models
@every_method
@pytest.mark.parametrize(
    ("first", "second"), [pytest.param(20, 13, id="20 steps, then 13"), pytest.param(13, 20, id="13 steps, then 20")]
)
def test_another_number_of_steps(build: Build, method: str, first: int, second: int) -> None:
    pipe, untouched = pipeline_of(build), pipeline_of(build)
    schedule = schedule_of(build, method, 20, noise_levels=levels_of(build, 20))
    with apply(pipe, schedule, fit="resample") as cache, apply(untouched, schedule, fit="resample"):
        generate(pipe, steps=first, seed=7)
        assert torch.equal(generate(pipe, steps=second), generate(untouched, steps=second))
        assert all("." in letters and len(letters) == second for letters in cache.stats.steps.values())


@some_models
@every_method
def test_another_number_of_steps_that_was_refused(build: Build, method: str) -> None:
    pipe = pipeline_of(build)
    with apply(pipe, schedule_of(build, method)):
        aborted_picture(pipe)
        with pytest.raises(ScheduleError, match=f"{STEPS} steps, found 13"):
            generate(pipe, steps=13)
        assert torch.equal(generate(pipe), fresh_picture(build, method))


@some_models
@every_method
def test_half_precision_between_two_generations(build: Build, method: str) -> None:
    pipe, untouched = pipeline_of(build), pipeline_of(build).to(torch.bfloat16)
    with apply(pipe, schedule_of(build, method)), apply(untouched, schedule_of(build, method)):
        picture(pipe)
        assert torch.equal(generate(pipe.to(torch.bfloat16)), generate(untouched))


# Within a generation


def given(model: nn.Module, name: int, step: int, batch: int) -> dict[str, Any]:
    """Return the arguments of a pass at a step; no two are alike."""
    return arguments(model, batch=batch, seed=100 * name + step, timestep=900 - 200 * step)


def passes(build: Build, method: str, turns: list[list[tuple[int, int]]]) -> list[list[Tensor]]:
    """Return what each pass gives at each step; `turns` lists the passes of a step and their batch sizes."""
    model = build()
    outputs = []
    with apply(model, schedule_of(build, method)) as cache:
        cache.begin_generation()
        for step, both in enumerate(turns):
            cache.begin_step()
            outputs.append([predict(model, given(model, name, step, batch)) for name, batch in both])
    return outputs


@every_model
@every_method
@pytest.mark.parametrize("sizes", [(4, 2), (2, 1)], ids=["batch 4->2 mid-run", "batch 2->1 mid-run"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_batch_that_changes_computes(build: Build, method: str, sizes: tuple[int, int], step: int) -> None:
    model = build()
    got = passes(build, method, [[(0, sizes[i >= step])] for i in range(STEPS)])
    assert torch.equal(got[step][0], predict(model, given(model, 0, step, sizes[1])))
    assert [len(out[0]) for out in got] == [sizes[i >= step] for i in range(STEPS)]


@every_model
@every_method
@pytest.mark.parametrize("sizes", [(2, 2), (2, 1), (1, 3)])
def test_cfg_sequential_gives_what_each_pass_gives_alone(build: Build, method: str, sizes: tuple[int, int]) -> None:
    both = passes(build, method, [[(0, sizes[0]), (1, sizes[1])]] * STEPS)
    for name, size in enumerate(sizes):
        alone = passes(build, method, [[(name, size)]] * STEPS)
        assert all(torch.equal(step[name], one) for step, [one] in zip(both, alone, strict=True))


@every_model
@every_plan
def test_cfg_sequential_gives_what_cfg_batched_gives(build: Build, method: str) -> None:
    model = build()
    one_by_one = passes(build, method, [[(0, 1), (1, 1)]] * STEPS)
    with apply(model, schedule_of(build, method)) as cache:
        cache.begin_generation()
        for step in range(STEPS):
            cache.begin_step()
            calls = [given(model, name, step, 1) for name in range(2)]
            out = predict(model, {key: together([call[key] for call in calls], key) for key in calls[0]})
            assert alike(out, torch.cat(one_by_one[step]))


def together(values: list[Any], key: str) -> Any:
    """Return an argument of one call for the samples of two."""
    if isinstance(values[0], dict):
        return {name: together([value[name] for value in values], name) for name in values[0]}
    return torch.cat(values) if isinstance(values[0], Tensor) and key not in ("img_ids", "txt_ids") else values[0]


# Beside one another


@remembered
def alone(build: Build, method: str, seed: int) -> Tensor:
    model = build()
    with apply(model, schedule_of(build, method)) as cache:
        return sample(model, cache, seed=seed, batch=1 + seed)


@every_model
@every_method
def test_two_models_in_two_threads(build: Build, method: str) -> None:
    want = [alone(build, method, seed) for seed in range(2)]
    turn = threading.Barrier(2, timeout=30)
    got: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        model, outputs = build(), []
        with apply(model, schedule_of(build, method)) as cache:
            for out in denoise(model, cache, seed=seed, batch=1 + seed):
                outputs.append(out)
                turn.wait()
        got[seed] = torch.stack(outputs)

    in_threads(lambda: work(0), lambda: work(1))
    assert all(torch.equal(got[seed], want[seed]) for seed in range(2))


@every_model
@every_method
def test_one_model_with_two_requests_that_take_turns(build: Build, method: str) -> None:
    model = build()
    with apply(model, schedule_of(build, method)) as cache:
        got = out_of_phase(request(model, cache, 0), request(model, cache, 1))
    assert all(torch.equal(got[seed], alone(build, method, seed)) for seed in range(2))
