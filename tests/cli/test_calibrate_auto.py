"""`dicache calibrate auto`, on the bundled model."""

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
    dicache("profile", "--model", "digits", "--runs", 2, "--steps", 6, "--guidance", 4)
    yield folder
    os.chdir(before)


def test_it_tells_what_was_tried_and_how_it_does_on_other_runs(workplace: Path) -> None:
    words = ("--target-speedup", 2, "--runs", 2, "--budget", 40, "--held-out", 2)
    told = dicache("calibrate", "auto", *words).stdout
    assert "Tried for at most 0.500 of the MACs, on 2 runs" in told
    assert "profile and solver: 3 outputs" in told
    assert "On runs that nothing was tried on:" in told
    schedule = Schedule.load("auto.json")
    assert schedule.method == "auto"
    assert schedule.macs_fraction() <= 0.5
    assert [row["schedule"] for row in schedule.measured["held_out"]["results"]][:1] == ["auto"]
    assert any((workplace / "auto.auto").rglob("*.npz"))
    again = json.loads(dicache("calibrate", "auto", *words, "--json").stdout)
    assert again["macs_fraction"] == pytest.approx(schedule.macs_fraction(), abs=1e-3)
    assert Schedule.load("auto.json").plan == schedule.plan
    shown = json.loads(dicache("schedules", "show", "auto.json", "--json").stdout)
    assert shown["method"] == "auto"


def test_one_goal_is_given(workplace: Path) -> None:
    for words in ((), ("--max-macs", 0.5, "--min-psnr", 30)):
        result = dicache("calibrate", "auto", *words, fails=True)
        assert result.exit_code == 2
        assert "give one of --target-speedup, --max-macs and --min-psnr" in result.stderr
    assert "3 or more" in refused("calibrate", "auto", "--max-macs", 0.5, "--max-rows", 2)
