"""Measurements in the forms of other projects: the same fits and rules give the same from them as from the profile."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicache.calibrate.magcache import MagCache
from dicache.calibrate.smoothcache import SmoothCache
from dicache.formats import FormatError, Given, find, imported
from dicache.formats.measurements import MEASUREMENTS
from dicache.formats.sglang_rows import records_of
from dicache.profiler import Profile
from dicache.profiler.storage import append, create, load
from dicache.schedules import Target
from tests.calibrate.profiled import profile
from tests.toys import written

ANATOMY, STEPS, RUNS, LAGS = written(3), 9, 4, 2


@pytest.fixture(scope="module")
def measured() -> Profile:
    """A profile of random numbers, of two guidance passes."""
    random = np.random.default_rng(0)
    sites = (RUNS, 2, STEPS, len(ANATOMY.sites), LAGS)
    arrays: dict[str, Any] = {f"teacache/{name}": random.random((RUNS, 2, STEPS, 2)) for name in ("input", "output")}
    arrays |= {"sites/diff_l1": random.random(sites) / 5, "sites/abs_l1": random.random(sites) + 0.5}
    arrays |= {"sites/dot": np.zeros(sites), "sites/norm2": np.zeros(sites)}
    arrays["magnitude"] = 1 + random.normal(0, 0.05, (RUNS, 2, STEPS, 3))
    for name in ("teacache/input", "teacache/output", "magnitude", "sites/diff_l1"):
        arrays[name][:, :, 0] = np.nan
    return profile(ANATOMY, arrays, steps=STEPS, lags=LAGS, contexts=("cond", "uncond"), parts=(1, 1))


def made(measured: Profile, name: str) -> Any:
    return json.loads(json.dumps(MEASUREMENTS[name].make(measured, "output")))


def test_pairs_are_fitted_as_they_stand(measured: Profile) -> None:
    pairs = made(measured, "teacache-pairs")
    assert {len(values) for values in pairs.values()} == {RUNS * 2 * (STEPS - 1)}
    place = RUNS + 3
    run, which, step = pairs["run"][place], pairs["pass"][place], pairs["step"][place]
    x = measured.relative_l1("input")[run, ("cond", "uncond").index(which), step - 1]
    assert pairs["x"][place] == x
    assert np.isfinite(np.polyfit(pairs["x"], pairs["y"], 4)).all()


def test_magcache_ratios_give_the_same_plan_when_they_are_imported(measured: Profile, tmp_path: Path) -> None:
    ratios = made(measured, "magcache")
    assert len(ratios) == 2 * STEPS
    assert ratios[:2] == [1.0, 1.0]
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps(ratios))
    settings = {"threshold": 0.1, "max_skip": 3, "retention": 0.2}
    back = imported(path, find("magcache-ratios"), Given("toy", ANATOMY, Target(), STEPS, settings))
    assert back.plan == MagCache(0.1, 3, 0.2).calibrate(measured).plan


def test_smoothcache_errors_give_the_same_plan_by_the_scan_of_smoothcache(measured: Profile) -> None:
    errors = made(measured, "smoothcache-errors")
    assert {name: [len(row) for row in rows] for name, rows in errors.items()} == {
        "attn1": [STEPS - 1, STEPS - 2],
        "ff": [STEPS - 1, STEPS - 2],
    }
    table = SmoothCache(0.12).calibrate(measured).table()
    for name, site in (("attn1", "0.attn"), ("ff", "0.mlp")):
        mask, i = [1] * STEPS, 0
        while i < STEPS:  # the farthest lag within the threshold is jumped to
            far = [k for k, row in enumerate(errors[name], start=1) if i < len(row) and row[i] <= 0.12]
            mask[i + 1 : i + 1 + max(far, default=0)] = [0] * max(far, default=0)
            i += max(far, default=0) + 1
        mask = [*mask[: STEPS - 1], 1]
        assert "".join("C" if value else "R" for value in mask) == table[site]
        assert 0 in mask


def test_rows_are_counts_and_means_and_come_back(measured: Profile, tmp_path: Path) -> None:
    rows = made(measured, "sglang-rows")
    assert rows["single"]["0"] == [2 * RUNS, 0.0, 0.0]
    x, y = measured.relative_l1("input")[:, :, 3].mean(), measured.relative_l1("output")[:, :, 3].mean()
    assert rows["single"]["4"] == [2 * RUNS, pytest.approx(x), pytest.approx(y)]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(json.dumps(rows))
    target = Target(scheduler="Euler", timesteps=tuple(float(STEPS - i) for i in range(STEPS)))
    provenance, records = records_of(paths, Given("toy", ANATOMY, target, STEPS))
    create(tmp_path / "p.h5", provenance)
    for record in records:
        append(tmp_path / "p.h5", record)
    back = load(tmp_path / "p.h5")
    assert [run.prompt for run in back.runs] == ["mean of 8 samples in a.json", "mean of 8 samples in b.json"]
    assert made(back, "sglang-rows")["single"]["4"][1:] == pytest.approx(rows["single"]["4"][1:])
    assert np.isnan(back.delta_cosine).all()


def test_rows_of_other_steps_or_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    given = Given("toy", ANATOMY, Target(timesteps=(3.0, 2.0, 1.0)), 3)
    for content, said in (
        ({"high": {}}, "no rows of 'single', found high; choose one of these with --expert"),
        ({"single": {"1": [1, 0.1, 0.1]}}, "no row for step 2 of 3"),
        ({"single": {"1": [1, 0.1, 0.1], "7": [1, 0.1, 0.1]}}, "unknown key '7'"),
        ({"single": {"1": [0, 0.1, 0.1], "2": [1, 0.1, 0.1]}}, "step 1 must be a whole number of 1 or more, found 0"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(FormatError, match="rows") as refused:
            records_of([path], given)
        assert said in str(refused.value)
