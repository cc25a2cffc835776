"""The best schedule for a budget, on the bundled model in few steps."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicache import apply
from dicache.calibrate import CalibrationError
from dicache.calibrate.auto import Auto, AutoSearch, Best
from dicache.calibrate.every_method import FewRows
from dicache.calibrate.judging import Goal
from dicache.calibrate.sensitivity import expansion, mean_gram
from dicache.calibrate.singles import singles_of, spaces_of
from dicache.cli.calibrating import write_schedule
from dicache.evaluate.quality import psnr
from dicache.evaluate.rerunning import Reruns
from dicache.models.loading import load
from dicache.models.sampling import Sampling, sample
from dicache.profiler import Profile, storage
from dicache.profiler.profiling import profile_pipeline
from dicache.schedules import Plan, Schedule
from dicache.schedules.predicting import taylor_coefficients
from dicache.schedules.rows import distinct_rows

STEPS = 8
SAMPLING = Sampling(STEPS, 4.0)
CONDITIONS, SEEDS = ["1", "4", "6", "9"], [5000, 5001, 5002, 5003]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load("digits")


@pytest.fixture(scope="module")
def profile(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    file = tmp_path_factory.mktemp("profile") / "digits.h5"
    profile_pipeline(pipeline, "digits", file, ["0", "1"], sampling=SAMPLING, progress=False)
    return storage.load(file)


def searching(pipeline: Any, profile: Profile, settings: Auto, kept: Path | None = None, **more: Any) -> AutoSearch:
    sampling = SAMPLING.resolved(pipeline)
    return AutoSearch(profile, pipeline, CONDITIONS, SEEDS, sampling, settings, kept, progress=False, **more)


@pytest.fixture(scope="module")
def half(pipeline: Any, profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> tuple[Best, Path]:
    kept = tmp_path_factory.mktemp("kept")
    return searching(pipeline, profile, Auto(Goal(0.55), budget=150), kept)(), kept


def test_what_is_found_keeps_to_the_share_and_is_no_worse_than_any_method(half: tuple[Best, Path]) -> None:
    best, _ = half
    assert best.single is not None
    assert best.schedule.macs_fraction() <= 0.55
    assert best.psnr >= best.single_psnr
    scored = [line for line in best.report if line.psnr is not None]
    singles = [line for line in scored if not line.name.startswith("forecast") and (line.macs_fraction or 1) <= 0.55]
    assert best.single_psnr == max(line.psnr or 0 for line in singles)
    assert {"fora", "teacache", "taylorseer branch 2", "dp 1"} <= {line.name for line in best.report}


def test_what_is_told_is_what_the_schedule_does(pipeline: Any, half: tuple[Best, Path]) -> None:
    best, _ = half
    with apply(pipeline, best.schedule) as cache:
        images = sample(pipeline, CONDITIONS, SEEDS, SAMPLING)
        assert cache.stats.macs_fraction == pytest.approx(best.schedule.macs_fraction(), abs=1e-6)
    want = sample(pipeline, CONDITIONS, SEEDS, SAMPLING)
    assert psnr(images, want).mean() == pytest.approx(best.psnr, abs=1e-6)
    told = best.schedule.measured["auto"]
    assert (told["spent_images"], told["runs"], told["seeds"]) == (round(best.spent, 1), 4, SEEDS)
    assert told["rows"] <= 6
    assert len(told["tried"]) == len(best.report)


def test_a_search_that_is_broken_off_goes_on_and_finds_the_same(
    pipeline: Any, profile: Profile, half: tuple[Best, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, run = 0, Reruns.__call__

    def broken(runs: Reruns, *args: Any, **more: Any) -> Any:
        nonlocal made
        made += 1
        if made == 9:
            raise KeyboardInterrupt
        return run(runs, *args, **more)

    settings = Auto(Goal(0.55), budget=150)
    with monkeypatch.context() as patch:
        patch.setattr(Reruns, "__call__", broken)
        with pytest.raises(CalibrationError, match="the same command goes on with it"):
            searching(pipeline, profile, settings, tmp_path)()
    kept = sorted(path.name for path in tmp_path.rglob("*.npz"))
    assert len(kept) == 8
    assert not pipeline.transformer._forward_hooks
    again = searching(pipeline, profile, settings, tmp_path)()
    assert again.schedule.plan == half[0].schedule.plan
    assert again.spent == pytest.approx(half[0].spent)
    assert set(kept) < {path.name for path in tmp_path.rglob("*.npz")}


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave most methods out, where they are not what is tested."""

    def some(profile: Profile, share: float) -> dict[str, Any]:
        names = ("fora", "taylorseer branch 2", "smoothcache")
        return {name: make for name, make in singles_of(profile, share).items() if name in names}

    monkeypatch.setattr("dicache.calibrate.every_method.singles_of", some)


@pytest.mark.usefixtures("few_methods")
def test_few_rows_are_kept_to(pipeline: Any, profile: Profile, half: tuple[Best, Path]) -> None:
    best = searching(pipeline, profile, Auto(Goal(0.55), max_rows=4, budget=60), half[1])()
    assert best.schedule.plan is None or distinct_rows(best.schedule.plan, profile.anatomy) <= 4


@pytest.mark.usefixtures("few_methods")
def test_the_cheapest_schedule_for_a_quality(pipeline: Any, profile: Profile, half: tuple[Best, Path]) -> None:
    best = searching(pipeline, profile, Auto(Goal(min_psnr=30.0), budget=60, granularity="body"), half[1])()
    assert best.psnr >= 30
    assert best.schedule.macs_fraction() < 0.9
    with pytest.raises(CalibrationError, match="nothing was found with 130 dB or more"):
        searching(pipeline, profile, Auto(Goal(min_psnr=130.0), budget=20, granularity="body"), half[1])()


@pytest.mark.usefixtures("few_methods")
def test_plans_are_of_one_granularity_if_that_is_asked_for(pipeline: Any, profile: Profile) -> None:
    for granularity, action in (("body", "skip"), ("branch", "reuse")):
        best = searching(pipeline, profile, Auto(Goal(0.55), budget=30, granularity=granularity))()  # type: ignore[arg-type]
        plans = [line.name for line in best.report if line.name.startswith("forecast") and line.psnr is not None]
        assert plans
        assert all(("branches" in name) == (action == "reuse") for name in plans)
        assert best.other is None


def test_the_best_of_the_other_granularity_is_told(half: tuple[Best, Path]) -> None:
    best, _ = half
    assert best.other is not None
    assert best.other[1].plan is not None
    assert best.schedule.plan is not None
    assert best.other[1].plan.rules[0].action != best.schedule.plan.rules[0].action
    assert best.other[1].macs_fraction() <= 0.55


@pytest.mark.usefixtures("few_methods")
def test_the_best_methods_are_searched_and_what_that_computes_is_beside_the_budget(
    pipeline: Any, profile: Profile, tmp_path: Path
) -> None:
    settings = Auto(Goal(0.55), budget=30, granularity="body", trials=2)
    storage = f"sqlite:///{tmp_path / 'trials.db'}"
    best = searching(pipeline, profile, settings, storage=storage)()
    searched = [line for line in best.report if line.name.endswith(", searched")]
    assert len(searched) == 3
    assert all(line.psnr is None or line.note == "2 trials" for line in searched)
    assert any(line.psnr is not None for line in searched)
    assert best.spent > sum(line.note == "2 trials" for line in searched) * 2  # each takes more than one image


@pytest.mark.usefixtures("few_methods")
def test_ctrl_c_in_a_search_of_settings_ends_all(
    pipeline: Any, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("dicache.calibrate.judging.RealRuns.__call__", interrupted)
    settings = Auto(Goal(0.55), budget=30, granularity="body", trials=2)
    with pytest.raises(CalibrationError, match="interrupted after 0 of 2 trials, which are kept"):
        searching(pipeline, profile, settings, storage=f"sqlite:///{tmp_path / 'trials.db'}")()


def test_what_has_too_many_rows_is_not_searched(profile: Profile) -> None:
    space = spaces_of(profile, 0.5)["taylorseer body 2"]()
    few = FewRows(space, 3, profile.anatomy)
    parameters = dict(space.plain(0.5))
    assert distinct_rows(few.schedule({**parameters, "order": 1}).plan or Plan(1), profile.anatomy) <= 3
    with pytest.raises(CalibrationError, match="more than 3 rows"):
        few.schedule({**parameters, "interval": 3, "order": 2})


def test_a_method_that_decides_at_run_time_may_be_the_best(
    pipeline: Any, profile: Profile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def one(profile: Profile, share: float) -> dict[str, Any]:
        return {"teacache": singles_of(profile, 0.45)["teacache"]}

    monkeypatch.setattr("dicache.calibrate.every_method.singles_of", one)
    monkeypatch.setattr("dicache.calibrate.planning.Planning.foretold", lambda *_: [])
    best = searching(pipeline, profile, Auto(Goal(0.9), budget=30))()
    assert (best.schedule.method, best.schedule.settings["from"]) == ("auto", "teacache")
    assert best.schedule.settings["of"]["degree"] == 4
    assert best.schedule.foreseen
    best.schedule.save(tmp_path / "auto.json")
    write_schedule(Schedule.load(tmp_path / "auto.json"), "", "digits", tmp_path / "again.json", as_json=False)


@pytest.mark.usefixtures("few_methods")
def test_a_schedule_that_holds_branches_is_corrected_where_there_are_priors(pipeline: Any, tmp_path: Path) -> None:
    file = tmp_path / "priors.h5"
    profile_pipeline(pipeline, "digits", file, ["0", "1"], sampling=SAMPLING, priors=True, progress=False)
    assert storage.has_priors(file)
    prior = partial(storage.load_prior, file)
    best = searching(pipeline, storage.load(file), Auto(Goal(0.55), budget=40), prior=prior)()
    corrected = [line.name for line in best.report if line.name.startswith("eoc")]
    assert len(corrected) == 4
    assert len({name.rpartition(" on ")[2] for name in corrected}) == 1


@pytest.mark.parametrize(
    ("settings", "found"),
    [({"max_rows": 2}, "3 or more"), ({"budget": 0}, "above 0"), ({"granularity": "x"}, "any, body, branch")],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], found: str) -> None:
    with pytest.raises(CalibrationError, match=found):
        Auto(Goal(0.5), **settings)


def test_a_profile_without_guided_residuals_is_refused(profile: Profile) -> None:
    blank = {**profile.arrays, "body/gram": np.full_like(profile.arrays["body/gram"], np.nan)}
    with pytest.raises(CalibrationError, match="no products of the body's residuals"):
        mean_gram(replace(profile, arrays=blank))


def test_an_expansion_has_the_weights_of_taylors_differences() -> None:
    first, second = taylor_coefficients([5, 3, 2], 6)
    weights = expansion([5, 3, 2], 6)
    assert [source for source, _ in weights] == [5, 3, 2]
    assert [weight for _, weight in weights] == pytest.approx([1 + first, second - first, -second])
    assert expansion([4], 5) == ((4, 1.0),)
