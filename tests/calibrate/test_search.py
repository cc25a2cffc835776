"""The search against judges that answer at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from dicache.calibrate import CalibrationError
from dicache.calibrate.fora import Fora, ForaSpace
from dicache.calibrate.judging import Goal, Score, evenly_spaced
from dicache.calibrate.methods import Axis, Between
from dicache.calibrate.search import Found, search
from dicache.calibrate.teacache import TeaCache, TeaCacheSpace
from dicache.schedules import Plan, Rule, Schedule, Target, TeaCachePolicy
from tests.calibrate.test_fora import TWO_BLOCKS
from tests.calibrate.test_teacache import changes, profile_of

STEPS = 20


class Skips:
    """Skips `count` steps at the end, whatever `idle` is."""

    axes: Mapping[str, Axis] = {"count": range(1, 12), "idle": ("a", "b")}
    identity: Mapping[str, Any] = {"method": "skips"}

    def plain(self, max_macs: float | None) -> Mapping[str, Any]:
        return {"count": 3, "idle": "a"}

    def schedule(self, parameters: Mapping[str, Any]) -> Schedule:
        letters = "C" * (STEPS - parameters["count"]) + "." * parameters["count"]
        plan = Plan(STEPS, (Rule("skip", letters),))
        return Schedule("skips", dict(parameters), TWO_BLOCKS, Target(), STEPS, plan)


class Judge:
    """Takes 1 dB for each skipped step from all of 8 images; counts what it was asked for."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.seen: list[int] = []
        self._stop_at = stop_at

    def __len__(self) -> int:
        return 8

    def __call__(self, schedule: Schedule, which: slice = slice(8)) -> Score:
        count = schedule.settings["count"]
        if not which.start:
            if len(self.seen) == self._stop_at:
                raise KeyboardInterrupt
            self.seen.append(count)
        images = len(range(8)[which])
        return Score(50.0 - count, schedule.macs_fraction(), (50.0 - count,) * images)


def find(folder: Path, judge: Judge, goal: Goal, trials: int = 8, **settings: Any) -> Found:
    given: dict[str, Any] = {
        "storage": f"sqlite:///{folder}/s.db",
        "name": "s",
        "where": "s.db",
        "identity": {"weights": "f00"},
        "progress": False,
        **settings,
    }
    return search(Skips(), goal, judge, trials=trials, **given)


def macs(count: int) -> float:
    return Skips().schedule({"count": count}).macs_fraction()


def test_the_best_images_within_a_share_of_the_macs_are_found(tmp_path: Path) -> None:
    judge = Judge()
    found = find(tmp_path, judge, Goal(max_macs=macs(6)), trials=6)
    assert found.score == Score(44.0, macs(6), (44.0,) * 8)
    assert found.schedule.settings["count"] == 6
    assert sorted(judge.seen) == [6, 7, 8, 9, 10, 11]  # each once, and none of which the plan shows that it is too much
    assert (found.trials, found.feasible) == (6, 6)
    assert found.not_run > 0


def test_the_fewest_macs_for_good_images_are_found(tmp_path: Path) -> None:
    judge = Judge()
    found = find(tmp_path, judge, Goal(min_psnr=45.0), trials=11)
    assert judge.seen[0] == 3  # what there is without a search
    assert found.parameters["count"] == 5
    assert sorted(judge.seen) == list(range(1, 12))
    assert found.feasible == 5
    assert [tried.parameters["count"] for tried in found.front] == list(range(11, 0, -1))
    assert found.spent == pytest.approx(8 * sum(macs(count) for count in range(1, 12)))


def test_a_space_that_is_tried_out_ends_the_search(tmp_path: Path) -> None:
    judge = Judge()
    assert find(tmp_path, judge, Goal(min_psnr=45.0), trials=50).trials == 11
    assert len(judge.seen) == 11


def test_a_search_that_was_broken_off_goes_on_as_if_it_was_not(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole, goal = Judge(), Goal(min_psnr=45.0)
    want = find(tmp_path / "whole", whole, goal)
    seen: list[int] = []
    for stop_at in (0, 2, 3):
        judge = Judge(stop_at)
        with pytest.raises(CalibrationError, match=rf"interrupted after {len(seen) + stop_at} of 8 trials, .* in s.db"):
            find(tmp_path / "parts", judge, goal)
        seen += judge.seen
    last = Judge()
    assert find(tmp_path / "parts", last, goal) == want
    assert [*seen, *last.seen] == whole.seen
    again = Judge()
    assert find(tmp_path / "parts", again, goal) == want
    assert again.seen == []


def test_a_trial_that_was_killed_is_run_again(tmp_path: Path) -> None:
    find(tmp_path, Judge(), Goal(min_psnr=45.0), trials=2)
    study = optuna.load_study(storage=f"sqlite:///{tmp_path}/s.db", study_name="s")
    study.ask()  # and never told
    found = find(tmp_path, Judge(), Goal(min_psnr=45.0), trials=4)
    assert found.trials == 4


def test_optuna_is_told_what_breaks_the_limit(tmp_path: Path) -> None:
    find(tmp_path, Judge(), Goal(min_psnr=45.0), trials=11)
    study = optuna.load_study(storage=f"sqlite:///{tmp_path}/s.db", study_name="s")
    for trial in study.trials:
        assert trial.constraints["limit"] == 45.0 - trial.user_attrs["psnr"]
    assert study.metric_names == ["macs_fraction", "psnr"]
    assert {trial.params["count"] for trial in study.best_trials} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"goal": Goal(min_psnr=44.0)}, r'goal {"min_psnr": 45.0}, now {"min_psnr": 44.0}'),
        ({"identity": {"weights": "ba4"}}, "weights f00, now ba4"),
        ({"seed": 1}, "seed 0, now 1"),
        ({"identity": {"weights": "f00", "conditions": "12ab"}}, "other conditions"),
    ],
)
def test_another_search_in_the_same_storage_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    find(tmp_path, Judge(), Goal(min_psnr=45.0), trials=1)
    with pytest.raises(CalibrationError, match=f"s.db holds a search with other settings: {message}"):
        find(tmp_path, Judge(), **{"goal": Goal(min_psnr=45.0), **change})


def test_a_limit_that_nothing_keeps_to_is_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none of 3 trials had 60 dB or more; the nearest had 4\d.0 dB at"):
        find(tmp_path, Judge(), Goal(min_psnr=60.0), trials=3)


def test_a_storage_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_text("This is not a database, but a text of some length. " * 20)
    with pytest.raises(CalibrationError, match=r"s.db cannot be used for a search: .*not a database"):
        find(tmp_path, Judge(), Goal(min_psnr=45.0))
    with pytest.raises(CalibrationError, match="cannot be used for a search"):
        find(tmp_path, Judge(), Goal(min_psnr=45.0), storage="nonsense")


def test_a_goal_is_one() -> None:
    for wrong in ({}, {"max_macs": 0.5, "min_psnr": 30.0}):
        with pytest.raises(CalibrationError, match="one goal"):
            Goal(**wrong)
    with pytest.raises(CalibrationError, match=r"above 0 and at most 1, found 1\.5"):
        Goal(max_macs=1.5)
    with pytest.raises(CalibrationError, match="a number of dB"):
        Goal(min_psnr=float("nan"))


def test_what_fora_lets_vary() -> None:
    space = ForaSpace(TWO_BLOCKS, Target(), 8, Fora(2), fixed={"anchor"})
    assert space.axes == {"interval": range(2, 8), "branches": ("attn,mlp", "attn", "mlp")}
    assert space.plain(None) == {"interval": 2, "branches": "attn,mlp"}
    plain = space.plain(0.6)
    assert plain["interval"] == 4
    assert space.schedule(plain).macs_fraction() <= 0.6 < space.schedule(space.plain(None)).macs_fraction()
    assert space.schedule({"interval": 4, "branches": "mlp"}).table()["0.attn"] == "C" * 8
    with pytest.raises(CalibrationError, match="cannot be reached in 8 steps"):
        space.plain(0.01)


def test_what_teacache_lets_vary() -> None:
    x = changes()
    settings = TeaCache(target_speedup=1.4, negative="abs")
    space = TeaCacheSpace(profile_of(x, 2 * x), settings, fixed={"degree", "device"}, max_macs=1 / 1.4)
    assert set(space.axes) == {"macs", "foretell", "fit_to"}
    shares = space.axes["macs"]
    assert isinstance(shares, Between)
    assert shares.low < 1 / 1.4 < shares.high
    plain = space.schedule(space.plain(1 / 1.4))
    assert plain.policy == settings.calibrate(profile_of(x, 2 * x)).policy
    assert isinstance(plain.policy, TeaCachePolicy)
    assert plain.policy.negative == "abs"
    by_steps = space.schedule({"macs": 2 / 3, "foretell": "steps", "fit_to": "body"})
    assert 1 / by_steps.macs_fraction() >= 1.5
    with pytest.raises(CalibrationError, match=r"share of 0.100 of the MACs cannot be reached in 11 steps"):
        assert TeaCacheSpace(profile_of(x, x), settings, max_macs=0.1).axes


def test_evenly_spaced_steps_cost_about_what_they_are_asked_to() -> None:
    schedule = evenly_spaced(TWO_BLOCKS, Target(), 9, 1 - 12 / 15 * 4 / 9)
    assert schedule.table()["0.attn"] == "CSCSCSCSC"
    assert evenly_spaced(TWO_BLOCKS, Target(), 9, 1.0).macs_fraction() == 1.0
