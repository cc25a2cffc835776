"""Reuse written out around a plain model's blocks, for calls whose steps and passes are known beforehand."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from dicache.anatomy import Anatomy, Block
from dicache.anatomy.watching import signature

Forward = Callable[..., Any]


class ByHand:
    """Makes a model compute or reuse all its branches, or the rows of blocks, as letters say.

    Branches are all computed; what a reused one returns is then overwritten by what it returned before. A pass that was
    not called at the step before has nothing to reuse, and is given what it computes.

    Args:
        model: Plain; its modules keep their new forwards.
        anatomy: The model's.
        letters: A letter a step, C to compute, `.` to reuse; for a pass by its name, the others compute.
        turns: The step and the pass of each call, in order; the next generation begins them again.
        whole: Whether what is reused is what rows of blocks add to what enters them, instead of what branches return.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        letters: dict[str, str],
        turns: Iterable[tuple[int, str]],
        *,
        whole: bool = False,
    ) -> None:
        self.letters, self.turns = letters, list(turns)
        self.calls = 0
        self.kept: dict[tuple[str, Any], Any] = {}
        self.latest: dict[str, int] = {}
        self.entered: dict[str, Tensor] = {}
        forward = model.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            self.begin()
            out = forward(*args, **kwargs)
            self.calls += 1
            return out

        for block in anatomy.blocks:
            for site in () if whole else block.sites:
                module = model.get_submodule(f"{block.module}.{site.module}")
                module.forward = self.of_branch(block.key(site), module.forward)
        for row in anatomy.segments if whole else ():
            for block in anatomy.blocks[slice(*row)]:
                module = model.get_submodule(block.module)
                module.forward = self.of_block(row, block, list(signature(module).parameters), module.forward)
        model.forward = run

    def begin(self) -> None:
        turn = self.calls % len(self.turns)
        if turn == 0:
            self.kept.clear()
            self.latest.clear()
        self.step, self.name = self.turns[turn]
        if self.latest.get(self.name) != self.step - 1:
            self.kept = {key: value for key, value in self.kept.items() if key[0] != self.name}
        self.latest[self.name] = self.step

    def reuses(self, key: Any) -> bool:
        letters = self.letters.get(self.name, "C" * len(self.turns))
        return letters[self.step] == "." and (self.name, key) in self.kept

    def of_branch(self, key: str, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            if not self.reuses(key):
                self.kept[self.name, key] = out
            return self.kept[self.name, key]

        return run

    def of_block(self, row: tuple[int, int], block: Block, parameters: list[str], forward: Forward) -> Forward:
        """Return the forward of a block in a row of them: the first adds what all of them did, the others nothing."""
        names: tuple[str | None, ...] = (block.returns,) if isinstance(block.returns, str) else block.returns

        def run(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            into = {name: given[name] for name in names if name}
            if block.index == row[0]:
                self.entered = into
            if self.reuses(row):
                change = self.kept[self.name, row] if block.index == row[0] else {}
                made = {name: value + change[name] if name in change else value for name, value in into.items()}
            else:
                out = forward(*args, **kwargs)
                outputs = out if isinstance(out, tuple) else (out,)
                made = {name: value for name, value in zip(names, outputs, strict=True) if name}
            if block.index == row[1] - 1 and not self.reuses(row):
                self.kept[self.name, row] = {name: made[name] - self.entered[name] for name in into}
            packed = tuple(made[name] if name else None for name in names)
            return packed[0] if isinstance(block.returns, str) else packed

        return run
