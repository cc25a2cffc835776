from dataclasses import replace

import pytest

from dicache.calibrate import CalibrationError
from dicache.calibrate.methods import METHODS, planned_schedule
from dicache.calibrate.pab import Pab
from dicache.schedules import Target
from tests.toys import written

TWO = written(2)
TIMES = [900.0, 800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0, 100.0, 0.0]


def test_a_branch_is_computed_once_in_its_range_and_always_outside_the_window() -> None:
    table = Pab({"attn": 2, "mlp": 3}, (100, 800)).plan(TWO, 10, TIMES).table(TWO)
    # Reused where the step is no multiple of the range and the timestep is 700 to 200.
    assert table["0.attn"] == table["1.attn"] == "CCCRCRCRCC"
    assert table["0.mlp"] == "CCRCRRCRCC"


def test_the_bounds_of_the_window_are_not_in_it() -> None:
    assert Pab({"attn": 9}, (200, 700)).plan(TWO, 10, TIMES).table(TWO)["0.attn"] == "CCCRRRRCCC"


def test_steps_are_counted_from_the_first_also_outside_the_window() -> None:
    assert Pab({"attn": 4}, (0, 650)).plan(TWO, 10, TIMES).table(TWO)["0.attn"] == "CCCRCRRRCC"


def test_branches_that_are_not_named_are_computed() -> None:
    assert Pab({"attn": 2}).plan(TWO, 10, TIMES).table(TWO)["0.mlp"] == "C" * 10


def test_temporal_blocks_in_a_list_of_their_own_have_a_range_of_their_own() -> None:
    video = replace(TWO, blocks=(TWO.blocks[0], replace(TWO.blocks[1], path="temporal")))
    ranges = {"attn": 2, "temporal.attn": 3, "mlp": 4}
    table = Pab(ranges, (100, 800)).plan(video, 10, TIMES).table(video)
    assert table["0.attn"] == "CCCRCRCRCC"
    assert table["1.attn"] == "CCRCRRCRCC"
    assert table["0.mlp"] == table["1.mlp"] == Pab({"mlp": 4}).plan(TWO, 10, TIMES).table(TWO)["0.mlp"]
    assert Pab({"temporal.attn": 3}).plan(video, 10, TIMES).table(video)["0.attn"] == "C" * 10
    with pytest.raises(CalibrationError, match=r"pab: unknown branch 'spatial\.attn'"):
        Pab({"spatial.attn": 2}).plan(video, 10, TIMES)


def test_a_range_of_one_computes_everything() -> None:
    assert Pab({"attn": 1}).plan(TWO, 10, TIMES).rules == ()


def test_without_a_sampler_the_timesteps_are_evenly_spaced() -> None:
    assert planned_schedule(Pab({"attn": 2}), TWO, Target(), 10).table()["0.attn"] == "CCCRCRCRCC"
    assert METHODS["pab"] is Pab


def test_wrong_settings_are_refused_with_what_is_needed() -> None:
    with pytest.raises(CalibrationError, match="no range is given"):
        Pab({})
    with pytest.raises(CalibrationError, match=r"range of attn must be 1 .* or more, found 0"):
        Pab({"attn": 0})
    with pytest.raises(CalibrationError, match="must rise and lie in 0-1000, found 800-100"):
        Pab({"attn": 2}, (800, 100))
    with pytest.raises(CalibrationError, match="cross_attn, but Toy has attn, mlp"):
        Pab({"attn": 2, "cross_attn": 6}).plan(TWO, 10, TIMES)
    with pytest.raises(CalibrationError, match=r"scale of 0 to 1000, .* timesteps begin at 0\.9"):
        Pab({"attn": 2}).plan(TWO, 10, [t / 1000 for t in TIMES])
