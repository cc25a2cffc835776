"""A compiled plan does what it does uncompiled, by one graph for each distinct row."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dicache import Cache, CacheError, Schedule, ScheduleError, apply
from dicache.anatomy import survey
from dicache.schedules import Plan, Rule, Target
from dicache.schedules.rows import distinct_rows
from tests.counting import BrokenError, alike, attributes
from tests.features.laws import schedule_of
from tests.runtime.test_collapse import tgate
from tests.runtime.test_corrections import corrected
from tests.tiny import (
    STEPS,
    Build,
    anatomy_of,
    arguments,
    block_of,
    dit,
    flux,
    generate,
    pipeline_of,
    pixart,
    predict,
    replay,
    sample,
    scheduled,
    sd3,
    unet,
)
from tests.transformers import TRANSFORMERS

every_method = pytest.mark.parametrize("method", ["reuse", "skip"])


def graphs(schedule: Schedule) -> int:
    assert schedule.plan is not None
    return distinct_rows(schedule.plan, schedule.anatomy)


@pytest.mark.parametrize(
    ("method", "build"),
    [*((method, build) for method in ("reuse", "skip") for build in (dit, pixart, sd3, flux)), ("skip", unet)],
)
def test_a_plan_is_a_graph_for_each_distinct_row_that_gives_what_it_gives_uncompiled(
    build: Build, method: str, counter: CompileCounter
) -> None:
    model, schedule = build(), schedule_of(build, method)
    plain, before = sample(model), attributes(model)
    with apply(model, schedule) as cache:
        want, stats = sample(model, cache), cache.stats
    assert not torch.equal(want, plain)
    with apply(model, schedule, compile={"backend": counter}) as cache:
        assert torch.equal(sample(model, cache), want)
        assert cache.stats == stats  # what was computed, reused and held
        assert counter.frame_count == graphs(schedule)
        assert torch.equal(sample(model, cache), want)
        assert counter.frame_count == graphs(schedule)  # none new in the second generation
    assert attributes(model) == before
    assert torch.equal(sample(model), plain)


@pytest.mark.parametrize("name", ["wan", "wan-vace", "hunyuan-video", "qwen-image"])
def test_transformers_of_other_kinds(name: str, counter: CompileCounter) -> None:
    tiny = TRANSFORMERS[name]
    model = tiny.build()
    anatomy = survey(model, tiny.inputs())
    plan = Plan(3, (Rule("reuse", "C.."), Rule("skip", "CC.", blocks="0-1")))
    schedule = Schedule("test", {}, anatomy, Target(), 3, plan)
    calls = [tiny.inputs(seed).kwargs for seed in range(3)]

    def outputs(**options: Any) -> list[Any]:
        with apply(model, schedule, **options) as cache:
            made = []
            for _ in range(2):
                cache.begin_generation()
                for given in calls:
                    cache.begin_step()
                    with torch.no_grad():
                        made.append(model(**given)[0])
        return made

    for got, want in zip(outputs(compile={"backend": counter}), outputs(), strict=True):
        assert torch.equal(got, want)
    assert counter.frame_count == 3


def test_twelve_distinct_rows_are_twelve_graphs(counter: CompileCounter) -> None:  # the compiler's own limit is 8
    # Each of 12 steps reuses another set of the sites: those whose bit is set in its number.
    sites, steps = [(0, "attn"), (0, "mlp"), (1, "attn"), (1, "mlp")], 12
    letters = ["".join("." if step >> bit & 1 else "C" for step in range(steps)) for bit in range(len(sites))]
    rules = [
        Rule("reuse", row, blocks=str(block), branch=branch)
        for (block, branch), row in zip(sites, letters, strict=True)
    ]
    schedule = scheduled(dit, *rules)
    assert graphs(schedule) == steps
    model = dit()
    with apply(model, schedule) as cache:
        want = sample(model, cache, steps=steps)
    with apply(model, schedule, compile={"backend": counter}) as cache:
        for _ in range(2):
            assert torch.equal(sample(model, cache, steps=steps), want)
            assert counter.frame_count == steps


@pytest.mark.parametrize("method", ["reuse", "skip"])
def test_weights_that_differ_from_step_to_step_are_no_graphs_of_their_own(method: Any, counter: CompileCounter) -> None:
    letters = "CCC..C...C.."
    schedule = scheduled(dit, Rule(method, letters, predictor="taylor", order=2))
    model = dit()
    with apply(model, schedule) as cache:
        want, stats = sample(model, cache, steps=len(letters)), cache.stats
    with apply(model, schedule, compile={"backend": counter}) as cache:
        for _ in range(2):
            assert alike(sample(model, cache, steps=len(letters)), want)
            assert counter.frame_count == graphs(schedule) == 2  # computed and kept; predicted of three
        assert cache.stats.peak_bytes_held == stats.peak_bytes_held


def test_a_scale_of_one_at_some_steps_is_no_graph_of_its_own(counter: CompileCounter) -> None:
    weights = {step: ((0, weight),) for step, weight in enumerate((1.0, 0.9, 0.8, 0.7), start=1)}
    schedule = scheduled(dit, Rule("skip", "C....", predictor="forecast", weights=weights))
    model = dit()
    with apply(model, schedule) as cache:
        want = sample(model, cache, steps=5)
    with apply(model, schedule, compile={"backend": counter}) as cache:
        assert alike(sample(model, cache, steps=5), want)
        assert counter.frame_count == graphs(schedule) == 2


@pytest.mark.parametrize("build", [dit, sd3])
@pytest.mark.parametrize("form", ["multiply", "add"])
def test_corrections_that_differ_from_step_to_step_are_no_graphs_of_their_own(
    build: Build, form: Any, counter: CompileCounter
) -> None:
    schedule = corrected(build, 0.1, form, contexts={"0": 2})
    steps = schedule.steps
    model = build()
    with apply(model, schedule) as cache:
        want = sample(model, cache, steps=steps)
    with apply(model, schedule, compile={"backend": counter}) as cache:
        for _ in range(2):
            assert torch.equal(sample(model, cache, steps=steps), want)
            assert counter.frame_count == graphs(schedule)


@every_method
def test_another_size_is_compiled_once_more_and_then_no_other(method: str, counter: CompileCounter) -> None:
    model, schedule = pixart(), schedule_of(pixart, method)
    want = {}
    for batch in (2, 4, 6):
        with apply(model, schedule) as cache:
            want[batch] = sample(model, cache, batch=batch)
    with apply(model, schedule, compile={"backend": counter, "dynamic": True}) as cache:
        compiled = []
        for batch in (2, 4, 6, 2):
            assert torch.equal(sample(model, cache, batch=batch), want[batch])
            compiled.append(counter.frame_count)
    assert compiled[1] == compiled[2] == compiled[3] <= 2 * graphs(schedule)


def test_without_dynamic_sizes_each_size_has_graphs_of_its_own(counter: CompileCounter) -> None:
    model, schedule = dit(), schedule_of(dit, "reuse")
    with apply(model, schedule, compile={"backend": counter, "dynamic": False}) as cache:
        for count, batch in enumerate((1, 2, 3), start=1):
            sample(model, cache, batch=batch)
            assert counter.frame_count == count * graphs(schedule)


@pytest.mark.parametrize("build", [dit, pixart, sd3])
def test_a_pipeline_with_guidance_in_one_batch(build: Build, counter: CompileCounter) -> None:
    pipe, schedule = pipeline_of(build), schedule_of(build, "reuse")
    with apply(pipe, schedule):
        want = generate(pipe)
    with apply(pipe, schedule, compile={"backend": counter}):
        for _ in range(2):
            assert torch.equal(generate(pipe), want)
            assert counter.frame_count == graphs(schedule)


@every_method
def test_guidance_passes_one_after_the_other_share_graphs_and_nothing_else(
    method: str, counter: CompileCounter
) -> None:
    model, schedule = dit(), schedule_of(dit, method)
    calls = [
        arguments(model, batch=1, seed=seed, timestep=900 - 200 * step) for step in range(STEPS) for seed in (0, 1)
    ]

    def in_turns(cache: Cache) -> torch.Tensor:
        cache.begin_generation()
        outputs = []
        for place, given in enumerate(calls):
            if place % 2 == 0:
                cache.begin_step()
            outputs.append(predict(model, given | {"class_labels": torch.tensor([place % 2])}))
        return torch.stack(outputs)

    with apply(model, schedule) as cache:
        want = in_turns(cache)
    with apply(model, schedule, compile={"backend": counter}) as cache:
        assert torch.equal(in_turns(cache), want)
        assert cache.stats.steps.keys() == {"0", "1"}
        assert counter.frame_count == graphs(schedule)
        assert torch.equal(in_turns(cache), want)
        assert counter.frame_count == graphs(schedule)


def test_guidance_that_collapses(counter: CompileCounter) -> None:
    pipe, schedule = pipeline_of(pixart), tgate(anatomy_of(pixart))
    with apply(pipe, schedule) as cache:
        want, stats = generate(pipe, steps=schedule.steps), cache.stats
    with apply(pipe, schedule, compile={"backend": counter}) as cache:
        assert torch.equal(generate(pipe, steps=schedule.steps), want)
        assert cache.stats.collapsed_passes == stats.collapsed_passes > 0
        made = counter.frame_count
        assert torch.equal(generate(pipe, steps=schedule.steps), want)
        assert counter.frame_count == made


@every_method
def test_an_exception_inside_passes_and_the_next_generation_is_right(method: str, counter: CompileCounter) -> None:
    model, schedule = dit(), schedule_of(dit, method)
    with apply(model, schedule) as cache:
        want = sample(model, cache)
    before = attributes(model)
    with apply(model, schedule, compile={"backend": counter}) as cache:
        sample(model, cache)
        given = arguments(model)
        cache.begin_generation()
        cache.begin_step()
        predict(model, given)
        cache.begin_step()
        with pytest.raises((RuntimeError, CacheError)):
            predict(model, {**given, "hidden_states": torch.zeros(2, 3, 8, 8)})  # too few channels
        assert cache.kept() == {}
        assert torch.equal(sample(model, cache), want)
    assert attributes(model) == before


def test_what_cannot_be_one_graph_is_refused(counter: CompileCounter) -> None:
    model = dit()
    block_of(model, dit, 1).register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    with (
        apply(model, schedule_of(dit, "reuse"), compile={"backend": counter}) as cache,
        pytest.raises(CacheError, match="a step of the DiTTransformer2DModel could not be compiled to one graph"),
    ):
        sample(model, cache)


def test_a_block_that_is_called_only_when_it_is_to_be_reused_is_refused(counter: CompileCounter) -> None:
    model = sd3()
    with apply(model, scheduled(sd3, Rule("reuse", "CC..")), compile={"backend": counter}) as cache:
        cache.begin_generation()
        given = arguments(model)
        for left_out in ([1], [1]):
            cache.begin_step()
            predict(model, {**given, "skip_layers": left_out})
        cache.begin_step()
        with pytest.raises(ScheduleError, match=r"the output of site 1.* is to be reused, and none was kept"):
            predict(model, {**given, "skip_layers": []})


def test_detach_frees_the_graphs_and_what_was_kept(counter: CompileCounter) -> None:
    model, schedule = dit(), scheduled(dit, Rule("reuse", "C..."))
    cache = apply(model, schedule, compile={"backend": counter})
    turns = sample(model, cache)
    cache.begin_generation()
    cache.begin_step()
    predict(model, arguments(model))
    kept = [weakref.ref(tensor) for tensor in cache.kept().values()]
    assert kept
    cache.detach()
    gc.collect()
    assert not any(tensor() is not None for tensor in kept)
    assert cache.stats.bytes_held == 0
    gone = weakref.ref(model)
    del model, cache, turns
    gc.collect()
    assert gone() is None


def test_a_model_that_is_compiled_itself_is_refused_when_a_generation_begins(counter: CompileCounter) -> None:
    model = dit()
    with apply(model, schedule_of(dit, "reuse"), compile={"backend": counter}) as cache:
        model.compile(backend=counter)
        with pytest.raises(
            CacheError, match="the schedule compiles the model's steps, and the model is compiled already"
        ):
            sample(model, cache)


def test_an_exception_of_the_model_is_not_swallowed(counter: CompileCounter) -> None:
    model = dit()
    hook = block_of(model, dit, 1).register_forward_pre_hook(_fail)
    with apply(model, schedule_of(dit, "reuse"), compile={"backend": counter}) as cache:
        with pytest.raises((BrokenError, CacheError), match="BrokenError"):
            sample(model, cache)
        hook.remove()
        sample(model, cache)
        assert cache.stats.reused_sites > 0


def _fail(*_: object) -> None:
    raise BrokenError("BrokenError")


def test_the_compilers_own_backend_gives_the_same_but_for_rounding() -> None:
    schedule = scheduled(dit, Rule("reuse", "C.", blocks="0-1"), Rule("skip", "C.", blocks="2-3"))
    model = dit()
    with apply(model, schedule) as cache:
        want, stats = sample(model, cache, steps=2), cache.stats
    with apply(model, schedule, compile=True) as cache:
        for _ in range(2):
            assert alike(sample(model, cache, steps=2), want)
        assert cache.stats.peak_bytes_held == stats.peak_bytes_held
    assert len(anatomy_of(dit).blocks) == 4


def test_layers_that_a_pass_leaves_out_may_change(counter: CompileCounter) -> None:
    model, schedule = sd3(), scheduled(sd3, Rule("skip", "CCCCC.", blocks="0-1"))
    given = arguments(model)
    calls = [{**given, "skip_layers": layers} for layers in ([], [0, 1], [1], [2], [0], [])]
    with apply(model, schedule) as cache:
        want = replay(model, cache, calls)
    with apply(model, schedule, compile={"backend": counter}) as cache:
        for one, other in zip(replay(model, cache, calls), want, strict=True):
            assert torch.equal(one, other)
