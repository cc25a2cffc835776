import pytest

from dicache.calibrate import CalibrationError
from dicache.calibrate.faster_diffusion import FasterDiffusion
from dicache.calibrate.methods import METHODS
from dicache.schedules import Plan, Rule
from tests.toys import written

FOUR = written(4)


def test_the_first_blocks_are_replaced_by_their_feature_map_at_every_second_step() -> None:
    plan = FasterDiffusion().plan(FOUR, 5)  # the step that is left over is computed
    assert plan.rules == (Rule("skip", "C.C.C", blocks="0-1", predictor="feature"),)
    assert FasterDiffusion(3, 3).plan(FOUR, 6).rules[0] == Rule("skip", "C..C..", "0-2", predictor="feature")


def test_it_saves_what_a_delta_of_as_many_blocks_saves() -> None:
    plan, delta = FasterDiffusion(2, 3).plan(FOUR, 4), Plan(4, (Rule("skip", "C.C.", blocks="1-3"),))
    assert [row.count("S") for row in sorted(plan.table(FOUR).values())] == [
        row.count("S") for row in sorted(delta.table(FOUR).values())
    ]


def test_an_interval_of_one_computes_everything() -> None:
    assert FasterDiffusion(1).plan(FOUR, 5) == Plan(5)
    assert METHODS["faster-diffusion"] is FasterDiffusion


def test_wrong_settings_are_refused_with_what_is_needed() -> None:
    with pytest.raises(CalibrationError, match=r"1 .* or more, found 0"):
        FasterDiffusion(0)
    with pytest.raises(CalibrationError, match="blocks 0-4 are skipped, but Toy has the blocks 0-3"):
        FasterDiffusion(blocks=5).plan(FOUR, 4)
    with pytest.raises(CalibrationError, match="at least one block must be skipped"):
        FasterDiffusion(blocks=0).plan(FOUR, 4)
    with pytest.raises(CalibrationError, match="in several segments"):
        FasterDiffusion(blocks=3).plan(written(4, (0, 2), (2, 4)), 4)
