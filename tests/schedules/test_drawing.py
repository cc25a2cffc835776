"""Plans drawn with letters."""

import pytest

from dicache.schedules.drawing import against, alike, draw


def test_neighbouring_blocks_that_are_alike_are_one_line_branch_by_branch() -> None:
    rows = {"0.attn": "CR", "0.mlp": "CC", "1.attn": "CR", "1.mlp": "CR", "2.attn": "CC", "2.mlp": "CC"}
    assert alike(rows) == [
        ("attn 0-1", "CR"),
        ("attn 2", "CC"),
        ("mlp 0", "CC"),
        ("mlp 1", "CR"),
        ("mlp 2", "CC"),
    ]


def test_a_named_branch_is_a_line_of_its_own() -> None:
    assert alike({"0.mlp": "CR", "0.mlp.context": "CR"}) == [("mlp 0", "CR"), ("mlp.context 0", "CR")]


def test_a_number_stands_over_every_fifth_step() -> None:
    assert draw([("attn 0-3", "CR" * 6), ("mlp 0", "C" * 12)], 80) == (
        "  step      0    5    10\n"
        "  attn 0-3  CRCRCRCRCRCR\n"
        "  mlp 0     CCCCCCCCCCCC"
    )  # fmt: skip


def test_a_plan_too_long_for_the_page_goes_on_below_under_a_ruler_of_its_own() -> None:
    assert draw([("mlp 0", "C" * 10 + "R" * 13)], 29) == (
        "  step   0    5    10   15\n  mlp 0  CCCCCCCCCCRRRRRRRRRR\n\n  step   20\n  mlp 0  RRR"
    )


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 70, 71, 100, 101, 250, 1000])
@pytest.mark.parametrize("width", [1, 40, 80, 200])
def test_no_letter_is_lost_no_line_is_too_wide_and_each_number_stands_over_its_step(steps: int, width: int) -> None:
    letters = "".join("CRS"[i % 3] for i in range(steps))
    drawn = [stretch.splitlines() for stretch in draw([("attn 0-11", letters)], width).split("\n\n")]
    assert "".join(row.split()[-1] for _, row in drawn) == letters
    assert all(len(row) <= max(width, 23) for _, row in drawn)  # at least ten letters
    passed = 0
    for ruler, row in drawn:
        start = row.index(row.split()[-1])
        numbers = ruler.split()[1:]
        assert numbers[0] == str(passed)
        assert all(ruler.index(f" {number}") + 1 == start + int(number) - passed for number in numbers)
        passed += len(row) - start


def test_two_rows_stand_one_over_the_other_with_a_mark_where_they_differ() -> None:
    lines = against([("attn 0-11", ("CRCR", "CCCS")), ("mlp 0", ("CR", "CC"))])
    assert lines == [
        ("attn 0-11 A", "CRCR"),
        ("          B", "CCCS"),
        ("", " ^ ^"),
        ("mlp 0     A", "CR"),
        ("          B", "CC"),
        ("", " ^"),
    ]
