from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicache.anatomy import Anatomy
from dicache.calibrate import CalibrationError
from dicache.calibrate.delta_dit import DeltaDit, DeltaDitSpace, ordered, within_budget
from dicache.calibrate.judging import Goal, Score
from dicache.calibrate.methods import METHODS, planned_schedule
from dicache.calibrate.search import search
from dicache.profiler import Profile
from dicache.schedules import Rows, Schedule, Target
from tests.calibrate.test_delta_cache import PIXART, blocks_of
from tests.calibrate.test_teacache import changes, profile_of

TOY = blocks_of(4)


@pytest.mark.parametrize(
    ("target", "total", "steps", "blocks", "skipped"),
    [
        (53.532, 85.651, 20, 28, 21),  # table 1, PixArt-alpha
        (53.53, 85.651, 20, 28, 21),
        (2.862, 4.579, 20, 28, 21),  # table 2, DiT-XL/2
        (7.953, 8.565, 4, 28, 4),  # tables 3 and 8, PixArt-alpha with LCM
        (7.647, 8.565, 4, 28, 6),
        (6.883, 8.565, 4, 28, 11),
        (6.118, 8.565, 4, 28, 16),
        (105.160, 168.256, 28, 24, 18),  # table 7, SD3
        (67.297, 85.651, 20, 28, 12),  # table 10, what a search found
        (55.061, 85.651, 20, 28, 20),
        (35.77, 57.24, 250, 28, 21),  # table 12
    ],
)
def test_the_planner_gives_the_published_numbers_of_blocks(
    target: float, total: float, steps: int, blocks: int, skipped: int
) -> None:
    assert within_budget(steps, blocks, target / total) == (2, skipped)


@pytest.mark.parametrize("speedup", [1.1, 1.3, 1.6, 1.9, 2.0, 2.2, 2.9, 3.0, 4.5, 7.0, 20.0])
@pytest.mark.parametrize("steps", [20, 28, 50])
def test_the_planner_misses_a_target_by_less_than_a_block_a_skipped_step(speedup: float, steps: int) -> None:
    interval, many = within_budget(steps, 28, 1 / speedup)
    plan = DeltaDit(interval, many).plan(PIXART, steps)
    skipped = sum(rule.steps.count(".") for rule in plan.rules)
    computed, wanted = steps * 28 - skipped * many, steps * 28 / speedup
    assert wanted - 0.1 * skipped <= computed < wanted + skipped


def test_the_planner_raises_the_interval_where_left_over_steps_cost_too_much() -> None:
    assert within_budget(20, 28, 1 / 3) == (4, 24)  # with 3, 2 steps are left over and 8 of 20 computed
    assert within_budget(20, 28, 1 / 1.6, interval=3) == (3, 17)  # ceil(((350 - 56) / 6 - 28) / 2) = 11


def test_targets_that_cannot_be_reached_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"share of 0\.040 .* the least is 0\.050"):
        within_budget(20, 28, 0.04)
    with pytest.raises(CalibrationError, match=r"with an interval of 2; the least is 0\.500"):
        within_budget(20, 28, 0.4, interval=2)
    with pytest.raises(CalibrationError, match="leaves no block to skip"):
        within_budget(20, 28, 0.999)
    with pytest.raises(CalibrationError, match="between 0 and 1, found 1"):
        within_budget(20, 28, 1.0)


def test_the_deep_blocks_are_skipped_before_the_boundary_and_the_shallow_ones_behind_it() -> None:
    plan = DeltaDit(2, blocks=1, boundary=4).plan(TOY, 8)
    table = plan.table(TOY)
    assert table["3.attn"] == "CSCSCCCC"
    assert table["0.attn"] == "CCCCCSCS"
    assert table["1.attn"] == table["2.attn"] == "C" * 8
    other = DeltaDit(2, blocks=1, boundary=4, order="reversed").plan(TOY, 8).table(TOY)
    assert (other["0.attn"], other["3.attn"]) == ("CSCSCCCC", "CCCCCSCS")


def test_at_the_ends_of_its_range_the_boundary_leaves_one_range_only() -> None:
    assert [rule.blocks for rule in DeltaDit(boundary=20).plan(PIXART, 20).rules] == ["7-27"]  # the paper's "deep"
    assert [rule.blocks for rule in DeltaDit(boundary=0).plan(PIXART, 20).rules] == ["0-20"]


def test_the_skipped_step_decides_which_delta_is_kept() -> None:
    rows = Rows(DeltaDit(3, blocks=3, boundary=2).plan(TOY, 6), TOY)  # steps 1 and 2 lie on both sides of it
    assert set(rows.row(0).keep_delta) == {(1, 4), (0, 3)}
    assert rows.row(1).skip == rows.row(1).release_delta == ((1, 4),)
    assert rows.row(2).skip == ((0, 3),)
    assert rows.row(3).keep_delta == ((0, 3),)


def test_left_out_settings_are_the_papers() -> None:
    assert DeltaDit().boundary_of(20) == 12
    assert DeltaDit().boundary_of(4) == 2
    schedule = planned_schedule(DeltaDit(), PIXART, Target(), 20)
    assert schedule.macs_fraction() == pytest.approx(53.532 / 85.651, abs=1e-5)
    assert METHODS["delta-dit"] is DeltaDit


def profile_with(errors: dict[tuple[int, int], list[float]]) -> Profile:
    """A profile of TOY that says how much the delta of a range changes at each step."""
    base = profile_of(changes(), changes())
    known = {key: np.array([[[np.nan, *value]]]) for key, value in errors.items()}

    class Told(Profile):
        def range_error(self, start: int, stop: int) -> np.ndarray:
            return known[start, stop]

    target = replace(base.provenance.target, timesteps=tuple(float(t) for t in range(4, 0, -1)))
    return Told(replace(base.provenance, anatomy=TOY, target=target), base.runs, base.arrays)


@pytest.mark.parametrize(
    ("deep", "shallow", "order"),
    [
        ([0.1, 0.1, 0.3], [0.2, 0.1, 0.1], "aligned"),
        ([0.3, 0.1, 0.1], [0.1, 0.1, 0.3], "reversed"),
        ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1], "aligned"),
    ],
)
def test_the_order_that_changes_less_is_read_from_a_profile(
    deep: list[float], shallow: list[float], order: str
) -> None:
    profile = profile_with({(1, 4): deep, (0, 3): shallow})
    settings, errors = ordered(DeltaDit(2, blocks=3, boundary=2, order="auto"), profile)
    assert settings == DeltaDit(2, blocks=3, boundary=2, order=order)  # type: ignore[arg-type]
    assert errors == pytest.approx(
        {"aligned": (deep[0] + shallow[2]) / 2, "reversed": (shallow[0] + deep[2]) / 2}
    )  # steps 1 and 3 are skipped


def test_steps_of_which_no_pass_has_an_error_are_not_compared() -> None:
    both = profile_with({(1, 4): [0.1, 0.1, 0.3], (0, 3): [0.2, 0.1, 0.1]})
    one_left_out = both.range_error(1, 4).repeat(2, axis=1)
    one_left_out[0, 1, 2:] = np.nan  # the second pass ends before the others
    settings = DeltaDit(2, blocks=3, boundary=2, order="auto")

    class Told(type(both)):  # type: ignore[misc]
        def range_error(self, start: int, stop: int) -> np.ndarray:
            return one_left_out if start else one_left_out[:, 1:] * np.nan

    known = Told(both.provenance, both.runs, both.arrays)
    with pytest.raises(CalibrationError, match=r"has no errors of some of the steps .* give --order aligned or"):
        ordered(settings, known)
    one_left_out[0, 0, 2:] = 0.3
    Told.range_error = lambda self, start, stop: one_left_out  # type: ignore[method-assign]
    assert ordered(settings, known)[1]["aligned"] == pytest.approx(0.2)


def test_over_longer_intervals_the_changes_add_up() -> None:
    profile = profile_with({(1, 4): [0.1, 0.2, 0.4], (0, 3): [1.0, 1.0, 1.0]})
    _, errors = ordered(DeltaDit(4, blocks=3, boundary=4), profile)
    assert errors["aligned"] == pytest.approx((0.1 + 0.3 + 0.7) / 3, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": 0}, "1 .* or more, found 0"),
        ({"blocks": 0}, "1 to 28 blocks of Toy can be skipped, found 0; 21 are usual"),
        ({"blocks": 29}, "1 to 28 blocks .* found 29"),
        ({"boundary": 21}, "0 to 20 elapsed steps, found 21; 12 is usual"),
        ({"boundary": -1}, "0 to 20 elapsed steps, found -1"),
        ({"order": "auto"}, "read from a profile; give --profile"),
        ({"order": "other"}, "aligned, reversed or auto, found 'other'"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_needed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        DeltaDit(**settings).plan(PIXART, 20)


def space(anatomy: Anatomy = PIXART, steps: int = 20, fixed: tuple[str, ...] = (), **settings: Any) -> DeltaDitSpace:
    return DeltaDitSpace(anatomy, Target(), steps, DeltaDit(**settings), fixed)


def test_a_search_varies_what_is_not_given() -> None:
    assert set(space().axes) == {"interval", "blocks", "boundary", "order"}
    assert set(space(fixed=("interval", "order")).axes) == {"blocks", "boundary"}
    assert space().axes["boundary"] == range(21)


def test_a_search_begins_with_the_fewest_blocks_that_reach_the_target() -> None:
    assert space().plain(None) == {"interval": 2, "blocks": 21, "boundary": 12, "order": "aligned"}
    assert space().plain(53.54 / 85.651) == {"interval": 2, "blocks": 21, "boundary": 12, "order": "aligned"}
    assert space(fixed=("blocks",), blocks=14).plain(0.7) == {"interval": 3, "boundary": 12, "order": "aligned"}
    with pytest.raises(CalibrationError, match="cannot be reached"):
        space(fixed=("interval",)).plain(0.4)


def test_the_best_boundary_that_was_tried_is_taken(tmp_path: Path) -> None:
    seen: list[float] = []

    class Judge:
        def __len__(self) -> int:
            return 1

        def __call__(self, schedule: Schedule, which: slice = slice(1)) -> Score:
            seen.append(40.0 - abs(schedule.settings["boundary"] - 3))
            return Score(seen[-1], schedule.macs_fraction(), (seen[-1],))

    found = search(
        space(TOY, 6, fixed=("interval", "order", "blocks"), blocks=3),
        Goal(max_macs=0.8),
        Judge(),
        trials=4,
        storage=f"sqlite:///{tmp_path}/s.db",
        name="s",
        where="s.db",
        identity={},
        progress=False,
    )
    assert found.score.psnr == max(seen)
    assert len(set(seen)) > 1
    assert found.schedule.settings["blocks"] == 3
