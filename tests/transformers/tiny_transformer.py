"""What an entry of the tables of tiny transformers states."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import diffusers.models.transformers as transformers
import pytest
import torch
from torch import Tensor, nn

from dicache.anatomy.inputs import Inputs
from tests.tiny import randomised

BATCH = 2


class Given:
    """Draws the arguments of a call: random numbers that are the same each time."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def noise(self, *shape: int) -> Tensor:
        """Return standard normal numbers."""
        return torch.randn(shape, generator=self._generator)

    def tokens(self, *shape: int, below: int) -> Tensor:
        """Return whole numbers from 0 to `below` - 1."""
        return torch.randint(below, shape, generator=self._generator)


@dataclass(frozen=True)
class Tiny:
    """A transformer of diffusers, small, with random weights, and what its anatomy must be, as read in its source.

    Attributes:
        kind: Name of the class.
        config: Arguments of its constructor. At least three blocks in each list, where the class lets.
        arguments: Makes the keyword arguments of one call, batch 2; numbers of tokens and widths all differ.
        blocks: Modules of the main blocks, in the order in which they run, as ranges of a list ->
            the branches of each of them: `{"transformer_blocks.0-2": "attn cross_attn mlp"}`.
        segments: Lengths of the runs of blocks that one delta may replace.
    """

    kind: str
    config: Mapping[str, Any]
    arguments: Callable[[Given], dict[str, Any]]
    blocks: Mapping[str, str]
    segments: tuple[int, ...]

    @cached_property
    def type(self) -> Any:
        """The class; a test is skipped where the installed diffusers does not have it."""
        import diffusers

        if not hasattr(diffusers, self.kind) and not hasattr(transformers, self.kind):
            pytest.skip(f"diffusers {diffusers.__version__} has no {self.kind}")
        return getattr(diffusers, self.kind, None) or getattr(transformers, self.kind)

    def every_block(self) -> Iterator[tuple[str, str]]:
        """Go through the blocks: the module of each, and its branches."""
        for modules, branches in self.blocks.items():
            path, _, positions = modules.rpartition(".")
            first, _, last = positions.partition("-")
            for position in range(int(first), int(last or first) + 1):
                yield f"{path}.{position}", branches

    def build(self) -> nn.Module:
        torch.manual_seed(0)  # of buffers that are drawn
        return randomised(self.type(**self.config))

    def inputs(self, seed: int = 0) -> Inputs:
        return Inputs((), self.arguments(Given(seed)))
