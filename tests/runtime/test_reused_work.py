"""Law 2: what is reused or skipped does not run, and neither does a norm that feeds nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dicache import Cache, Schedule, apply
from dicache.anatomy import survey
from dicache.schedules import Plan, Rule, Target
from tests.counting import macs, operators
from tests.tiny import Build, anatomy_of, arguments, both_models, predict, scheduled
from tests.toys import Chain, ParallelBlock, toy_inputs

NORM = "native_layer_norm"


def second_step(model: nn.Module, schedule: Schedule, count: Callable[[Callable[[], Any]], Any]) -> tuple[Any, Cache]:
    """Return what `count` counts in the second of two steps, and the cache."""
    given = arguments(model)
    with apply(model, schedule) as cache:
        cache.begin_generation()
        cache.begin_step()
        predict(model, given)
        cache.begin_step()
        return count(lambda: predict(model, given)), cache


@both_models
def test_a_reused_site_runs_none_of_its_products_and_all_others_run(build: Build) -> None:
    anatomy, model = anatomy_of(build), build()
    for block in anatomy.blocks:
        for site in block.sites:
            rule = Rule("reuse", "C.", blocks=str(block.index), branch=site.branch)
            counted, cache = second_step(model, scheduled(build, rule), macs)
            assert counted == anatomy.macs - site.macs
            assert cache.stats.macs * anatomy.macs == pytest.approx(anatomy.macs + counted)
            assert cache.stats.reused_sites == 1


@both_models
def test_the_norm_of_a_reused_site_does_not_run_and_all_others_do(build: Build) -> None:
    anatomy, model = anatomy_of(build), build()
    plain = operators(lambda: predict(model, arguments(model)))[NORM]
    assert plain == 2 * len(anatomy.blocks) + 1  # two in each block, one after them
    for block in anatomy.blocks:
        for site in block.sites:
            rule = Rule("reuse", "C.", blocks=str(block.index), branch=site.branch)
            counted, _ = second_step(model, scheduled(build, rule), operators)
            own = 0 if site.branch == "cross_attn" else 1  # PixArt's cross-attention has none
            assert counted[NORM] == plain - own


@both_models
def test_with_every_site_reused_only_what_is_around_them_runs(build: Build) -> None:
    anatomy, model = anatomy_of(build), build()
    sites = sum(site.macs for block in anatomy.blocks for site in block.sites)
    counted, cache = second_step(model, scheduled(build, Rule("reuse", "C.")), macs)
    assert counted == anatomy.macs - sites
    assert cache.stats.reused_sites == len(anatomy.sites)
    counted, _ = second_step(model, scheduled(build, Rule("reuse", "C.")), operators)
    assert counted[NORM] == 1


@both_models
def test_a_skipped_block_runs_nothing_at_all(build: Build) -> None:
    anatomy, model = anatomy_of(build), build()
    for blocks, skipped in (("*", anatomy.blocks), ("1", anatomy.blocks[1:2]), ("1-2", anatomy.blocks[1:3])):
        schedule = scheduled(build, Rule("skip", "C.", blocks=blocks))
        counted, cache = second_step(model, schedule, macs)
        assert counted == anatomy.macs - sum(block.macs for block in skipped)
        assert cache.stats.macs * anatomy.macs == pytest.approx(anatomy.macs + counted)
        assert cache.stats.skipped_sites == sum(len(block.sites) for block in skipped)
        counted, _ = second_step(model, schedule, operators)
        assert counted[NORM] == 2 * (len(anatomy.blocks) - len(skipped)) + 1


@pytest.mark.parametrize(("branch", "norms"), [("attn", 6), ("mlp", 6), ("*", 3)])
def test_a_norm_of_two_branches_rests_only_when_both_are_reused(branch: str, norms: int) -> None:
    model = Chain(ParallelBlock)
    inputs = toy_inputs()
    schedule = Schedule("test", {}, survey(model, inputs), Target(), 2, Plan(2, (Rule("reuse", "C.", branch=branch),)))
    with apply(model, schedule) as cache, torch.no_grad():
        cache.begin_generation()
        cache.begin_step()
        model(*inputs.args, **inputs.kwargs)
        cache.begin_step()
        assert operators(lambda: model(*inputs.args, **inputs.kwargs))[NORM] == norms


@both_models
def test_a_step_that_computes_after_one_that_reused_runs_everything(build: Build) -> None:
    anatomy, model = anatomy_of(build), build()
    given = arguments(model)
    with apply(model, scheduled(build, Rule("reuse", "C.C", branch="attn"), Rule("skip", "C.C", blocks="1"))) as cache:
        cache.begin_generation()
        counted = []
        for _ in range(3):
            cache.begin_step()
            counted.append(macs(lambda: predict(model, given)))
    assert counted[0] == counted[2] == anatomy.macs
    assert counted[1] < anatomy.macs
