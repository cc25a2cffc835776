"""Compiled policies decide outside of their graphs, as they do uncompiled."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from dicache import Schedule, apply
from dicache.schedules import AdaCachePolicy, Target
from tests.counting import attributes
from tests.tiny import (
    Build,
    adaptive,
    anatomy_of,
    arguments,
    dit,
    first_block,
    flux,
    generate,
    pipeline_of,
    pixart,
    replay,
    sample,
    sd3,
)

STEPS = 8


def adacache(build: Build, **settings: Any) -> Schedule:
    policy = AdaCachePolicy(((0.05, 3), (99.0, 2)), (1,), last_steps=1, **settings)
    return Schedule("adacache", {}, anatomy_of(build), Target(), STEPS, policy=policy)


def check(model: nn.Module, schedule: Schedule, counter: CompileCounter, graphs: int) -> None:
    """Check that a schedule does the same compiled, with so many graphs, in two generations."""
    plain, before = sample(model, steps=STEPS), attributes(model)
    with apply(model, schedule) as cache:
        want = sample(model, cache, steps=STEPS)
        steps, distances = cache.stats.steps, cache.stats.distances
        sites = cache.stats.computed_sites, cache.stats.skipped_sites
    assert set(steps["0"]) == {"C", "."}
    with apply(model, schedule, compile={"backend": counter}) as cache:
        got = sample(model, cache, steps=STEPS)
        assert cache.stats.steps == steps
        assert cache.stats.distances == distances
        assert (cache.stats.computed_sites, cache.stats.skipped_sites) == sites
        assert torch.equal(got, want)
        assert counter.frame_count == graphs
        assert torch.equal(sample(model, cache, steps=STEPS), want)
        assert counter.frame_count == graphs
    assert attributes(model) == before
    assert torch.equal(sample(model, steps=STEPS), plain)


@pytest.mark.parametrize("build", [dit, pixart, sd3, flux])
def test_teacache_is_three_graphs_one_up_to_where_it_decides(build: Build, counter: CompileCounter) -> None:
    check(build(), adaptive(build, threshold=0.5, steps=STEPS), counter, graphs=3)


@pytest.mark.parametrize(("build", "first"), [(dit, 1), (dit, 2), (sd3, 1), (flux, 2)])
def test_first_block_cache_is_three_graphs_and_its_first_blocks_run_once(
    build: Build, first: int, counter: CompileCounter
) -> None:
    check(build(), first_block(build, threshold=0.9, steps=STEPS, first=first), counter, graphs=3)


@pytest.mark.parametrize("branch", ["block", "attn", "rest"])
def test_adacache_decides_before_the_call_and_has_a_graph_more_for_steps_that_it_watches(
    branch: Any, counter: CompileCounter
) -> None:
    check(pixart(), adacache(pixart, branch=branch), counter, graphs=3)


@pytest.mark.parametrize("build", [dit, sd3])
def test_a_pipeline(build: Build, counter: CompileCounter) -> None:
    pipe, schedule = pipeline_of(build), adaptive(build, threshold=0.5, steps=STEPS)
    with apply(pipe, schedule) as cache:
        want, steps = generate(pipe, steps=STEPS), cache.stats.steps
    with apply(pipe, schedule, compile={"backend": counter}) as cache:
        for _ in range(2):
            assert torch.equal(generate(pipe, steps=STEPS), want)
            assert cache.stats.steps == steps
        assert counter.frame_count == 3


@pytest.mark.parametrize("policy", [adaptive, first_block])
def test_a_pass_that_leaves_out_the_block_where_it_is_decided_computes(policy: Any, counter: CompileCounter) -> None:
    schedule = policy(sd3, 0.9, steps=STEPS)
    given = arguments(sd3())
    skipped = [[], [], [0, 1], [], [], [1], [], []]

    def outputs(**options: Any) -> list[torch.Tensor]:
        model = sd3()
        with apply(model, schedule, **options) as cache:
            return replay(model, cache, [{**given, "skip_layers": layers} for layers in skipped])

    for got, want in zip(outputs(compile={"backend": counter}), outputs(), strict=True):
        assert torch.equal(got, want)
