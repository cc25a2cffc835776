"""Law 3: on equal inputs what is kept gives the output that computing gives."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dicache import Cache, Schedule, apply
from dicache.anatomy import survey
from dicache.schedules import Plan, Rule, Target
from tests.counting import alike
from tests.tiny import (
    Build,
    anatomy_of,
    arguments,
    every_model,
    every_transformer,
    first_tensor,
    predict,
    replay,
    scheduled,
)
from tests.toys import CHAINS, Chain, every_chain, toy_inputs


def twice(build: Build, *rules: Rule) -> tuple[Tensor, Tensor]:
    """Return the outputs of a computed step and of one with the same inputs where the rules act."""
    model = build()
    given = arguments(model)
    with apply(model, scheduled(build, *rules)) as cache:
        first, second = replay(model, cache, [given, given])
    return first, second


def chain_twice(chain: str, rule: Rule) -> tuple[Tensor, Tensor]:
    model, inputs = Chain(**CHAINS[chain]), toy_inputs()
    schedule = Schedule("test", {}, survey(model, inputs), Target(), 2, Plan(2, (rule,)))
    with apply(model, schedule) as cache, torch.no_grad():
        cache.begin_generation()
        cache.begin_step()
        first = model(*inputs.args, **inputs.kwargs)
        cache.begin_step()
        return first, model(*inputs.args, **inputs.kwargs)


@every_model
def test_reusing_every_site_is_the_same_bit_for_bit(build: Build) -> None:
    first, second = twice(build, Rule("reuse", "C."))
    assert torch.equal(first, predict(build(), arguments(build())))
    assert torch.equal(first, second)


@every_model
def test_reusing_any_one_site_is_the_same_bit_for_bit(build: Build) -> None:
    for block in anatomy_of(build).blocks:
        for site in block.sites:
            first, second = twice(build, Rule("reuse", "C.", blocks=str(block.index), branch=site.branch))
            assert torch.equal(first, second)


@every_model
def test_skipping_any_range_is_the_same_but_for_rounding(build: Build) -> None:
    anatomy = anatomy_of(build)
    count = len(anatomy.blocks)
    for start in range(count):
        for last in range(start, count):
            if not anatomy.obstacle(start, last + 1, delta=True):
                first, second = twice(build, Rule("skip", "C.", blocks=f"{start}-{last}"))
                assert alike(second, first)


@every_transformer
def test_skipping_one_range_and_reusing_sites_elsewhere_is_the_same_but_for_rounding(build: Build) -> None:
    first, second = twice(build, Rule("skip", "C.", blocks="0-1"), Rule("reuse", "C.", branch="mlp"))
    assert alike(second, first)


@every_chain
def test_reusing_every_site_of_a_toy_is_the_same_bit_for_bit(chain: str) -> None:
    first, second = chain_twice(chain, Rule("reuse", "C."))
    assert torch.equal(first, second)


@every_chain
@pytest.mark.parametrize("blocks", ["*", "0", "1-2", "0-1"])
def test_skipping_blocks_of_a_toy_is_the_same_but_for_rounding(chain: str, blocks: str) -> None:
    first, second = chain_twice(chain, Rule("skip", "C.", blocks=blocks))
    assert alike(second, first)


class Ends:
    """Sees the image tokens that enter one block and leave another, call by call."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        self.entered: list[Tensor] = []
        self.left: list[Tensor] = []
        first.register_forward_pre_hook(
            lambda _, args, kwargs: self.entered.append(first_tensor(args, kwargs)), with_kwargs=True
        )
        last.register_forward_hook(
            lambda *call: self.left.append(call[2][-1] if isinstance(call[2], tuple) else call[2])
        )


@every_transformer
def test_a_skip_adds_the_last_computed_delta_to_what_enters(build: Build) -> None:
    model = build()
    ends = Ends(model.get_submodule("transformer_blocks.0"), model.get_submodule("transformer_blocks.1"))
    with apply(model, scheduled(build, Rule("skip", "CC..", blocks="0-1"))) as cache:
        replay(model, cache, [arguments(model, seed=step, timestep=900 - 200 * step) for step in range(4)])
    change = ends.left[1] - ends.entered[1]
    for step in (2, 3):
        assert torch.equal(ends.left[step], ends.entered[step] + change)
        assert not torch.equal(ends.entered[step], ends.entered[1])


def outputs_of(model: nn.Module, path: str) -> list[Any]:
    seen: list[Any] = []
    model.get_submodule(path).register_forward_hook(lambda *call: seen.append(call[2]))
    return seen


@every_transformer
def test_a_reused_branch_gives_the_last_computed_output_itself(build: Build) -> None:
    model = build()
    block = anatomy_of(build).blocks[1]
    attn = outputs_of(model, f"{block.module}.{block.sites[0].module}")
    mlp = outputs_of(model, "transformer_blocks.1.ff")
    with apply(model, scheduled(build, Rule("reuse", "CC..", branch=block.sites[0].branch))) as cache:
        replay(model, cache, [arguments(model, seed=step, timestep=900 - 200 * step) for step in range(4)])
    assert attn[2] is attn[1]  # the very tensor, not a copy
    assert attn[3] is attn[1]
    assert not torch.equal(*(out[0] if isinstance(out, tuple) else out for out in attn[:2]))
    assert len({value.data_ptr() for value in mlp}) == 4  # computed each time


def stages(model: nn.Module, cache: Cache) -> list[Tensor]:
    return replay(model, cache, [arguments(model, seed=step, timestep=900 - 200 * step) for step in range(4)])


@every_transformer
def test_two_overlapping_ranges_that_take_turns_each_use_their_own_delta(build: Build) -> None:
    model = build()
    deep, shallow = Rule("skip", "C.CC", blocks="1-2"), Rule("skip", "CCC.", blocks="0-1")
    with apply(model, scheduled(build, deep, shallow)) as cache:
        both = stages(model, cache)
    with apply(model, scheduled(build, deep)) as cache:
        only_deep = stages(model, cache)
    with apply(model, scheduled(build, shallow)) as cache:
        only_shallow = stages(model, cache)
    assert torch.equal(both[1], only_deep[1])
    assert torch.equal(both[3], only_shallow[3])
