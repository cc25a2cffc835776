"""Random plans against an interpreter that computes everything, keeps everything and looks nothing ahead."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import factorial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dicache import Schedule, apply
from dicache.anatomy import Block
from dicache.anatomy.parts import BRANCHES
from dicache.anatomy.watching import signature
from dicache.schedules import Plan, PlanError, Rule
from tests.tiny import Build, anatomy_of, every_model, sample, scheduled

LENGTH = 7


def random_schedule(build: Build, seed: int, *, predictors: bool = False) -> Schedule:
    """Return a schedule of one to four random rules, at least one of which acts."""
    draw = random.Random(seed)
    anatomy = anatomy_of(build)
    count = len(anatomy.blocks)
    while True:
        rules = []
        for _ in range(draw.randint(1, 4)):
            action = draw.choice(["reuse", "skip"])
            first = draw.randrange(count)
            span = f"{first}-{draw.randrange(first, count)}"
            if action == "skip" and anatomy.links:  # few ranges of a U-Net can be skipped
                start, stop = anatomy.enclosed(draw.randrange(len(anatomy.links)))
                span = f"{start}-{stop - 1}"
            rule = Rule(
                action,  # type: ignore[arg-type]
                "C" + "".join(draw.choice("C.") for _ in range(LENGTH - 1)),
                blocks=draw.choice(["*", span]),
                branch=draw.choice(["*", *BRANCHES]) if action == "reuse" else "*",
            )
            if predictors and draw.random() < 0.8:
                feature = action == "skip" and draw.random() < 0.4
                rule = replace(rule, predictor="feature") if feature else expanded(rule, draw.randrange(4))
            rules.append(rule)
        try:
            schedule = scheduled(build, *rules)
        except PlanError:  # two skips overlap, or there is no such branch, or two rules do not agree
            continue
        if schedule.macs_fraction() < 1:
            return schedule


def expanded(rule: Rule, order: int) -> Rule:
    return replace(rule, predictor="taylor", order=order)


def expansion(computed: Sequence[tuple[int, Any]], order: int, step: int) -> Any:
    """Return TaylorSeer's prediction as it is published, from a table of differences made at every computed step.

    Args:
        computed: Steps and what was computed at them, the first one first.
        order: Of the expansion.
        step: The one to predict.
    """
    table: list[Any] = []
    last = 0
    for now, output in computed:
        factors = [output]
        for j in range(min(order, len(table))):
            factors.append((factors[j] - table[j]) / (now - last))
        table, last = factors, now
    return sum(factor * (step - last) ** j / factorial(j) for j, factor in enumerate(table))


def nested(computed: Sequence[tuple[int, Any]], act: Callable[[Any], Any]) -> Any:
    """Act on the tensors at each place of equally nested outputs, and on nothing else."""
    first = computed[0][1]
    if isinstance(first, dict):
        return {key: nested([(step, out[key]) for step, out in computed], act) for key in first}
    if isinstance(first, tuple):
        return tuple(nested([(step, out[k]) for step, out in computed], act) for k in range(len(first)))
    return act(computed) if isinstance(first, Tensor) else first


class Interpreter:
    """Overwrites what the modules of a plain model return with what a plan says they should."""

    def __init__(self, model: nn.Module, build: Build, plan: Plan) -> None:
        self.model, self.anatomy = model, anatomy_of(build)
        self.letters, self.rules = plan.table(self.anatomy), plan.rules
        self.ranges: dict[tuple[int, int], list[bool]] = {}  # within one segment -> whether it is skipped, by step
        for rule in plan.rules:
            start, stop = rule.block_range(self.anatomy)
            for first, last in self.anatomy.segments if rule.action == "skip" else ():
                part = (max(start, first), min(stop, last))
                if part[0] < part[1]:
                    acts = self.ranges.get(part, [False] * LENGTH)  # two rules may name one range
                    self.ranges[part] = [a or letter == "." for a, letter in zip(acts, rule.steps, strict=True)]
        self.step = 0
        self.kept: dict[Any, list[tuple[int, Any]]] = {}  # by site or range: all that was ever computed, and when
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
                self.kept.setdefault(key, []).append((self.step, out))
            return self.stand_in(key) if self.letters[key][self.step] == "R" else out

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
                if self.anatomy.links:  # all of a U-Net's range runs; what leaves it is overwritten
                    if acts[self.step] and index == stop - 1:
                        entered = into if start == index else self.entered[start]
                        made = self.replaced((start, stop), dict.fromkeys(made, *entered.values()))
                elif acts[self.step] and start <= index < stop:
                    made = dict(into)
                    if index == start:
                        made |= self.replaced((start, stop), into)
            self.entered[index], self.left[index] = into, made
            packed = tuple(made[name] if name else None for name in names)
            return packed if isinstance(out, tuple) else packed[0]

        return overwrite

    def end_step(self) -> None:
        skipped = {i for (start, stop), acts in self.ranges.items() if acts[self.step] for i in range(start, stop)}
        for start, stop in self.ranges:
            if not skipped & set(range(start, stop)):
                left, entered = self.left[stop - 1], self.entered[start]
                if not self.is_feature((start, stop)):
                    if self.anatomy.links:
                        entered = dict.fromkeys(left, *entered.values())
                    left = {name: value - entered[name] for name, value in left.items()}
                self.kept.setdefault((start, stop), []).append((self.step, left))
        self.step += 1

    def stand_in(self, key: Any) -> Any:
        order = next(rule.order for rule in self.rules_for(key) if rule.steps[self.step] == ".")
        return nested(self.kept[key], lambda computed: expansion(computed, order, self.step))

    def replaced(self, part: tuple[int, int], into: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: value for name, value in self.stand_in(part).items() if name in into}
        return kept if self.is_feature(part) else {name: into[name] + value for name, value in kept.items()}

    def is_feature(self, part: tuple[int, int]) -> bool:
        return any(rule.predictor == "feature" and "." in rule.steps for rule in self.rules_for(part))

    def rules_for(self, key: Any) -> list[Rule]:
        """Return the rules for a site, or for a range of blocks inside a segment."""
        found = []
        for rule in self.rules:
            start, stop = rule.block_range(self.anatomy)
            parts = [(max(start, first), min(stop, last)) for first, last in self.anatomy.segments]
            if isinstance(key, tuple):
                mine = rule.action == "skip" and key in parts
            else:
                block, _, branch = key.partition(".")
                mine = rule.action == "reuse" and start <= int(block) < stop and rule.covers(branch)
            found += [rule] if mine else []
        return found


@every_model
@pytest.mark.parametrize("seed", range(12))
def test_a_random_plan_gives_what_the_interpreter_gives(build: Build, seed: int) -> None:
    schedule = random_schedule(build, seed)
    assert schedule.plan is not None
    want = sample(Interpreter(build(), build, schedule.plan).model, steps=LENGTH)
    model = build()
    with apply(model, schedule) as cache:
        got = sample(model, cache, steps=LENGTH)
        assert cache.stats.bytes_held == 0
    assert torch.equal(got, want)


@every_model
@pytest.mark.parametrize("seed", range(12))
def test_random_predictors_give_what_the_interpreter_gives(build: Build, seed: int) -> None:
    schedule = random_schedule(build, 100 + seed, predictors=True)
    assert schedule.plan is not None
    want = sample(Interpreter(build().double(), build, schedule.plan).model, steps=LENGTH)
    model = build().double()
    with apply(model, schedule) as cache:
        got = sample(model, cache, steps=LENGTH)
        assert cache.stats.bytes_held == 0
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)


@every_model
def test_the_random_plans_do_something(build: Build) -> None:
    schedules = [random_schedule(build, seed) for seed in range(12)]
    letters = "".join("".join(schedule.table().values()) for schedule in schedules)
    assert {"C", "R", "S"} == set(letters)
