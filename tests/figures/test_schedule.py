from dataclasses import replace

import numpy as np
import pytest
from matplotlib.axes import Axes

from dicache.anatomy import Site
from dicache.figures import schedule_strip
from dicache.schedules import Rule
from tests.figures import drawn, synthetic

C, R, S = 0, 1, 2


def cells(axes: Axes) -> list[list[int]]:
    rows: list[list[int]] = drawn.table(axes).tolist()
    return rows


def test_blocks_whose_branches_go_together_are_one_row_each() -> None:
    fora = synthetic.planned("fora", 2, Rule("reuse", "C..C"))
    (axes,) = schedule_strip([("fora", fora)]).axes
    assert cells(axes) == [[C, R, R, C], [C, R, R, C]]
    assert axes.get_title(loc="left") == "fora: 50 % of the MACs"
    assert axes.get_xlabel() == "step (0 = noisiest)"
    assert axes.get_ylabel() == "block"


def test_a_skipped_block_is_told_from_a_reused_one() -> None:
    delta = synthetic.planned("delta-cache", 3, Rule("skip", "C.", blocks="1-2"))
    (axes,) = schedule_strip([("mine", delta)]).axes
    assert cells(axes) == [[C, C], [C, S], [C, S]]
    assert axes.get_title(loc="left").startswith("mine (delta-cache): 67 %")
    assert axes.images[0].to_rgba(np.array([S]))[0, 3] == 0  # see-through: the hatching is behind it


def test_branches_that_differ_are_rows_inside_the_block() -> None:
    schedule = synthetic.planned(
        "smoothcache", 2, Rule("reuse", "C.C", branch="attn"), Rule("reuse", "CC.", branch="mlp")
    )
    (axes,) = schedule_strip([("smoothcache", schedule)]).axes
    assert cells(axes) == [[C, R, C], [C, C, R]] * 2  # attn, mlp of block 0, then of block 1
    assert axes.get_title(loc="left").endswith("rows in a block: attn, mlp")
    assert tuple(axes.images[0].get_extent()) == (-0.5, 2.5, 1.5, -0.5)  # ticks count blocks, not rows


def test_a_block_with_one_branch_is_as_high_as_one_with_two() -> None:
    dual, single = synthetic.anatomy(2).blocks
    mixed = replace(synthetic.anatomy(2), blocks=(dual, replace(single, sites=(Site("fused", "fused", 100),))))
    schedule = replace(synthetic.planned("fora", 2, Rule("reuse", "C.", branch="mlp")), anatomy=mixed)
    (axes,) = schedule_strip([("fora", schedule)]).axes
    assert cells(axes) == [[C, C], [C, R], [C, C], [C, C]]
    assert axes.get_title(loc="left").endswith("rows in a block: attn, mlp or fused")


def test_an_adaptive_schedule_shows_what_was_expected_and_says_so() -> None:
    measured = {"expected_steps": "C..C", "macs_fraction": 0.52}
    (axes,) = schedule_strip([("teacache", synthetic.teacache(4, (1.0,), (0, 1), measured))]).axes
    assert cells(axes) == [[C, S, S, C]] * 2
    assert axes.get_title(loc="left") == "teacache: 52 % of the MACs expected; decides at run time"


def test_an_adaptive_schedule_without_expectation_claims_none() -> None:
    (axes,) = schedule_strip([("teacache", synthetic.teacache(4, (1.0,), (0, 1)))]).axes
    assert "expect is not known" in axes.get_title(loc="left")
    assert "%" not in axes.get_title(loc="left")


def test_a_rule_for_one_guidance_pass_is_drawn_for_that_pass() -> None:
    schedule = synthetic.planned("pass", 1, Rule("reuse", "C.", context="uncond"))
    uncond, others = schedule_strip([("pass", schedule)]).axes
    assert cells(uncond) == [[C, R]]
    assert cells(others) == [[C, C]]
    assert uncond.get_title(loc="left") == "pass, pass uncond"


def test_where_guidance_collapses_is_said() -> None:
    schedule = synthetic.planned("gated", 1, Rule("reuse", "CC.."))
    plan = replace(schedule.plan, collapse_guidance_from=2)  # type: ignore[type-var]
    (axes,) = schedule_strip([("gated", replace(schedule, plan=plan))]).axes
    assert axes.get_title(loc="left").endswith("% of the MACs; one guidance pass from step 2 on")


def test_schedules_of_different_lengths_are_drawn_one_under_the_other() -> None:
    schedules = [
        (name, synthetic.planned("fora", 2, Rule("reuse", steps))) for name, steps in (("a", "C."), ("b", "C.."))
    ]
    first, second = schedule_strip(schedules).axes
    assert len(cells(first)[0]) == 2
    assert len(cells(second)[0]) == 3


def test_no_schedule_is_an_error() -> None:
    with pytest.raises(ValueError, match="no schedule to draw"):
        schedule_strip([])
