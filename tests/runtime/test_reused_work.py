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
from tests.tiny import Build, anatomy_of, arguments, every_model, every_transformer, predict, scheduled
from tests.toys import CHAINS, Chain, FusedBlock, ParallelBlock, every_chain, toy_inputs

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


@every_model
def test_a_reused_site_runs_none_of_its_products_and_all_others_run(build: Build) -> None:
    anatomy, model = anatomy_of(build), build()
    for block in anatomy.blocks:
        for site in block.sites:
            rule = Rule("reuse", "C.", blocks=str(block.index), branch=site.branch)
            counted, cache = second_step(model, scheduled(build, rule), macs)
            reused = [other for other in block.sites if rule.covers(other.branch)]  # `mlp` is `mlp.context` as well
            assert site in reused
            assert counted == anatomy.macs - sum(other.macs for other in reused)
            assert cache.stats.macs * anatomy.macs == pytest.approx(anatomy.macs + counted)
            assert cache.stats.reused_sites == len(reused)


@every_transformer
def test_the_norm_of_a_reused_site_does_not_run_and_all_others_do(build: Build) -> None:
    anatomy, model = anatomy_of(build), build()
    plain = operators(lambda: predict(model, arguments(model)))[NORM]
    assert plain == sum(len(block.norms) for block in anatomy.blocks) + 1  # and one after them
    for block in anatomy.blocks:
        for site in block.sites:
            rule = Rule("reuse", "C.", blocks=str(block.index), branch=site.branch)
            counted, _ = second_step(model, scheduled(build, rule), operators)
            own = [path for path, feeds in block.norms.items() if all(map(rule.covers, feeds))]
            assert counted[NORM] == plain - len(own)


@every_transformer
def test_with_every_site_reused_only_what_is_around_them_runs(build: Build) -> None:
    anatomy, model = anatomy_of(build), build()
    sites = sum(site.macs for block in anatomy.blocks for site in block.sites)
    counted, cache = second_step(model, scheduled(build, Rule("reuse", "C.")), macs)
    assert counted == anatomy.macs - sites
    assert cache.stats.reused_sites == len(anatomy.sites)
    counted, _ = second_step(model, scheduled(build, Rule("reuse", "C.")), operators)
    assert counted[NORM] == 1


@every_transformer
def test_a_skipped_block_runs_nothing_at_all(build: Build) -> None:
    anatomy, model = anatomy_of(build), build()
    for blocks, skipped in (("*", anatomy.blocks), ("1", anatomy.blocks[1:2]), ("1-2", anatomy.blocks[1:3])):
        schedule = scheduled(build, Rule("skip", "C.", blocks=blocks))
        counted, cache = second_step(model, schedule, macs)
        assert counted == anatomy.macs - sum(block.macs for block in skipped)
        assert cache.stats.macs * anatomy.macs == pytest.approx(anatomy.macs + counted)
        assert cache.stats.skipped_sites == sum(len(block.sites) for block in skipped)
        counted, _ = second_step(model, schedule, operators)
        assert counted[NORM] == sum(len(block.norms) for block in anatomy.blocks if block not in skipped) + 1


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


@every_transformer
def test_a_step_that_computes_after_one_that_reused_runs_everything(build: Build) -> None:
    anatomy, model = anatomy_of(build), build()
    given = arguments(model)
    kind = anatomy.blocks[0].sites[0].branch
    with apply(model, scheduled(build, Rule("reuse", "C.C", branch=kind), Rule("skip", "C.C", blocks="1"))) as cache:
        cache.begin_generation()
        counted = []
        for _ in range(3):
            cache.begin_step()
            counted.append(macs(lambda: predict(model, given)))
    assert counted[0] == counted[2] == anatomy.macs
    assert counted[1] < anatomy.macs


def toy_schedule(model: nn.Module, rule: Rule) -> Schedule:
    return Schedule("test", {}, survey(model, toy_inputs()), Target(), 2, Plan(2, (rule,)))


@every_chain
def test_a_reused_site_of_a_toy_runs_none_of_its_products_and_all_others_run(chain: str) -> None:
    model, inputs = Chain(**CHAINS[chain]), toy_inputs()
    anatomy = survey(model, inputs)
    for block in anatomy.blocks:
        for site in block.sites:
            rule = Rule("reuse", "C.", blocks=str(block.index), branch=site.branch)
            with apply(model, toy_schedule(model, rule)) as cache, torch.no_grad():
                cache.begin_generation()
                cache.begin_step()
                model(*inputs.args, **inputs.kwargs)
                cache.begin_step()
                counted = macs(lambda: model(*inputs.args, **inputs.kwargs))
            assert counted == anatomy.macs - sum(other.macs for other in block.sites if rule.covers(other.branch))
            assert site.macs > 0


def test_a_reused_fused_branch_runs_neither_its_norm_nor_the_function_inside() -> None:
    model, inputs = Chain(FusedBlock), toy_inputs()
    with apply(model, toy_schedule(model, Rule("reuse", "C."))) as cache, torch.no_grad():
        cache.begin_generation()
        cache.begin_step()
        want = operators(lambda: model(*inputs.args, **inputs.kwargs))
        cache.begin_step()
        counted = operators(lambda: model(*inputs.args, **inputs.kwargs))
    assert (want["gelu"], want[NORM]) == (3, 3)
    assert (counted["gelu"], counted[NORM]) == (0, 0)


def test_what_stands_in_for_the_modules_of_a_fused_branch_goes_when_nothing_reads_it_any_more() -> None:
    model, inputs = Chain(FusedBlock), toy_inputs()
    plan = Plan(4, (Rule("reuse", "C.CC"),))
    schedule = Schedule("test", {}, survey(model, inputs), Target(), 4, plan)
    held = []
    with apply(model, schedule) as cache, torch.no_grad():
        cache.begin_generation()
        for _ in range(4):
            cache.begin_step()
            model(*inputs.args, **inputs.kwargs)
            held.append(cache.stats.bytes_held)
    branch = 2 * (5 + 3) * 8 * 4  # bytes: batch, tokens of image and text, width
    assert held == [3 * (branch + 3 * 4), 0, 0, 0]
