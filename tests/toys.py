"""Toy transformers, each with one peculiarity of the real ones, and anatomies written by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dicache.anatomy import Anatomy, Block, Site
from dicache.anatomy.inputs import Inputs

WIDTH = 8
TOKENS = 5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.out(x) + x.mean(1, keepdim=True)


class JointAttention(Attention):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Any:
        assert context is not None
        both = super().forward(torch.cat([context, x], dim=1))
        return both[:, context.shape[1] :], both[:, : context.shape[1]]


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


class PlainBlock(nn.Module):
    """Each branch behind a norm of its own; may add what an earlier block made."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.ff = Attention(), FeedForward()

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        x = hidden_states if skip is None else hidden_states + skip
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.ff(self.norm2(x))
        return out


class ParallelBlock(nn.Module):
    """Both branches behind one norm, and another norm on the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.ff = Attention(), FeedForward()

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.norm(hidden_states)
        out: Tensor = self.norm_after(hidden_states + self.attn(x) + self.ff(x))
        return out


class GridBlock(PlainBlock):
    """Gives its MLP the tokens as the picture that they are, as Sana does."""

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        x = hidden_states + self.attn(self.norm1(hidden_states))
        picture = self.norm2(x).unflatten(1, (TOKENS, 1))
        out: Tensor = x + self.ff(picture).flatten(1, 2)
        return out


class DualBlock(nn.Module):
    """Image and text streams that meet in one attention and have an MLP each."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff, self.ff_context = JointAttention(), FeedForward(), FeedForward()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        for_image, for_text = self.attn(hidden_states, context=encoder_hidden_states)
        x, c = hidden_states + for_image, encoder_hidden_states + for_text
        return c + self.ff_context(c), x + self.ff(x)


class SharedBlock(nn.Module):
    """Image and text streams that meet in one attention and go through one MLP, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff = JointAttention(), FeedForward()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        for_image, for_text = self.attn(hidden_states, context=encoder_hidden_states)
        x, c = hidden_states + for_image, encoder_hidden_states + for_text
        return x + self.ff(x), c + self.ff(c)


class FusedBlock(nn.Module):
    """Attention and MLP side by side that leave through one matrix; image and text in a row, and apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn, self.up, self.act = Attention(), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU()
        self.out = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        x = self.norm(both)
        both = both + self.out(torch.cat([self.attn(x), self.act(self.up(x))], dim=2))
        text = encoder_hidden_states.shape[1]
        return both[:, :text], both[:, text:]


class InlineBlock(nn.Module):
    """An attention whose output projection, and an MLP whose matrices, the block applies itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.attn_out = Attention(), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states + self.attn_out(self.attn(self.norm1(hidden_states)))
        y = self.norm2(x)
        out: Tensor = x + self.down(torch.tanh(self.gate(y)) * self.up(y))
        return out


class ClosedBlock(PlainBlock):
    """A matrix at its very end, through which the stream itself leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        out: Tensor = self.out(super().forward(hidden_states, skip))
        return out


class LonelyBlock(nn.Module):
    """An attention and nothing beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention()

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = hidden_states + self.attn(self.norm(hidden_states))
        return out


class Chain(nn.Module):
    """Blocks one after another.

    Args:
        block: Class of the three blocks.
        between: Number of blocks after which a matrix acts on the stream; 0 for none.
        long_skip: Whether the last block is given what the first one made.
        refines: How often a block of its own refines the text, which is then added to the stream.
        repeats: How often each block is called.

    Attributes:
        left_out: Blocks that are not called.
    """

    left_out: tuple[int, ...] = ()

    def __init__(
        self,
        block: type[nn.Module] = PlainBlock,
        *,
        between: int = 0,
        long_skip: bool = False,
        refines: int = 0,
        repeats: int = 1,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.text_blocks = nn.ModuleList([PlainBlock()] if refines else [])
        self.adapter = nn.Linear(WIDTH, WIDTH)
        self.between, self.long_skip, self.repeats, self.refines = between, long_skip, repeats, refines
        self.eval()

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = hidden_states + timestep[:, None, None] / 1000
        for refiner in self.text_blocks:
            for turn in range(self.refines):
                x = x + refiner(encoder_hidden_states + turn).mean(1, keepdim=True)
        first: Tensor | None = None
        context = encoder_hidden_states
        for index, block in enumerate(self.blocks):
            if index in self.left_out:
                continue
            if self.between and index == self.between:
                x = self.adapter(x)
            for _ in range(self.repeats):
                if isinstance(block, SharedBlock):
                    x, context = block(x, encoder_hidden_states=context)
                elif isinstance(block, (DualBlock, FusedBlock)):
                    context, x = block(x, encoder_hidden_states=context)
                elif self.long_skip and index == 2:
                    x = block(x, skip=first)
                else:
                    x = block(x)
            first = x if index == 0 else first
        return x


CHAINS: dict[str, dict[str, Any]] = {
    "plain": {"block": PlainBlock},
    "parallel": {"block": ParallelBlock},
    "dual": {"block": DualBlock},
    "grid": {"block": GridBlock},
    "two segments": {"between": 1},
    "long skip": {"long_skip": True},
    "refined": {"refines": 1},
    "refined twice": {"refines": 2},
    "fused": {"block": FusedBlock},
    "shared": {"block": SharedBlock},
    "inline": {"block": InlineBlock},
    "closed": {"block": ClosedBlock},
    "lonely": {"block": LonelyBlock},
}
every_chain = pytest.mark.parametrize("chain", CHAINS)


def toy_inputs(*, batch: int = 2, seed: int = 0, timestep: float = 500) -> Inputs:
    """Return what a call of a chain takes: five tokens of image and three of text."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, TOKENS, WIDTH, generator=generator)
    text = torch.randn(batch, 3, WIDTH, generator=generator)
    return Inputs((latents,), {"timestep": torch.full((batch,), timestep), "encoder_hidden_states": text})


def written(blocks: int, *segments: tuple[int, int]) -> Anatomy:
    """Return an anatomy of blocks with an attention of 30 MACs and an MLP of 60, 100 a block, 200 outside of them."""
    sites = (Site("attn", "attn1", 30), Site("mlp", "ff", 60))
    return Anatomy(
        model="Toy",
        blocks=tuple(Block(i, "blocks", i, "PlainBlock", "hidden_states", sites, macs=100) for i in range(blocks)),
        segments=segments or ((0, blocks),),
        macs=100 * blocks + 200,
        latents=(4, 8, 8),
    )
