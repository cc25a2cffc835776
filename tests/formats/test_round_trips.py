"""What is exported and imported again is the same, for random plans that a format can hold."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicache.formats import Given, export, find, imported
from dicache.schedules import FirstBlockPolicy, Plan, Rule, Schedule, Target, TeaCachePolicy
from dicache.schedules.policies import Policy
from tests.toys import written

BLOCKS, TRIALS = 7, 60
ANATOMY = written(BLOCKS)
REQUEST = {  # what SGLang's artefact needs besides
    "pipeline": "ToyPipeline",
    "checkpoint": "toy",
    "height": 64,
    "width": 64,
    "quality": "auto",
    "scheduler_config_sha256": "0" * 64,
}


def rows(draw: random.Random, steps: int, *, first: int = 1) -> str:
    """Return random letters, the first few of them computed, and one or more not."""
    letters = ["C"] * first + [draw.choice("C.") for _ in range(steps - first)]
    letters[draw.randrange(first, steps)] = "."
    return "".join(letters)


def whole(draw: random.Random, steps: int) -> Plan:
    return Plan(steps, (Rule("skip", rows(draw, steps)),))


def inner(draw: random.Random, steps: int) -> Plan:
    """Return a plan that skips a range behind the first block, held or by a Taylor expansion of order 1."""
    first = draw.randint(1, BLOCKS - 1)
    blocks = f"{first}-{draw.randint(first, BLOCKS - 1)}"
    if draw.random() < 0.5:
        return Plan(steps, (Rule("skip", rows(draw, steps), blocks),))
    return Plan(steps, (Rule("skip", rows(draw, steps, first=4), blocks, predictor="taylor", order=1),))


def foretold(draw: random.Random, steps: int) -> Plan:
    return Plan(steps, (Rule("skip", rows(draw, steps, first=2), predictor="taylor", order=1),))


def passes(draw: random.Random, steps: int) -> Plan:
    return Plan(steps, tuple(Rule("skip", rows(draw, steps), context=name) for name in ("cond", "uncond")))


def branches(draw: random.Random, steps: int) -> Plan:
    rules = [
        Rule("reuse", rows(draw, steps), str(block), branch)
        for block in range(BLOCKS)
        for branch in ("attn", "mlp")
        if draw.random() < 0.7
    ]
    return Plan(steps, (*rules, Rule("reuse", rows(draw, steps), "0", "attn")))


def interval(draw: random.Random, steps: int) -> Plan:
    """Return branches at an interval that begins behind a warm-up, and ends where all is computed."""
    before, every = draw.randint(1, 4), draw.randint(2, 5)
    after = draw.choice([steps, steps - 1])
    letters = "".join("C" if i < before or (i - before - 1) % every == 0 or i >= after else "." for i in range(steps))
    order = draw.randint(0, 3)
    branch = draw.choice(["*", "attn", "mlp"])
    return Plan(steps, (Rule("reuse", letters, "*", branch, predictor="taylor" if order else "hold", order=order),))


CASES: dict[str, tuple[str, Callable[[random.Random, int], Plan]]] = {
    "cache-dit": ("cache-dit", inner),
    "xdit": ("xdit", inner),
    "vllm-omni": ("vllm-omni", whole),
    "diffusers-magcache": ("diffusers-magcache", whole),
    "diffusers-taylorseer": ("diffusers-taylorseer", interval),
    "lightx2v": ("lightx2v", whole),
    "lightx2v, two passes": ("lightx2v", passes),
    "mask": ("mask", whole),
    "smoothcache": ("smoothcache", branches),
    "sglang-dpcache": ("sglang-dpcache", foretold),
}


def there_and_back(schedule: Schedule, name: str, folder: Path, values: dict[str, Any] | None = None) -> Schedule:
    made = export(schedule, find(name), values=values)
    path = folder / f"file{find(name).suffix}"
    path.write_text(made.text)
    return imported(path, find(name), Given("toy", ANATOMY, Target(), schedule.steps))


@pytest.mark.parametrize("case", CASES)
def test_a_plan_comes_back_as_it_was(case: str, tmp_path: Path) -> None:
    name, make = CASES[case]
    draw = random.Random(case)
    for _ in range(TRIALS):
        steps = draw.randint(7, 30)
        timesteps = tuple(1000.0 - 7 * i for i in range(steps))
        target = Target("w", "bfloat16", scheduler="Euler", timesteps=timesteps, guidance=4.0)
        schedule = Schedule("drawn", {}, ANATOMY, target, steps, make(draw, steps))
        values = {**REQUEST, "sigmas": [1.0] * (steps + 1)} if name == "sglang-dpcache" else None
        back = there_and_back(schedule, name, tmp_path, values)
        assert back.plan is not None
        for context in (None, "cond", "uncond"):
            assert back.table(context) == schedule.table(context)
            assert schedule.plan is not None
            assert back.plan.stand_ins(ANATOMY, context) == schedule.plan.stand_ins(ANATOMY, context)
            assert back.plan.ranges(ANATOMY, context) == schedule.plan.ranges(ANATOMY, context)


def first_block(draw: random.Random) -> FirstBlockPolicy:
    last = draw.randint(0, 2)
    return FirstBlockPolicy(
        round(0.9 * draw.random(), draw.randint(1, 17)),
        draw.randint(1, BLOCKS - 1 - last),
        last,
        draw.choice([None, 1, 3]),
        draw.choice([None, 0, 5]),
        first_steps=draw.randint(1, 3),
        last_steps=draw.randint(0, 2),
    )


def teacache(draw: random.Random) -> TeaCachePolicy:
    coefficients = tuple(draw.uniform(-1, 1) * 10**power for power in range(4, -1, -1))
    first, last = draw.randint(1, 3), draw.randint(0, 2)
    return TeaCachePolicy(
        draw.uniform(0.01, 1), coefficients, (0.0, 1e6), "reference", first_steps=first, last_steps=last
    )


POLICIES: dict[str, Callable[[random.Random], Policy]] = {
    "cache-dit": first_block,
    "xdit": first_block,
    "sglang-teacache": teacache,
    "comfyui-teacache": teacache,
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    draw = random.Random(name)
    for _ in range(TRIALS):
        policy = POLICIES[name](draw)
        schedule = Schedule("drawn", {}, ANATOMY, Target(), draw.randint(10, 40), policy=policy)
        assert there_and_back(schedule, name, tmp_path).policy == policy


def test_diffusers_first_block_comes_back_but_for_what_equals_its_threshold(tmp_path: Path) -> None:
    schedule = Schedule("first-block", {}, ANATOMY, Target(), 8, policy=FirstBlockPolicy(0.123))
    back = there_and_back(schedule, "diffusers-first-block", tmp_path)
    assert back.policy == FirstBlockPolicy(0.123, at_threshold="reuse")


def test_an_import_says_what_was_given_and_what_it_was_read_from(tmp_path: Path) -> None:
    schedule = Schedule("drawn", {}, ANATOMY, Target(), 4, Plan(4, (Rule("skip", "C.C."),)))
    measured = there_and_back(schedule, "mask", tmp_path).measured
    assert measured["model"] == "toy"
    assert measured["imported"]["format"] == "mask"
    assert measured["imported"]["given"] == {"model": "toy", "steps": 4}
    assert len(measured["imported"]["sha256"]) == 16
