"""The model under examination, and what all laws do with it: replay a plan over a few calls, and count what runs."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dicache.anatomy import Anatomy, Block
from dicache.anatomy.inputs import Inputs, moved_inputs
from dicache.anatomy.macs import TOTAL, count_macs
from dicache.anatomy.nested import tensors_of
from dicache.anatomy.overrides import Overrides, forward_of, without_turn
from dicache.runtime.apply import apply
from dicache.runtime.cache import Cache
from dicache.schedules import Plan, Rule, Schedule, Target
from dicache.schedules.policies import Policy

Range = tuple[int, int]
Place = tuple[str, str]  # a module's path, an attribute's name
ROUNDING = 32  # in units of the last place; adding and taking away a delta moves the output by about four of them


@dataclass(frozen=True)
class Subject:
    """A model, one call of it and its anatomy.

    Attributes:
        model: In evaluation mode.
        inputs: Arguments of one call.
        anatomy: As surveyed, or described by hand.
        thorough: Whether every site and every range of blocks is tried, and not one of each kind.
    """

    model: nn.Module
    inputs: Inputs
    anatomy: Anatomy
    thorough: bool = False

    @cached_property
    def calls(self) -> tuple[Inputs, Inputs, Inputs]:
        """Three calls, each with other latents and at another timestep."""
        second = moved_inputs(self.model, self.inputs)
        return self.inputs, second, moved_inputs(self.model, second)

    def call(self, inputs: Inputs) -> list[Tensor]:
        """Return the tensors that the model gives."""
        with torch.no_grad():
            return list(tensors_of(self.model(*inputs.args, **inputs.kwargs)))

    def plan(self, *rules: Rule, steps: int) -> Schedule:
        """Return a schedule of these rules."""
        return Schedule("conformance", {}, self.anatomy, Target(), steps, Plan(steps, rules))

    def policy(self, policy: Policy, *, steps: int) -> Schedule:
        """Return a schedule of a policy."""
        return Schedule("conformance", {}, self.anatomy, Target(), steps, policy=policy)

    def replay(self, schedule: Schedule, calls: Sequence[Inputs]) -> list[list[Tensor]]:
        """Return what the model gives in each call, one a step."""
        with self.steps(schedule) as (_, step):
            return [step(inputs) for inputs in calls]

    @contextmanager
    def steps(self, schedule: Schedule) -> Iterator[tuple[Cache, Callable[[Inputs], list[Tensor]]]]:
        """Give the cache of one generation, and what takes its next step."""
        with apply(self.model, schedule) as cache:
            cache.begin_generation()

            def step(inputs: Inputs) -> list[Tensor]:
                cache.begin_step()
                return self.call(inputs)

            yield cache, step

    def twice(self, *rules: Rule, between: Callable[[], Any] = lambda: None) -> tuple[list[Tensor], list[Tensor], int]:
        """Replay rules over two equal calls; return what each gives, and the multiply-accumulates of the second."""
        return self.twice_by(self.plan(*rules, steps=2), between)

    def twice_by(
        self, schedule: Schedule, between: Callable[[], Any] = lambda: None
    ) -> tuple[list[Tensor], list[Tensor], int]:
        """The same of a schedule."""
        with self.steps(schedule) as (_, step):
            first = step(self.inputs)
            between()
            second: list[Tensor] = []
            macs = count_macs(lambda: second.extend(step(self.inputs)))[TOTAL]
        return first, second, macs

    def representatives(self) -> list[Block]:
        """Return the blocks to try: all of them, or the first and the last of each run of blocks that are alike."""
        if self.thorough:
            return list(self.anatomy.blocks)
        runs = [list(run) for _, run in groupby(self.anatomy.blocks, key=lambda b: replace(b, index=0, position=0))]
        return [block for run in runs for block in (run if len(run) < 3 else (run[0], run[-1]))]

    def ranges(self) -> list[Range]:
        """Return the ranges of more than one block to try that one delta may replace: all, or the widest and a few."""
        found: list[Range] = []
        for start, stop in self.anatomy.segments:
            ends = [(a, b) for a in range(start, stop) for b in range(a + 2, stop + 1)]
            if not self.thorough:
                middle = (start + stop) // 2
                wanted = {(start, stop), (start, middle), (middle, stop), (start + 1, stop - 1), (start, start + 2)}
                ends = [part for part in ends if part in wanted]
            found += [part for part in ends if not self.anatomy.obstacle(*part, delta=True)]
        return found

    def counted_norms(self) -> Any:
        """Return a context that counts the calls of the norms that feed nothing but branches, by path."""
        return _counting(self.model, [f"{b.module}.{path}" for b in self.anatomy.blocks for path in b.norms])


@contextmanager
def _counting(model: nn.Module, paths: Sequence[str]) -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()

    def counted(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            counts[path] += 1
            return forward(*args, **kwargs)

        return run

    with Overrides() as overrides:
        for path in paths:
            module = model.get_submodule(without_turn(path))
            overrides.set(module, counted(path, forward_of(module)))
        yield counts


def attributes(model: nn.Module) -> dict[Place, Any]:
    """Return what hangs on each module of a model, by its path and the attribute's name."""
    return {(path, name): value for path, part in model.named_modules() for name, value in vars(part).items()}


def error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Return the norm of the difference of outputs, relative to that of what is wanted."""
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(got, want, strict=True))
    size = sum(float(b.double().square().sum()) for b in want)
    return math.sqrt(apart / size) if size else math.inf if apart else 0.0


def rounding(tensors: Sequence[Tensor]) -> float:
    """Return the relative error that is put down to rounding in the precision of outputs."""
    return ROUNDING * max(torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point())
