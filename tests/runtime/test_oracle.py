"""Random plans against an interpreter that computes everything, keeps everything and looks nothing ahead."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dicache import Schedule, apply
from dicache.schedules import Plan, PlanError, Rule
from tests.tiny import Build, anatomy_of, both_models, sample, scheduled

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
                    branch=draw.choice(["*", "attn", "mlp"]) if action == "reuse" else "*",
                )
            )
        try:
            schedule = scheduled(build, *rules)
        except PlanError:  # two skips overlap
            continue
        if schedule.macs_fraction() < 1:
            return schedule


class Interpreter:
    """Overwrites what the modules of a plain model return with what a plan says they should."""

    def __init__(self, build: Build, plan: Plan) -> None:
        self.model, self.anatomy = build(), anatomy_of(build)
        self.letters = plan.table(self.anatomy)
        self.ranges = {
            rule.block_range(self.anatomy): [letter == "." for letter in rule.steps]
            for rule in plan.rules
            if rule.action == "skip"
        }
        for rule in plan.rules:  # two rules may name one range
            if rule.action == "skip":
                merged = self.ranges[rule.block_range(self.anatomy)]
                self.ranges[rule.block_range(self.anatomy)] = [
                    acts or letter == "." for acts, letter in zip(merged, rule.steps, strict=True)
                ]
        self.step = 0
        self.kept: dict[str, Tensor] = {}
        self.deltas: dict[tuple[int, int], Tensor] = {}
        self.entered: dict[int, Tensor] = {}
        self.left: dict[int, Tensor] = {}
        for block in self.anatomy.blocks:
            self.model.get_submodule(block.module).register_forward_hook(self.at_block(block.index))
            for site in block.sites:
                self.model.get_submodule(f"{block.module}.{site.module}").register_forward_hook(
                    self.at_site(block.key(site))
                )
        self.model.register_forward_hook(lambda *_: self.end_step())

    def at_site(self, key: str) -> Any:
        def overwrite(_module: Any, _args: Any, out: Tensor) -> Tensor:
            if self.letters[key][self.step] == "C":
                self.kept[key] = out
            return self.kept.get(key, out) if self.letters[key][self.step] == "R" else out

        return overwrite

    def at_block(self, index: int) -> Any:
        def overwrite(_module: Any, args: Any, out: Tensor) -> Tensor:
            self.entered[index] = args[0]
            for (start, stop), acts in self.ranges.items():
                if acts[self.step] and start <= index < stop:
                    out = args[0] + self.deltas[start, stop] if index == start else args[0]
            self.left[index] = out
            return out

        return overwrite

    def end_step(self) -> None:
        skipped = {i for (start, stop), acts in self.ranges.items() if acts[self.step] for i in range(start, stop)}
        for start, stop in self.ranges:
            if not skipped & set(range(start, stop)):
                self.deltas[start, stop] = self.left[stop - 1] - self.entered[start]
        self.step += 1


@both_models
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


@both_models
def test_the_random_plans_do_something(build: Build) -> None:
    schedules = [random_schedule(build, seed) for seed in range(12)]
    letters = "".join("".join(schedule.table().values()) for schedule in schedules)
    assert {"C", "R", "S"} == set(letters)
