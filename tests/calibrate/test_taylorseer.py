import pytest

from dicache.calibrate import CalibrationError
from dicache.calibrate.methods import METHODS, planned_schedule
from dicache.calibrate.taylorseer import TaylorSeer
from dicache.schedules import Plan, Rule, Target
from tests.toys import written

TWO = written(2)


@pytest.mark.parametrize(
    ("settings", "steps", "computed"),
    [
        (TaylorSeer(5, 1, 3, anchor="diffusers"), 28, (0, 1, 2, 4, 9, 14, 19, 24)),
        (TaylorSeer(4), 50, (0, *range(1, 50, 4))),
        (TaylorSeer(3), 50, (0, *range(1, 50, 3))),
        (TaylorSeer(6, 1, 3), 50, (0, 1, 2, 8, 14, 20, 26, 32, 38, 44)),  # FLUX
        (TaylorSeer(2, 1, 1), 5, (0, 2, 4)),
    ],
)
def test_the_computed_steps_are_the_published_ones(settings: TaylorSeer, steps: int, computed: tuple[int, ...]) -> None:
    assert settings.plan(TWO, steps).computed_steps == computed


def test_each_branch_is_foretold_or_the_body_at_once() -> None:
    branch = TaylorSeer(3, 2).plan(TWO, 6)
    assert branch.rules == (Rule("reuse", "CC..C.", predictor="taylor", order=2),)
    body = TaylorSeer(3, 2, granularity="body").plan(TWO, 6)
    assert body.rules == (Rule("skip", "CC..C.", predictor="taylor", order=2),)


def test_an_interval_of_one_computes_everything() -> None:
    assert TaylorSeer(1).plan(TWO, 5) == Plan(5)


def test_the_schedule_knows_its_settings() -> None:
    schedule = planned_schedule(TaylorSeer(3, 1), TWO, Target(), 6)
    assert (schedule.method, schedule.settings["order"]) == ("taylorseer", 1)
    assert METHODS["taylorseer"] is TaylorSeer


def test_wrong_settings_are_refused_with_what_is_needed() -> None:
    with pytest.raises(CalibrationError, match=r"1 .* or more, found 0"):
        TaylorSeer(0)
    with pytest.raises(CalibrationError, match=r"order must be 0 \(hold\) to 4, found 5"):
        TaylorSeer(order=5)
    with pytest.raises(CalibrationError, match="warm-up must be 1 step or more, found 0"):
        TaylorSeer(warm_up=0)
    with pytest.raises(CalibrationError, match="granularity must be branch or body, found 'block'"):
        TaylorSeer(granularity="block")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="interval must be below the 4 steps, found 9"):
        TaylorSeer(9).plan(TWO, 4)
    with pytest.raises(CalibrationError, match="warm-up must be below the 4 steps, found 4"):
        TaylorSeer(2, warm_up=4).plan(TWO, 4)
