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
    row = made.row(1, since=1)
    assert row.reuse == row.release == frozenset()
    assert row.skip == row.release_delta == ()
    assert row.keep == {"0.mlp", "3.mlp"}  # of the other two only the delta is read
    assert row.keep_delta == ((1, 3),)
    assert made.row(3, since=3) == Row()


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


def test_an_expansion_reads_the_last_outputs_and_each_is_held_until_nothing_reads_it() -> None:
    got = rows(ONE, Rule("reuse", "CCC.C..", branch="mlp", predictor="taylor", order=2))
    mlp = frozenset({"0.mlp"})
    assert [row.keep for row in got] == [mlp, mlp, mlp, frozenset(), mlp, frozenset(), frozenset()]
    assert [dict(row.keep_older) for row in got] == [{}, {"0.mlp": 1}, {"0.mlp": 2}, {}, {"0.mlp": 2}, {}, {}]
    # Step 3 reads those of steps 2, 1 and 0; steps 5 and 6 those of 4, 2 and 1.
    assert got[3] == Row(reuse=mlp, predict=(("0.mlp", (1.5, -0.5)),), release_older=(("0.mlp", 2),))
    assert got[5].release_older == ()
    assert (got[6].release, got[6].release_older) == (mlp, (("0.mlp", 1), ("0.mlp", 2)))


def test_an_expansion_takes_as_many_outputs_as_there_are() -> None:
    got = rows(ONE, Rule("skip", "C.C.CC.", predictor="taylor", order=3))
    assert [[len(weights) for _, weights in row.predict] for row in got] == [[], [], [], [1], [], [], [3]]


def test_after_a_restart_an_expansion_takes_what_was_computed_since() -> None:
    made = Rows(Plan(6, (Rule("reuse", "CCC.C.", predictor="taylor", order=2),)), ONE)
    assert made.row(3, since=3).reuse == frozenset()
    assert dict(made.row(3, since=3).keep_older) == {}
    assert dict(made.row(5, since=3).predict)["0.mlp"] == (1.0,)  # of steps 4 and 3


@pytest.mark.parametrize("letters", ["".join(("C", *rest)) for rest in product("C.", repeat=6)])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("since", [0, 2])
def test_every_expansion_finds_what_was_kept_and_nothing_is_held_longer_than_needed(
    letters: str, order: int, since: int
) -> None:
    made = Rows(Plan(7, (Rule("skip", letters, predictor="taylor", order=order),)), ONE)
    key, held = (0, 1), dict[object, int]()  # by its place among the entries, the step that it was computed at
    computes = [step for step in range(since, 7) if step == since or letters[step] == "C"]
    for step in range(since, 7):
        row = made.row(step, since=since)
        before = [k for k in reversed(computes) if k < step]
        if row.skip:
            (weights,) = dict(row.predict).values() or ((),)
            read = [held[key], *(held[key, age] for age in range(1, len(weights) + 1))]
            assert read == before[: order + 1]
        if row.keep_delta:
            older = dict(row.keep_older).get(key, 0)
            past = [held[key] if age == 0 else held[key, age] for age in range(older)]
            held |= {key: step} | {(key, age): k for age, k in enumerate(past, start=1)}
        for name in (*row.release_delta, *row.release_older):
            del held[name]
        later = [s for s in range(step + 1, 7) if s not in computes]
        reads = {k for s in later for k in [k for k in reversed(computes) if k < s][: order + 1] if k <= step}
        assert sorted(held.values()) == sorted(reads)


def test_a_feature_map_is_kept_in_the_place_of_the_delta() -> None:
    got = rows(FOUR, Rule("skip", "C.", blocks="0-2", predictor="feature"))
    assert got[0] == Row(keep_delta=((0, 3),), features=((0, 3),))
    assert got[1] == Row(skip=((0, 3),), release_delta=((0, 3),), features=((0, 3),))
