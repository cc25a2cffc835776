"""The laws notice what they are to notice: each is broken here by a model or an anatomy made for it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

from dicache.anatomy import Anatomy, Inputs, describe, survey
from dicache.conformance import LAWS, LawError, Subject
from dicache.runtime.cache import Cache
from tests.tiny import Build, arguments, dit, flux, pixart, sd3, sd35, unet
from tests.toys import CHAINS, Chain, FeedForward, ParallelBlock, PlainBlock, every_chain, toy_inputs


@every_chain
@pytest.mark.parametrize("law", LAWS)
def test_every_law_holds_for_toys(chain: str, law: str) -> None:
    model = Chain(**CHAINS[chain])
    assert LAWS[law](Subject(model, toy_inputs(), survey(model, toy_inputs()), thorough=True)) > 0


@pytest.mark.parametrize("build", [dit, pixart, sd3, sd35, flux, unet])
@pytest.mark.parametrize("law", LAWS)
def test_a_sample_of_blocks_and_ranges_is_enough_for_a_model_of_ones_own(build: Build, law: str) -> None:
    model = build()
    inputs = Inputs((), arguments(model))
    anatomy = survey(model, inputs)
    cases = LAWS[law](Subject(model, inputs, anatomy))
    assert cases > 0 or (anatomy.links and law in ("skip body", "decide"))


class Forgetful(Chain):
    """Gives another output each time."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return super().forward(*args, **kwargs) + self.calls


class Writing(PlainBlock):
    """Adds its stream to what its attention gave, in place."""

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.attn(self.norm1(hidden_states)).add_(hidden_states)
        out: Tensor = x + self.ff(self.norm2(x))
        return out


class Layer(FeedForward):
    """An MLP with its residual inside."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Layered(PlainBlock):
    """Gives the stream to its MLP, and gives on what that returns."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = Layer()

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        out: Tensor = self.ff(hidden_states + self.attn(self.norm1(hidden_states)))
        return out


class Outside(PlainBlock):
    """Runs the matrices of its MLP itself, and the module only for its output."""

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        self.ff.up(hidden_states)
        return super().forward(hidden_states, skip)


def of_plain(model: nn.Module) -> Anatomy:
    return replace(survey(Chain(PlainBlock), toy_inputs()), model=type(model).__name__)


def described(model: nn.Module) -> Anatomy:
    return describe(model, toy_inputs(), {"blocks": {"attn": "attn", "mlp": "ff"}}, returns={"blocks": "hidden_states"})


def too_much_work(model: nn.Module) -> Anatomy:
    anatomy = survey(model, toy_inputs())
    first, *rest = anatomy.blocks
    return replace(anatomy, blocks=(replace(first, macs=first.macs + 1), *rest))


def one_segment(model: nn.Module) -> Anatomy:
    return replace(survey(model, toy_inputs()), segments=((0, 3),))


def a_norm_more(model: nn.Module) -> Anatomy:
    anatomy = survey(model, toy_inputs())
    blocks = tuple(replace(b, norms={**b.norms, "norm_after": ("attn", "mlp")}) for b in anatomy.blocks)
    return replace(anatomy, blocks=blocks)


@pytest.mark.parametrize(
    ("law", "model", "anatomy", "message"),
    [
        ("compute", Forgetful(), of_plain, "with everything computed the output of step 0 differs"),
        ("reuse one", Chain(Outside), of_plain, r"with 0\.attn reused the model runs \d+, needed \d+"),
        ("reuse all", Chain(ParallelBlock), a_norm_more, "with every site reused and equal inputs the output differs"),
        ("skip block", Chain(), too_much_work, r"with blocks 0 skipped the model runs \d+, needed \d+"),
        ("skip range", Chain(between=1), one_segment, "with blocks 0-1 skipped"),
        (
            "skip range",
            Chain(long_skip=True),
            one_segment,
            "with blocks 0-1 skipped and equal inputs the output differs",
        ),
        ("skip body", Forgetful(), of_plain, r"with blocks \* skipped and equal inputs the output differs"),
        ("stale", Chain(Layered), described, "the stream leaves the blocks as it did before, with other latents"),
        ("keep", Chain(Writing), of_plain, r"what is kept of 0\.attn was written into by the model"),
    ],
)
def test_a_law_is_broken(law: str, model: nn.Module, anatomy: Callable[[nn.Module], Anatomy], message: str) -> None:
    subject = Subject(model, toy_inputs(), anatomy(model), thorough=True)
    with pytest.raises(LawError, match=message):
        LAWS[law](subject)


def test_a_cache_that_leaves_something_behind_breaks_the_law_of_restoring(monkeypatch: pytest.MonkeyPatch) -> None:
    detach = Cache.detach

    def untidy(cache: Cache) -> None:
        detach(cache)
        vars(cache._model)["left"] = 1

    monkeypatch.setattr(Cache, "detach", untidy)
    model = Chain()
    with pytest.raises(LawError, match="after a generation left of the model is not as it was"):
        LAWS["restore"](Subject(model, toy_inputs(), survey(model, toy_inputs())))
