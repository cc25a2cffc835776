import pytest

from dicache.anatomy import Anatomy, Block, Site
from dicache.calibrate import CalibrationError
from dicache.calibrate.fora import Fora
from dicache.calibrate.methods import METHODS, planned_schedule
from dicache.schedules import Target

TWO_BLOCKS = Anatomy(
    "Toy",
    tuple(
        Block(i, "blocks", i, "ToyBlock", "x", (Site("attn", "attn", macs=2), Site("mlp", "mlp", macs=3)), macs=6)
        for i in range(2)
    ),
    segments=((0, 2),),
    macs=15,
)


@pytest.mark.parametrize(
    ("steps", "interval", "computed"),
    [
        (20, 2, (0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19)),
        (20, 3, (0, 1, 4, 7, 10, 13, 16, 19)),
        (50, 5, (0, 4, 9, 14, 19, 24, 29, 34, 39, 44, 49)),
        (250, 3, tuple(range(0, 250, 3))),
        (100, 2, (0, *range(1, 100, 2))),
        (500, 3, (0, *range(1, 500, 3))),
        (500, 6, (0, *range(1, 500, 6))),
    ],
)
def test_counted_from_the_end_the_last_step_is_computed(steps: int, interval: int, computed: tuple[int, ...]) -> None:
    assert Fora(interval).plan(TWO_BLOCKS, steps).computed_steps == computed


def test_counted_from_the_start_every_multiple_of_the_interval_is_computed() -> None:
    assert Fora(3, "start").plan(TWO_BLOCKS, 10).computed_steps == (0, 3, 6, 9)


@pytest.mark.parametrize(
    ("steps", "interval", "end", "start"), [(20, 2, 11, 10), (20, 3, 8, 7), (50, 5, 11, 10), (250, 3, 84, 84)]
)
def test_how_many_steps_are_computed_depends_on_where_they_are_counted_from(
    steps: int, interval: int, end: int, start: int
) -> None:
    assert len(Fora(interval, "end").plan(TWO_BLOCKS, steps).computed_steps) == end
    assert len(Fora(interval, "start").plan(TWO_BLOCKS, steps).computed_steps) == start


def test_an_interval_of_one_computes_everything() -> None:
    plan = Fora(1).plan(TWO_BLOCKS, 5)
    assert set(plan.table(TWO_BLOCKS).values()) == {"CCCCC"}


def test_only_the_branches_that_are_named_are_reused() -> None:
    table = Fora(2, "start", branches=("mlp",)).plan(TWO_BLOCKS, 4).table(TWO_BLOCKS)
    assert table == {"0.attn": "CCCC", "0.mlp": "CRCR", "1.attn": "CCCC", "1.mlp": "CRCR"}


def test_nothing_is_reused_outside_the_given_steps() -> None:
    plan = Fora(2, "start", first=3, last=5).plan(TWO_BLOCKS, 8)
    assert plan.table(TWO_BLOCKS)["0.attn"] == "CCCRCRCC"


def test_the_schedule_counts_what_it_computes() -> None:
    schedule = planned_schedule(Fora(2, "start"), TWO_BLOCKS, Target(), 4)
    assert schedule.method == "fora"
    assert schedule.settings["interval"] == 2
    # Two of four steps save both blocks' sites: 2 * 2 * 5 of 4 * 15.
    assert schedule.macs_fraction() == pytest.approx(1 - 20 / 60)


def test_wrong_settings_are_refused_with_what_is_needed() -> None:
    with pytest.raises(CalibrationError, match=r"1 .* or more, found 0"):
        Fora(0)
    with pytest.raises(CalibrationError, match="below the 4 steps, found 9"):
        Fora(9).plan(TWO_BLOCKS, 4)
    with pytest.raises(CalibrationError, match=r"no step 4 of 4; the steps are 0-3"):
        Fora(2, last=4).plan(TWO_BLOCKS, 4)
    with pytest.raises(CalibrationError, match="start or end"):
        Fora(2, "middle")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="cross_attn, but Toy has attn, mlp"):
        Fora(2, branches=("cross_attn",)).plan(TWO_BLOCKS, 4)


def test_it_is_in_the_table_of_methods() -> None:
    assert METHODS["fora"] is Fora
