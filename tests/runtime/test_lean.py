"""A block all of whose branches are reused does nothing that is not needed, where the survey has found so."""

import pytest
import torch
from torch import Tensor, nn

from dicache import Schedule, apply
from dicache.anatomy import Anatomy, survey
from dicache.schedules import Plan, Rule, Target
from tests.counting import operators
from tests.tiny import Build, anatomy_of, arguments, dit, every_transformer, predict, replay, scheduled
from tests.toys import Chain, PlainBlock, toy_inputs


class CountingBlock(PlainBlock):
    """Adds how many tokens a norm has given."""

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        normed = self.norm1(hidden_states)
        x = hidden_states + self.attn(normed) + normed.shape[1]
        out: Tensor = x + self.ff(self.norm2(x))
        return out


class SplittingBlock(PlainBlock):
    """Takes the tokens of a norm apart, so that one of them alone does not fit."""

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        first, rest = self.norm1(hidden_states).split([1, hidden_states.shape[1] - 1], dim=1)
        x = hidden_states + self.attn(torch.cat([first, rest], dim=1))
        out: Tensor = x + self.ff(self.norm2(x))
        return out


@every_transformer
def test_every_block_of_known_transformers_does_with_one_token(build: Build) -> None:
    anatomy = anatomy_of(build)
    assert all(block.one_token for block in anatomy.blocks)
    assert all(block.one_token for block in Anatomy.from_json(anatomy.to_json()).blocks)


@pytest.mark.parametrize("block", [CountingBlock, SplittingBlock])
def test_a_block_that_looks_at_how_many_tokens_a_norm_gives_is_given_all(block: type[nn.Module]) -> None:
    model, inputs = Chain(block), toy_inputs()
    anatomy = survey(model, inputs)
    assert [b.one_token for b in anatomy.blocks] == [False] * len(anatomy.blocks)
    schedule = Schedule("test", {}, anatomy, Target(), 3, Plan(3, (Rule("reuse", "C.."),)))
    with apply(model, schedule) as cache, torch.no_grad():
        cache.begin_generation()
        outs = []
        for _ in range(3):
            cache.begin_step()
            outs.append(model(*inputs.args, **inputs.kwargs))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_schedule_of_an_older_version_is_replayed_with_all_tokens() -> None:
    content = anatomy_of(dit).to_json()
    for block in content["blocks"]:
        del block["one_token"]
    older = Anatomy.from_json(content)
    assert older == anatomy_of(dit)
    schedule = Schedule("test", {}, older, Target(), 4, Plan(4, (Rule("reuse", "C..."),)))
    model = dit()
    given = arguments(model)
    with apply(model, schedule) as cache:
        old = replay(model, cache, [given] * 3)
    with apply(model, scheduled(dit, Rule("reuse", "C..."))) as cache:
        new = replay(model, cache, [given] * 3)
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


@every_transformer
def test_other_shapes_and_other_times_are_told_apart(build: Build) -> None:
    model = build()
    calls = [(1, 500), (1, 250), (2, 500), (2, 250)]
    given = [arguments(model, batch=batch, timestep=timestep) for batch, timestep in calls]
    want = [predict(model, arguments_) for arguments_ in given]
    with apply(model, scheduled(build, Rule("reuse", "C."))) as cache:
        for arguments_, out in zip(given, want, strict=True):
            for _ in range(2):  # the second time with what the first has left behind
                first, second = replay(model, cache, [arguments_, arguments_])
                assert torch.equal(first, out)
                assert torch.equal(second, out)


def test_blocks_share_the_sines_of_one_timestep_while_nobody_writes_into_it() -> None:
    model = dit()
    given = arguments(model)
    computed = operators(lambda: predict(model, given))["sin"]
    with apply(model, scheduled(dit, Rule("reuse", "C.."))) as cache:
        cache.begin_generation()
        counted = []
        for _ in range(3):
            cache.begin_step()
            counted.append(operators(lambda: predict(model, given))["sin"])
    assert counted == [computed, 1, 1]
    assert computed == len(anatomy_of(dit).blocks) + 1  # and the head


def test_a_timestep_that_is_written_to_between_blocks_is_embedded_anew() -> None:
    model = dit()
    given = arguments(model)
    block = model.get_submodule(anatomy_of(dit).blocks[1].module)

    def later(*_: object) -> None:
        given["timestep"].add_(1)

    block.register_forward_pre_hook(later)
    with apply(model, scheduled(dit, Rule("reuse", "C."))) as cache:
        cache.begin_generation()
        outs = []
        for _ in range(2):
            given["timestep"].fill_(500)
            cache.begin_step()
            outs.append(predict(model, given))
    assert torch.equal(*outs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_sines_that_a_block_writes_into_are_not_shared(mode: type) -> None:
    model = dit()
    given = arguments(model)
    for block in anatomy_of(dit).blocks:  # each works in place on what its embedding begins with
        module = model.get_submodule(f"{block.module}.norm1.emb.timestep_embedder")
        module.register_forward_pre_hook(lambda _, args: (args[0].mul_(0.5),))
    with mode():
        want = model(**given).sample
        with apply(model, scheduled(dit, Rule("reuse", "C."))) as cache:
            cache.begin_generation()
            for _ in range(2):
                cache.begin_step()
                assert torch.equal(model(**given).sample, want)
