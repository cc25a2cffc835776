"""Random plans against an interpreter that computes everything, keeps everything and looks nothing ahead."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dicache import Schedule, apply
from dicache.anatomy import Block
from dicache.anatomy.parts import BRANCHES
from dicache.anatomy.watching import signature
from dicache.schedules import Plan, PlanError, Rule
from tests.tiny import Build, anatomy_of, every_model, sample, scheduled

LENGTH = 7


def random_schedule(build: Build, seed: int) -> Schedule:
    """Return a schedule of one to four random rules, at least one of which acts."""
    draw = random.Random(seed)
    count = len(anatomy_of(build).blocks)
    while True:
        rules = []
        for _ in range(draw.randint(1, 4)):
            action = draw.choice(["reuse", "skip"])
            first = draw.randrange(count)
            rules.append(
                Rule(
                    action,  # type: ignore[arg-type]
                    "C" + "".join(draw.choice("C.") for _ in range(LENGTH - 1)),
                    blocks=draw.choice(["*", f"{first}-{draw.randrange(first, count)}"]),
                    branch=draw.choice(["*", *BRANCHES]) if action == "reuse" else "*",
                )
            )
        try:
            schedule = scheduled(build, *rules)
        except PlanError:  # two skips overlap, or there is no such branch
            continue
        if schedule.macs_fraction() < 1:
            return schedule


class Interpreter:
    """Overwrites what the modules of a plain model return with what a plan says they should."""

    def __init__(self, build: Build, plan: Plan) -> None:
        self.model, self.anatomy = build(), anatomy_of(build)
        self.letters = plan.table(self.anatomy)
        self.ranges: dict[tuple[int, int], list[bool]] = {}  # within one segment -> whether it is skipped, by step
        for rule in plan.rules:
            start, stop = rule.block_range(self.anatomy)
            for first, last in self.anatomy.segments if rule.action == "skip" else ():
                part = (max(start, first), min(stop, last))
                if part[0] < part[1]:
                    acts = self.ranges.get(part, [False] * LENGTH)  # two rules may name one range
                    self.ranges[part] = [a or letter == "." for a, letter in zip(acts, rule.steps, strict=True)]
        self.step = 0
        self.kept: dict[str, Any] = {}
        self.deltas: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.entered: dict[int, dict[str, Tensor]] = {}
        self.left: dict[int, dict[str, Tensor]] = {}
        for block in self.anatomy.blocks:
            module = self.model.get_submodule(block.module)
            module.register_forward_hook(self.at_block(block, list(signature(module).parameters)), with_kwargs=True)
            for site in block.sites:
                self.model.get_submodule(f"{block.module}.{site.module}").register_forward_hook(
                    self.at_site(block.key(site))
                )
        self.model.register_forward_hook(lambda *_: self.end_step())

    def at_site(self, key: str) -> Any:
        def overwrite(_module: Any, _args: Any, out: Any) -> Any:
            if self.letters[key][self.step] == "C":
                self.kept[key] = out
            return self.kept.get(key, out) if self.letters[key][self.step] == "R" else out

        return overwrite

    def at_block(self, block: Block, parameters: list[str]) -> Any:
        index = block.index
        names = (block.returns,) if isinstance(block.returns, str) else block.returns

        def overwrite(_module: Any, args: Any, kwargs: Any, out: Any) -> Any:
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            into = {name: given[name] for name in names if name}
            outputs = out if isinstance(out, tuple) else (out,)
            made = {name: value for name, value in zip(names, outputs, strict=True) if name}
            for (start, stop), acts in self.ranges.items():
                if acts[self.step] and start <= index < stop:
                    made = dict(into)
                    if index == start:
                        made |= {n: into[n] + d for n, d in self.deltas[start, stop].items() if n in into}
            self.entered[index], self.left[index] = into, made
            packed = tuple(made[name] if name else None for name in names)
            return packed if isinstance(out, tuple) else packed[0]

        return overwrite

    def end_step(self) -> None:
        skipped = {i for (start, stop), acts in self.ranges.items() if acts[self.step] for i in range(start, stop)}
        for start, stop in self.ranges:
            if not skipped & set(range(start, stop)):
                left, entered = self.left[stop - 1], self.entered[start]
                self.deltas[start, stop] = {name: value - entered[name] for name, value in left.items()}
        self.step += 1


@every_model
@pytest.mark.parametrize("seed", range(12))
def test_a_random_plan_gives_what_the_interpreter_gives(build: Build, seed: int) -> None:
    schedule = random_schedule(build, seed)
    assert schedule.plan is not None
    want = sample(Interpreter(build, schedule.plan).model, steps=LENGTH)
    model = build()
    with apply(model, schedule) as cache:
        got = sample(model, cache, steps=LENGTH)
        assert cache.stats.bytes_held == 0
    assert torch.equal(got, want)


@every_model
def test_the_random_plans_do_something(build: Build) -> None:
    schedules = [random_schedule(build, seed) for seed in range(12)]
    letters = "".join("".join(schedule.table().values()) for schedule in schedules)
    assert {"C", "R", "S"} == set(letters)
