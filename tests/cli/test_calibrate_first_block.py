"""`dicache calibrate first-block`, on the bundled model."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicache.schedules import FirstBlockPolicy, Schedule
from tests.cli.test_commands import dicache, refused


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a profile of one and four first blocks, which is the current one while the tests run."""
    folder = tmp_path_factory.mktemp("work")
    before = Path.cwd()
    os.chdir(folder)
    dicache("profile", "--model", "digits", "--runs", 2, "--steps", 20, "--first-blocks", "1, 4", "--guidance", 4)
    yield folder
    os.chdir(before)


def test_a_target_finds_the_threshold_and_evaluate_finds_the_saving(workplace: Path) -> None:
    told = dicache("calibrate", "first-block", "--target-speedup", 1.8).stdout
    schedule = Schedule.load("first-block.json")
    assert isinstance(schedule.policy, FirstBlockPolicy)
    assert f"threshold {schedule.policy.threshold:.4g}, " in told
    assert 1 / schedule.macs_fraction() >= 1.8 - 1e-3
    words = ("--model", "digits", "--guidance", 4, "--runs", 2, "--timing-rounds", 0, "--references", "references")
    made = json.loads(dicache("evaluate", "--schedule", "first-block.json", *words, "--json").stdout)
    (result,) = (each for each in made["results"] if each["schedule"].startswith("first-block"))
    assert result["macs_fraction"] == pytest.approx(schedule.macs_fraction(), abs=0.1)
    assert result["psnr"]["mean"] > 20


def test_every_setting_reaches_the_policy(workplace: Path) -> None:
    words = ("--threshold", 0.2, "--first", 4, "--last", 2, "--max-continuous", 3, "--max-cached", 7, "--warm-up", 2)
    dicache("calibrate", "first-block", *words, "--last-steps", 1, "--at-threshold", "reuse", "-o", "db.json")
    want = FirstBlockPolicy(0.2, 4, 2, 3, 7, "reuse", first_steps=2, last_steps=1)
    assert Schedule.load("db.json").policy == want
    shown = dicache("schedules", "show", "db.json").stdout
    assert "decides at run time: threshold 0.2 on the relative change of what blocks 0-3 add since" in shown
    assert "what equals it skips; at most 3 steps skipped in a row; at most 7 steps skipped in all" in shown
    rows = json.loads(dicache("schedules", "show", "db.json", "--json").stdout)
    assert rows["adaptive"]
    assert rows["sites"]["3.mlp"] == rows["sites"]["10.attn"] == "C" * 20
    assert "S" in rows["sites"]["4.attn"]
    cost = json.loads(dicache("cost", "--model", "digits", "--schedule", "db.json", "--json").stdout)
    assert cost["fraction"] == pytest.approx(Schedule.load("db.json").macs_fraction())


def test_it_is_frozen_compared_and_drawn(workplace: Path) -> None:
    dicache("calibrate", "first-block", "--max-macs", 0.6, "-o", "a.json")
    dicache("calibrate", "first-block", "--max-macs", 0.8, "--first", 4, "-o", "b.json")
    assert "of the MACs" in dicache("schedules", "freeze", "a.json").stdout
    frozen = json.loads(dicache("schedules", "show", "a-frozen.json", "--json").stdout)
    assert not frozen["adaptive"]
    assert set(frozen["sites"]["0.attn"]) == {"C"}
    differing = json.loads(dicache("schedules", "diff", "a.json", "b.json", "--json").stdout)
    assert differing["policy"]["first"] == [1, 4]
    dicache("plot", "schedule", "a.json", "b.json", "-o", "s.png")
    assert Path("s.png").stat().st_size > 5000


def test_without_a_profile_what_it_saves_is_not_known(workplace: Path) -> None:
    words = ("calibrate", "first-block", "--model", "pixart", "--steps", 20, "--threshold", 0.1, "-o", "p.json")
    assert "decides at run time what it saves" in dicache(*words).stdout
    assert json.loads(dicache(*words, "--json").stdout)["macs_fraction"] is None
    assert Schedule.load("p.json").anatomy.model == "PixArtTransformer2DModel"


def test_a_row_of_skips_longer_than_the_profile_foretells_is_warned_of(workplace: Path) -> None:
    told = dicache("calibrate", "first-block", "--threshold", 99, "-o", "all.json").stdout
    assert "Warning: 1 of them on average because the last computed step is more than 16 steps back" in told
    told = dicache("calibrate", "first-block", "--threshold", 99, "--max-continuous", 16, "-o", "all.json").stdout
    assert "Warning" not in told


def test_what_cannot_be_is_refused(workplace: Path) -> None:
    assert "it has those of the first 1 and 4; profile again with --first-blocks 1,2,4" in refused(
        "calibrate", "first-block", "--threshold", 0.1, "--first", 2
    )
    assert "take a last of at most 7" in refused(
        "calibrate", "first-block", "--threshold", 0.1, "--first=4", "--last=8"
    )
    assert "cannot be reached" in refused("calibrate", "first-block", "--target-speedup", 30)
    assert "--first-blocks: found 12" in refused("profile", "--model", "digits", "--first-blocks", "12", "-o", "x.h5")
    for words in (
        (),
        ("--threshold", 0.1, "--max-macs", 0.5),
        ("--max-macs", 0.5, "--model", "digits"),
        ("--threshold", 0.1, "--steps", 20),
        ("--threshold", 0.1, "--at-threshold", "skip"),
    ):
        assert dicache("calibrate", "first-block", *words, fails=True).exit_code == 2
    assert dicache("profile", "--model", "digits", "--first-blocks", "0", fails=True).exit_code == 2
