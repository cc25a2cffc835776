"""Schedules mapped to other step counts on the axis of noise levels."""

from dataclasses import replace

import pytest

from dicache.schedules import Plan, Rule, Schedule, ScheduleError, Target, TeaCachePolicy
from tests.toys import written


def falling(steps: int) -> tuple[float, ...]:
    """Return noise levels that fall evenly from 4 to -4."""
    return tuple(4 - 8 * step / max(steps - 1, 1) for step in range(steps))


def schedule(*rules: Rule) -> Schedule:
    steps = len(rules[0].steps)
    target = Target("abc", "float32", num_inference_steps=steps, timesteps=(0.0,) * steps, noise_levels=falling(steps))
    return Schedule("test", {"interval": 2}, written(4), target, steps, Plan(steps, rules))


def letters(made: Schedule) -> list[str]:
    assert made.plan is not None
    return [rule.steps for rule in made.plan.rules]


def resampled(rule: str, steps: int) -> str:
    return letters(schedule(Rule("reuse", rule)).resampled(falling(steps), steps))[0]


def test_the_same_noise_levels_give_the_same_plan() -> None:
    assert resampled("C.C..CC.", 8) == "C.C..CC."


def test_each_computed_step_stays_at_its_noise_level() -> None:
    assert resampled("C.C.C", 9) == "C...C...C"  # levels 4, 2, 0, -2, -4 become steps 0, 2, 4, 6, 8
    assert resampled("C...C...C", 5) == "C.C.C"


@pytest.mark.parametrize("rule", ["C.......", "C.C.C.C.", "CCC....C", "C..C..C.", "CC......", "CCCCCCC."])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 13, 20, 50])
def test_the_first_step_is_computed_and_fewer_steps_compute_no_more_often(rule: str, steps: int) -> None:
    made = resampled(rule, steps)
    assert len(made) == steps
    assert made[0] == "C"
    if steps <= len(rule):
        assert 1 <= made.count("C") <= rule.count("C")
    else:
        assert made.count("C") >= rule.count("C")


@pytest.mark.parametrize("steps", [8, 13, 20, 50])
def test_a_regular_plan_computes_as_often_over_more_steps(steps: int) -> None:
    assert resampled("C.C.C.C.", steps).count("C") == 4


@pytest.mark.parametrize("steps", [8, 13, 16, 40])
def test_where_every_step_was_computed_every_step_is_computed(steps: int) -> None:
    warm_up = resampled("CCCC....", steps)
    assert all(letter == "C" for letter, level in zip(warm_up, falling(steps), strict=True) if level > falling(8)[3])


@pytest.mark.parametrize("steps", [2, 8, 50])
def test_a_rule_that_never_acts_never_acts_afterwards(steps: int) -> None:
    assert resampled("CCCCCCCC", steps) == "C" * steps


@pytest.mark.parametrize("steps", [4, 8, 11, 16, 40])
def test_rules_for_different_stages_stay_in_their_stages(steps: int) -> None:
    # Delta-DiT: the deep blocks in the first half, the shallow ones in the second.
    made = schedule(Rule("skip", "C.C.CCCC", blocks="1-3"), Rule("skip", "CCCCC.C.", blocks="0-2")).resampled(
        falling(steps), steps
    )
    early, late = letters(made)
    levels = falling(steps)
    # The early rule last acts at level 4 - 8 * 3/7 = 0.57 and is back to computing at -0.57; the late one mirrors it.
    assert all(letter == "C" for letter, level in zip(early, levels, strict=True) if level < -0.58)
    assert all(letter == "C" for letter, level in zip(late, levels, strict=True) if level > 0.58)


def test_the_target_is_the_new_sampler_and_the_rest_is_kept() -> None:
    made = schedule(Rule("reuse", "C.C.")).resampled(falling(8), 8)
    assert made.target == Target("abc", "float32", num_inference_steps=8, noise_levels=falling(8))
    assert (made.method, made.settings, made.anatomy) == ("test", {"interval": 2}, written(4))
    assert made.steps == 8
    assert made.measured == {"resampled_from_steps": 4}


def test_a_rule_keeps_its_blocks_branch_and_context() -> None:
    made = schedule(Rule("reuse", "C.C.", "1-2", "mlp", "cond")).resampled(falling(8), 8)
    assert made.plan is not None
    rule = made.plan.rules[0]
    assert (rule.action, rule.blocks, rule.branch, rule.context) == ("reuse", "1-2", "mlp", "cond")


def test_a_policy_is_kept_and_only_counts_its_steps_anew() -> None:
    policy = TeaCachePolicy(0.1, (1.0, 0.0), (0.0, 1.0))
    made = Schedule("teacache", {}, written(2), Target(noise_levels=falling(4)), 4, policy=policy)
    other = made.resampled(falling(9), 9)
    assert other.policy == policy
    assert other.steps == 9


def test_a_schedule_that_does_not_tell_its_noise_levels_cannot_be_mapped() -> None:
    unbound = Schedule("test", {}, written(2), Target(), 4, Plan(4))
    with pytest.raises(ScheduleError, match=r"does not say its noise levels, so its 4 steps cannot be mapped to 9"):
        unbound.resampled(falling(9), 9)


def test_a_rule_keeps_its_predictor() -> None:
    rules = Rule("skip", "C.C.", predictor="taylor", order=2), Rule("reuse", "C.C.")
    made = schedule(*rules).resampled(falling(8), 8)
    assert made.plan is not None
    assert [(rule.predictor, rule.order) for rule in made.plan.rules] == [("taylor", 2), ("hold", 0)]


@pytest.mark.parametrize(
    ("steps", "start"),
    [(8, 4), (16, 7), (4, 2), (24, 11), (2, 1), (1, None)],  # a new step between two old ones does as that which acts
)
def test_guidance_collapses_at_the_noise_level_where_the_rules_of_the_gate_act(steps: int, start: int | None) -> None:
    base = schedule(Rule("reuse", "CCCC....", branch="attn"))
    assert base.plan is not None
    base = replace(base, plan=replace(base.plan, collapse_guidance_from=4))
    made = base.resampled(falling(steps), steps).plan
    assert made is not None
    assert made.collapse_guidance_from == start
    assert made.rules[0].steps == "C" * (start or steps) + "." * (steps - (start or steps))
