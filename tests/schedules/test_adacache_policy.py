"""AdaCache's policy, by head: the released code counts steps from 1 and computes steps 1, S - 1 and S."""

import json
from dataclasses import replace
from typing import Any

import pytest

from dicache.calibrate.adacache import PRESETS
from dicache.schedules import AdaCachePolicy, Motion, PlanError
from dicache.schedules.policies import read_policy
from tests.tiny import anatomy_of, dit, flux


def policy(**settings: Any) -> AdaCachePolicy:
    return AdaCachePolicy(**{"codebook": PRESETS["fast"], "decision_blocks": (0,), **settings})


def decisions(of: AdaCachePolicy, changes: list[float], motion: list[float] | None = None) -> str:
    """Return a letter for each step of a run whose computed steps measure these changes."""
    letters, memory, steps = "", of.remember(), len(changes)
    for step in range(steps):
        last = memory.last
        compute = of.decide(step, steps, None, memory)
        letters += "C" if compute else "."
        if compute and last is not None and of.watches(step, steps):
            of.observe(step, steps, [changes[step]], None if motion is None else motion[step], memory)
    return letters


def rates(of: AdaCachePolicy, distances: list[float]) -> list[int]:
    """Return the rate that each distance chooses where the rate was 1."""
    found = []
    for distance in distances:
        memory = of.remember()
        of.observe(5, 50, [distance], None, memory)
        found.append(memory.rate)
    return found


def test_the_first_limit_above_the_distance_chooses_the_rate_and_the_last_one_is_not_looked_at() -> None:
    assert rates(policy(), [0.0, 0.0799, 0.08, 0.16, 0.3, 0.39, 0.4, 1.0, 9.0]) == [6, 6, 5, 4, 3, 2, 1, 1, 1]
    long = policy(codebook=PRESETS["long"])
    assert rates(long, [0.02, 0.04, 0.06, 0.08, 0.1, 0.11, 5.0]) == [12, 10, 8, 6, 4, 3, 3]
    assert rates(policy(codebook=PRESETS["slow"]), [0.02, 0.1, 0.2, 0.3, 5.0]) == [3, 2, 1, 1, 1]
    assert rates(policy(codebook=((1.0, 4),)), [0.0, 0.5, 7.0]) == [4, 4, 4]  # of any length


def test_the_second_step_is_computed_and_its_rate_counts_from_it() -> None:
    assert decisions(policy(codebook=((1.0, 4),)), [0.0] * 20) == "CC...C...C...C...CCC"
    assert decisions(policy(codebook=((1.0, 4),), first_steps=3), [0.0] * 12) == "CCC...C...CC"


def test_a_large_late_rate_does_not_jump_past_the_last_two_steps() -> None:
    changes = [0.0] * 20
    assert decisions(policy(codebook=PRESETS["long"]), changes) == "CC...........C....CC"
    changes[13] = 12 * 5.0  # too late to matter: divided by the rate, 3 steps of 5
    assert decisions(policy(codebook=PRESETS["long"]), changes) == "CC...........C..C.CC"
    assert decisions(policy(codebook=PRESETS["long"], last_steps=0), [0.0] * 20) == "CC...........C......"


def test_the_distance_is_by_step_so_a_change_over_many_counts_less() -> None:
    of, memory = policy(), policy().remember()
    memory.gap = 4
    of.observe(9, 50, [0.32], None, memory)
    assert memory.distance == pytest.approx(0.08)
    assert memory.rate == 5


def test_steps_that_are_always_computed_are_as_far_apart_as_they_are() -> None:
    of = policy(first_steps=4)
    memory = of.remember()
    for step in range(4):
        assert of.decide(step, 50, None, memory)
        if step:
            of.observe(step, 50, [0.04], None, memory)
            assert memory.distance == pytest.approx(0.04)


def test_decision_blocks_are_averaged() -> None:
    of, memory = policy(decision_blocks=(0, 1, 2)), policy().remember()
    of.observe(9, 50, [0.1, 0.2, 0.6], None, memory)
    assert memory.distance == pytest.approx(0.3)
    assert memory.rate == 3


def test_motion_multiplies_the_distance_by_itself_and_its_change() -> None:
    of = policy(motion=Motion(scale=0.5, power=2.0, gradient=10.0, start=0.1, stop=0.9))
    memory = of.remember()
    memory.gap = 5
    of.observe(9, 50, [0.5], 0.75, memory)  # M = 1.5 ** 2 = 2.25, after 1 before: gradient 10 * 1.25 / 5 = 2.5
    assert memory.distance == pytest.approx(0.1 * (2.25 + 2.5))
    assert (memory.rate, memory.motion) == (1, 2.25)
    memory.gap = 1
    of.observe(10, 50, [0.1], 0.25, memory)  # M = 0.25, which falls by 2 in one step
    assert memory.distance == pytest.approx(0.1 * (0.25 + 20))


def test_outside_its_steps_motion_is_one_as_in_the_released_code() -> None:
    active = [step for step in range(100) if Motion().active(step, 100)]
    assert active == list(range(9, 90))  # steps 10 to 90, counted from 1
    assert [step for step in range(70) if Motion().active(step, 70)] == list(range(6, 63))
    of = policy(motion=Motion(scale=0.5, power=2.0))
    memory = of.remember()
    of.observe(1, 100, [0.1], 1.0, memory)
    assert memory.distance == pytest.approx(0.1)
    assert memory.motion == 1.0


def test_what_is_not_a_number_is_computed_at_every_step() -> None:
    assert rates(policy(codebook=PRESETS["long"]), [float("nan")]) == [1]
    of, memory = policy(motion=Motion()), policy().remember()
    of.observe(50, 100, [0.1], float("nan"), memory)
    assert (memory.rate, memory.motion) == (1, 1.0)


def test_slow_motion_is_held_longer_than_fast() -> None:
    of = policy(motion=Motion(scale=0.1, power=1.0, gradient=0.0))
    still, fast = (decisions(of, [0.2] * 30, [motion] * 30).count("C") for motion in (0.05, 0.2))
    assert still < fast


@pytest.mark.parametrize(
    "of",
    [
        policy(),
        policy(codebook=((0.5, 2),), decision_blocks=(1, 3), branch="block", first_steps=2, last_steps=3),
        policy(branch="rest", motion=Motion(0.05, 1.25, 3.0, 0.0, 1.0)),
    ],
)
def test_a_policy_is_read_back_as_it_was_written(of: AdaCachePolicy) -> None:
    assert read_policy(json.loads(json.dumps(of.to_json()))) == of


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"codebook": ()}, "at least one"),
        ({"codebook": ((0.1, 2, 3),)}, "pairs of a limit and a rate"),
        ({"codebook": ((0.2, 3), (0.1, 2))}, r"above 0 and rise, found \[0.2, 0.1\]"),
        ({"codebook": ((0.0, 3),)}, "above 0 and rise"),
        ({"codebook": ((float("nan"), 3),)}, "finite"),
        ({"codebook": ((0.1, 0),)}, "whole numbers of 1 or more steps"),
        ({"codebook": ((0.1, 2.0),)}, "whole numbers of 1 or more steps"),
        ({"decision_blocks": ()}, "at least one"),
        ({"decision_blocks": (3, 1)}, "must rise"),
        ({"branch": "mlp"}, "attn, rest, block"),
        ({"motion": Motion(scale=0.0)}, "a scale above 0"),
        ({"motion": Motion(scale=1e-30)}, "overflows"),
        ({"motion": Motion(start=0.9, stop=0.1)}, "two shares of the steps"),
        ({"motion": Motion(power=float("inf"))}, "finite"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        policy(**settings)


@pytest.mark.parametrize("change", [{"motion": {"scale": 1.0}}, {"motion": 3}, {"codebook": "x"}, {"rate": 3}])
def test_a_file_with_wrong_keys_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        read_policy({**policy().to_json(), **change})


def test_a_decision_block_that_is_not_there_or_shows_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="no block 4 to decide by; DiTTransformer2DModel has 0 to 3"):
        policy(decision_blocks=(4,)).skipped(anatomy_of(dit))
    single = policy(decision_blocks=(3,))
    with pytest.raises(PlanError, match="needed the branch `block`"):
        single.skipped(anatomy_of(flux))
    assert replace(single, branch="block").skipped(anatomy_of(flux)) == (0, 5)
