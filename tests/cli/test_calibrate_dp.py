"""`dicache calibrate dp`, on the bundled model."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicache.schedules import Schedule
from tests.cli.test_commands import dicache, refused


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a profile, which is the current one while the tests run."""
    folder = tmp_path_factory.mktemp("work")
    before = Path.cwd()
    os.chdir(folder)
    dicache("profile", "--model", "digits", "--runs", 2, "--steps", 10, "--guidance", 4)
    yield folder
    os.chdir(before)


def test_a_plan_is_replayed_with_the_steps_that_it_says(workplace: Path) -> None:
    told = dicache("calibrate", "dp", "--steps-computed", 5, "--warm-up", 2, "--force-last", "--order", 2).stdout
    schedule = Schedule.load("dp.json")
    errors = schedule.measured["expected_errors"]["body"]
    assert schedule.plan is not None
    (rule,) = schedule.plan.rules
    assert (rule.action, rule.predictor, rule.order, rule.steps.count("C")) == ("skip", "taylor", 2, 5)
    assert rule.steps.startswith("CC")
    assert rule.steps.endswith("C")
    worst = max(errors)
    assert f"body: 5 of 10 steps computed; expected relative error {sum(errors) / 5:.3g} at the others" in told
    assert f"{worst:.3g} at step {errors.index(worst)}" in told
    words = ("--model", "digits", "--guidance", 4, "--runs", 2, "--timing-rounds", 0, "--references", "references")
    made = json.loads(dicache("evaluate", "--schedule", "dp.json", *words, "--json").stdout)
    (result,) = (each for each in made["results"] if each["schedule"].startswith("dp"))
    assert result["computed_steps"] == 5
    assert result["macs_fraction"] == pytest.approx(schedule.macs_fraction(), abs=1e-3)
    assert result["psnr"]["mean"] > 20


def test_branches_share_a_budget(workplace: Path) -> None:
    chosen = ("--target-speedup", 2, "--granularity", "branch", "--separate", "--predictor", "hold", "--max-gap", 4)
    found = json.loads(dicache("calibrate", "dp", *chosen, "-o", "branch.json", "--json").stdout)
    assert found["macs_fraction"] <= 0.5
    rows = json.loads(dicache("schedules", "show", "branch.json", "--json").stdout)["sites"]
    for kind, count in found["computed_steps"].items():
        assert {rows[f"{block}.{kind}"].count("C") for block in range(12)} == {count}
        assert "RRRR" not in rows[f"3.{kind}"]
    words = ("--model", "digits", "--guidance", 4, "--runs", 2, "--timing-rounds", 0, "--references", "references")
    made = json.loads(dicache("evaluate", "--schedule", "branch.json", *words, "--json").stdout)
    (result,) = (each for each in made["results"] if each["schedule"].startswith("branch"))
    assert result["macs_fraction"] == pytest.approx(found["macs_fraction"], abs=1e-3)
    assert result["psnr"]["mean"] > 20


def test_a_forecast_has_its_weights_in_the_schedule(workplace: Path) -> None:
    told = dicache("calibrate", "dp", "--steps-computed", 5, "--predictor", "forecast", "-o", "forecast.json").stdout
    schedule = Schedule.load("forecast.json")
    assert schedule.plan is not None
    (rule,) = schedule.plan.rules
    assert (rule.action, rule.predictor, rule.steps.count("C"), len(rule.weights)) == ("skip", "forecast", 5, 5)
    (errors,), (accumulated,) = (schedule.measured[f"expected_{x}"].values() for x in ("errors", "accumulated"))
    assert f"body: 5 of 10 steps computed; expected relative error {sum(errors) / 5:.3g} at the others" in told
    assert f"accumulated {accumulated[-1]:.3g} in the last latents" in told
    words = ("--model", "digits", "--guidance", 4, "--runs", 2, "--timing-rounds", 0, "--references", "references")
    made = json.loads(dicache("evaluate", "--schedule", "forecast.json", *words, "--json").stdout)
    (result,) = (each for each in made["results"] if each["schedule"].startswith("forecast"))
    assert result["computed_steps"] == 5
    assert result["psnr"]["mean"] > 25


def test_one_budget_is_given_and_can_be_met(workplace: Path) -> None:
    for words in ((), ("--steps-computed", 3, "--max-macs", 0.5)):
        said = dicache("calibrate", "dp", *words, fails=True)
        assert said.exit_code == 2
        assert "give one of --steps-computed, --target-speedup and --max-macs" in said.stderr
    assert "the least is 0.3" in refused("calibrate", "dp", "--max-macs", 0.1, "--warm-up", 3)
    assert "must be 0 with hold, found 2" in refused(
        "calibrate", "dp", "--steps-computed", 3, "--predictor", "hold", "--order", 2
    )
