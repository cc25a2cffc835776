from itertools import pairwise

import pytest

from dicache.anatomy import Anatomy, Block, Site
from dicache.calibrate import CalibrationError
from dicache.calibrate.delta_cache import DeltaCache
from dicache.calibrate.delta_dit import DeltaDit
from dicache.calibrate.faster_diffusion import FasterDiffusion
from dicache.calibrate.methods import METHODS, planned_schedule
from dicache.schedules import Rows, Target
from tests.toys import written


def blocks_of(count: int, *bounds: int) -> Anatomy:
    """A model of equal blocks that each cost 10, in segments that end before the given blocks."""
    blocks = tuple(
        Block(i, "blocks", i, "ToyBlock", "x", (Site("attn", "attn", macs=4), Site("mlp", "mlp", macs=5)), macs=10)
        for i in range(count)
    )
    edges = (0, *bounds, count)
    return Anatomy("Toy", blocks, tuple(pairwise(edges)), macs=10 * count)


PIXART = blocks_of(28)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("shallow", "0-20"), ("middle", "3-23"), ("deep", "7-27")],  # in the paper 1-21, 4-24 and 8-28, counted from 1
)
def test_the_named_ranges_are_the_papers(name: str, blocks: str) -> None:
    assert [rule.blocks for rule in DeltaCache(blocks=name).plan(PIXART, 20).rules] == [blocks]


def test_any_range_can_be_skipped() -> None:
    assert DeltaCache(blocks="2-5").plan(PIXART, 4).rules[0].blocks == "2-5"
    assert DeltaCache(blocks="4").plan(PIXART, 4).rules[0].blocks == "0-3"
    assert DeltaCache(blocks="4", start=2).plan(PIXART, 4).rules[0].blocks == "2-5"
    assert DeltaCache(blocks="1", start=27).plan(PIXART, 4).rules[0].blocks == "27"


def test_all_is_computed_at_the_first_step_of_each_interval_and_at_what_is_left_over() -> None:
    assert DeltaCache(2).plan(PIXART, 20).computed_steps == tuple(range(0, 20, 2))
    assert DeltaCache(3).plan(PIXART, 20).computed_steps == (0, 3, 6, 9, 12, 15, 18, 19)
    assert DeltaCache(4).plan(PIXART, 4).computed_steps == (0,)
    assert DeltaCache(1).plan(PIXART, 4).computed_steps == (0, 1, 2, 3)


def test_only_the_range_is_skipped_and_its_delta_kept() -> None:
    toy = blocks_of(3)
    plan = DeltaCache(2, "1-2").plan(toy, 4)
    assert plan.table(toy)["0.attn"] == "CCCC"
    assert plan.table(toy)["2.mlp"] == "CSCS"
    rows = Rows(plan, toy)
    assert rows.row(0).keep_delta == ((1, 3),)
    assert rows.row(1).skip == rows.row(1).release_delta == ((1, 3),)


def test_the_share_of_the_macs_is_the_papers() -> None:
    schedule = planned_schedule(DeltaCache(2, "deep"), PIXART, Target(), 20)
    assert schedule.macs_fraction() == pytest.approx(1 - 10 * 21 / 560)
    assert METHODS["delta-cache"] is DeltaCache


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": 0}, "1 .* or more, found 0"),
        ({"interval": 21}, "at most the 20 steps, found 21"),
        ({"blocks": "lower"}, "shallow, middle, deep, a range such as 7-27 or a number, found 'lower'"),
        ({"blocks": "7-28"}, "blocks 7-28 are skipped, but Toy has the blocks 0-27; skip 21 or fewer from block 7"),
        ({"blocks": "3", "start": 28}, "no block 28; Toy has the blocks 0-27"),
        ({"blocks": "9-7"}, "at least one block must be skipped"),
        ({"blocks": "0"}, "at least one block must be skipped"),
        ({"blocks": "deep", "start": 2}, "a first block goes with a number of blocks"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_needed(settings: dict[str, int], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        DeltaCache(**settings).plan(PIXART, 20)  # type: ignore[arg-type]


def test_a_range_across_segments_is_refused_with_those_that_there_are() -> None:
    flux = blocks_of(8, 3)
    assert DeltaCache(blocks="3-7").plan(flux, 4).rules[0].blocks == "3-7"
    with pytest.raises(
        CalibrationError, match=r"no one delta stands for blocks 2-7.* within 0-2 or 3-7, such as .* 3-7"
    ):
        DeltaCache(blocks="deep").plan(flux, 4)


def test_the_way_out_of_several_segments_can_be_typed() -> None:
    double_and_single, alone = written(10, (0, 4), (4, 10)), written(3, (0, 1), (1, 2), (2, 3))
    with pytest.raises(CalibrationError, match="skip --blocks 4 or fewer"):
        DeltaDit().plan(double_and_single, 10)
    assert DeltaDit(blocks=4).plan(double_and_single, 10).rules
    with pytest.raises(CalibrationError, match=r"no one feature map stands for blocks 0-4.* skip --blocks 4 or fewer"):
        FasterDiffusion().plan(double_and_single, 10)
    assert FasterDiffusion(blocks=4).plan(double_and_single, 10).rules
    with pytest.raises(CalibrationError, match="more than one block, so take a method that reuses branches"):
        DeltaCache().plan(alone, 10)
