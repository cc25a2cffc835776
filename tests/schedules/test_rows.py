"""Rows: what a step reads, keeps and releases."""

from itertools import product

import pytest

from dicache.anatomy import Anatomy
from dicache.schedules import Plan, PlanError, Row, Rows, Rule
from tests.toys import written

ONE = written(1)
FOUR = written(4)


def rows(anatomy: Anatomy, *rules: Rule, context: str | None = None) -> list[Row]:
    plan = Plan(len(rules[0].steps), rules)
    made = Rows(plan, anatomy, context)
    return [made.row(step) for step in range(plan.steps)]


def test_a_plan_that_computes_everything_keeps_nothing() -> None:
    assert rows(ONE, Rule("reuse", "CCC")) == [Row()] * 3


def test_what_is_read_at_the_next_step_is_kept_and_released_after_its_last_reading() -> None:
    mlp = frozenset({"0.mlp"})
    assert rows(ONE, Rule("reuse", "CC..C", branch="mlp")) == [
        Row(),  # made anew before it is read
        Row(keep=mlp),
        Row(reuse=mlp),
        Row(reuse=mlp, release=mlp),
        Row(),
    ]


def test_a_delta_is_kept_and_released_like_an_output() -> None:
    part = ((1, 3),)
    assert rows(FOUR, Rule("skip", "CC..C", blocks="1-2")) == [
        Row(),
        Row(keep_delta=part),
        Row(skip=part),
        Row(skip=part, release_delta=part),
        Row(),
    ]


def test_an_output_made_before_a_skip_is_kept_for_the_step_after_it() -> None:
    got = rows(ONE, Rule("skip", "C.CC"), Rule("reuse", "C..C", branch="attn"))
    attn = frozenset({"0.attn"})
    assert got[0] == Row(keep=attn, keep_delta=((0, 1),))
    assert got[1] == Row(skip=((0, 1),), release_delta=((0, 1),))
    assert got[2] == Row(reuse=attn, release=attn)


def test_a_skip_over_a_boundary_of_segments_is_one_delta_for_each_segment() -> None:
    got = rows(written(5, (0, 2), (2, 5)), Rule("skip", "C.", blocks="1-3"))
    assert got[0].keep_delta == got[1].skip == got[1].release_delta == ((1, 2), (2, 4))


def test_two_overlapping_ranges_that_take_turns_each_keep_the_delta_of_the_last_whole_step() -> None:
    # Delta-DiT: the deep range early, the shallow range late.
    deep, shallow = Rule("skip", "C.C.CCC", blocks="1-3"), Rule("skip", "CCCCC..", blocks="0-1")
    got = rows(FOUR, deep, shallow)
    assert [row.skip for row in got] == [(), ((1, 4),), (), ((1, 4),), (), ((0, 2),), ((0, 2),)]
    assert [row.keep_delta for row in got] == [((1, 4),), (), ((1, 4),), (), ((0, 2),), (), ()]


def test_a_delta_is_not_taken_at_a_step_that_skips_a_part_of_its_range() -> None:
    # Step 1 skips blocks 1-3, so what step 2 adds for blocks 0-1 is the delta of step 0.
    got = rows(FOUR, Rule("skip", "C.C", blocks="1-3"), Rule("skip", "CC.", blocks="0-1"))
    assert set(got[0].keep_delta) == {(1, 4), (0, 2)}
    assert got[1].keep_delta == ()
    assert got[1].release_delta == ((1, 4),)
    assert got[2].release_delta == ((0, 2),)


def test_a_step_that_finds_nothing_computes_all_and_keeps_what_later_steps_read() -> None:
    made = Rows(Plan(4, (Rule("reuse", "C..C", branch="mlp"), Rule("skip", "CC..", blocks="1-2"))), FOUR)
    row = made.row(1, compute=True)
    assert row.reuse == row.release == frozenset()
    assert row.skip == row.release_delta == ()
    assert row.keep == {"0.mlp", "3.mlp"}  # of the other two only the delta is read
    assert row.keep_delta == ((1, 3),)
    assert made.row(3, compute=True) == Row()


def test_rules_of_another_guidance_pass_are_not_in_the_rows() -> None:
    rule = Rule("skip", "C.", context="uncond")
    assert rows(ONE, rule, context="cond") == [Row(), Row()]
    assert rows(ONE, rule, context="uncond")[1].skip == ((0, 1),)


def test_a_plan_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(PlanError, match="Toy has the blocks 0-0"):
        Rows(Plan(2, (Rule("skip", "C.", blocks="0-1"),)), ONE)


@pytest.mark.parametrize("letters", ["".join(("C", *rest)) for rest in product("C.", repeat=4)])
@pytest.mark.parametrize("action", ["reuse", "skip"])
def test_every_reading_finds_what_was_kept_and_nothing_is_held_longer_than_needed(action: str, letters: str) -> None:
    held: set[object] = set()
    for step, row in enumerate(rows(ONE, Rule(action, letters))):  # type: ignore[arg-type]
        read = {*row.reuse, *row.skip}
        assert read <= held
        assert bool(read) == (letters[step] == ".")
        held |= {*row.keep, *row.keep_delta}
        held -= {*row.release, *row.release_delta}
        assert bool(held) == letters[step + 1 :].startswith(".")
