"""Models that are odd as a whole: they are refused, or what is shared is left alone."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dicache.anatomy import AnatomyError, survey
from dicache.conformance import LAWS, Subject
from tests.toys import WIDTH, Chain, PlainBlock, toy_inputs


class Adding(PlainBlock):
    """Adds its attention to the very tensor that it was given."""

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        hidden_states += self.attn(self.norm1(hidden_states))
        out: Tensor = hidden_states + self.ff(self.norm2(hidden_states))
        return out


class Scaling(PlainBlock):
    """Scales what its attention gave where it stands."""

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        x = hidden_states + self.attn(self.norm1(hidden_states)).mul_(2)
        out: Tensor = x + self.ff(self.norm2(x))
        return out


class Averaging(PlainBlock):
    """Keeps a running mean of its stream."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        self.mean.lerp_(hidden_states.mean((0, 1)), 0.1)
        return super().forward(hidden_states, skip)


class Remembering(PlainBlock):
    """Leaves its output where the model's head looks for it."""

    last: Tensor

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        self.last = super().forward(hidden_states, skip)
        return self.last + 0


class Drawing(Chain):
    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states, timestep, encoder_hidden_states)
        return out + torch.rand_like(out)


class ReadingTheLast(Chain):
    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states, timestep, encoder_hidden_states)
        first: Any = self.blocks[0]
        return out + first.last  # type: ignore[no-any-return] # a tensor


@dataclass
class Out:
    sample: Any


class ReadingTheLastIntoAnOutput(ReadingTheLast):
    """Returns no class of diffusers, but a dataclass of its own."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        return Out(super().forward(hidden_states, timestep, encoder_hidden_states))


class Hiding(Chain):
    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        out = super().forward(hidden_states, timestep, encoder_hidden_states)
        return {out}


def sharing(name: str) -> Chain:
    """Return a chain whose first two blocks have a module in common."""
    model = Chain()
    setattr(model.blocks[1], name, getattr(model.blocks[0], name))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Chain(Adding), r"blocks\.0 writes into its hidden_states"),
        (Chain(Scaling), r"blocks\.0 writes into what its attn gives"),
        (Chain(Averaging), r"a call of the Chain changes its buffer blocks\.0\.mean"),
        (sharing("attn"), r"blocks\.0\.attn\S* is a part of other modules as well"),
        (Drawing(), "the Drawing gives another output each time"),
        (ReadingTheLast(Remembering), "a block leaves something behind that it does not return"),
        (ReadingTheLastIntoAnOutput(Remembering), "a block leaves something behind that it does not return"),
        (Hiding(), "the Hiding returns no tensor that can be found"),
    ],
    ids=["stream", "branch", "buffer", "shared", "random", "attribute", "dataclass", "hidden"],
)
def test_a_model_whose_blocks_do_more_than_return_is_refused(model: nn.Module, message: str) -> None:
    keys = {path: set(vars(part)) for path, part in model.named_modules()}
    with pytest.raises(AnatomyError, match=message):
        survey(model, toy_inputs())
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert {path: set(vars(part)) - {"last"} for path, part in model.named_modules()} == keys


class Way(Enum):
    BEFORE, BOTH = 1, 2


class Wired(PlainBlock):
    """Adds what its first norm gives to the stream as well, if it is told to."""

    way = Way.BEFORE

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        normed = self.norm1(hidden_states)
        x = hidden_states + self.attn(normed) + (normed if self.way is Way.BOTH else 0)
        out: Tensor = x + self.ff(self.norm2(x))
        return out


class Routed(PlainBlock):
    """Adds something where its norm gives a large number, which it does not in the call that is surveyed."""

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        normed = self.norm1(hidden_states)
        x = hidden_states + self.attn(normed) + (normed > 4)
        out: Tensor = x + self.ff(self.norm2(x))
        return out


def wired() -> Chain:
    model = Chain(Wired)
    model.blocks[1].way = Way.BOTH  # type: ignore[assignment]
    return model


class Shared(Chain):
    """Its head uses the first norm of its first block."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        first: Any = self.blocks[0]
        out: Tensor = first.norm1(super().forward(hidden_states, timestep, encoder_hidden_states))
        return out


@pytest.mark.parametrize(
    ("model", "norms"),
    [
        (wired(), [{"norm1", "norm2"}, {"norm2"}, {"norm1", "norm2"}]),
        (Chain(Routed), [{"norm2"}] * 3),
        (Shared(), [set(), {"norm1", "norm2"}, {"norm1", "norm2"}]),
        (sharing("norm1"), [{"norm2"}, {"norm2"}, {"norm1", "norm2"}]),
    ],
    ids=["a setting", "a limit", "the head", "another block"],
)
def test_a_norm_that_something_else_reads_is_not_left_out(model: nn.Module, norms: list[set[str]]) -> None:
    anatomy = survey(model, toy_inputs())
    assert [block.norms.keys() for block in anatomy.blocks] == norms
    for law in LAWS.values():
        law(Subject(model, toy_inputs(), anatomy, thorough=True))
