"""`dicache calibrate` as a user types it: searches on the bundled model, goals, and what is told of a fit."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicache import Schedule
from dicache.schedules import TeaCachePolicy
from tests.cli.test_commands import dicache

SMALL = ("--runs", 1, "--trials", 2)


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a profile, which is the current one while the tests run."""
    folder = tmp_path_factory.mktemp("search")
    before, cache = Path.cwd(), os.environ.get("XDG_CACHE_HOME")
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    dicache("calibrate", "fora", "--model", "digits", "--steps", 8, "--interval", 2, "-o", "base.json")
    dicache("profile", "--model", "digits", "--runs", 2, "--steps", 8, "--priors-for", "base.json")
    yield folder
    os.chdir(before)
    os.environ.pop("XDG_CACHE_HOME")
    if cache is not None:
        os.environ["XDG_CACHE_HOME"] = cache


def trials(database: str) -> int:
    with sqlite3.connect(database) as connection:
        count: int = connection.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]
    return count


def test_a_search_writes_a_schedule_that_says_how_it_was_found(workplace: Path) -> None:
    words = ("calibrate", "teacache", "--search", "--max-macs", 0.7, "--foretell", "steps", "--runs", 1, "-o", "t.json")
    said = json.loads(dicache(*words, "--trials", 1, "--json").stdout)
    found = said["search"]
    assert found["goal"] == {"max_macs": 0.7}
    assert found["trials"] == 1
    assert found["macs_fraction"] <= 0.7
    assert set(found["parameters"]) == {"macs", "fit_to", "degree"}  # what is given is kept
    assert set(found["versions"]) == {"dicache", "optuna", "torch", "diffusers"}
    assert {0, 1}.isdisjoint({*found["seeds"], *found["held_out"]["seeds"]})  # the profile's
    names = [row["schedule"] for row in found["held_out"]["results"]]
    assert names[:3] == ["searched", "not searched", "evenly spaced"]
    assert names[3].endswith("steps")
    assert Schedule.load("t.json").measured["search"] == found
    assert not Schedule.load("t.json").adaptive
    before = trials("t.search.db")
    text = dicache(*words, "--trials", 2).stdout  # goes on
    assert trials("t.search.db") > before
    assert "Searched for at most 0.700 of the MACs: 2 trials" in text
    assert "evenly spaced" in text
    refused = dicache(*words, "--trials", 2, "--fit-to", "body", fails=True)
    assert "t.search.db holds a search with other settings" in refused.stderr
    assert refused.exit_code == 1


def test_a_search_needs_no_profile_where_the_method_needs_none(workplace: Path) -> None:
    words = ("--model", "digits", "--steps", 6, "--storage", "sqlite:///mine.db", "-o", "f.json")
    text = dicache("calibrate", "fora", "--search", "--min-psnr", 10, *SMALL, *words).stdout
    assert "Searched for 10 dB or more: 2 trials" in text
    assert not Path("f.search.db").exists()
    assert trials("mine.db") == 2
    schedule = Schedule.load("f.json")
    assert schedule.measured["search"]["psnr"] >= 10
    assert schedule.settings["interval"] >= 2


@pytest.mark.parametrize(
    ("method", "words", "varied"),
    [
        ("adacache", ("--preset", "fast"), {"macs", "branch"}),
        ("delta-cache", (), {"interval", "blocks", "start"}),
        ("delta-dit", ("--order", "aligned"), {"interval", "blocks", "boundary"}),
        ("eoc", ("--base", "base.json", "--form", "add"), {"weight", "threshold", "first_steps"}),
        ("faster-diffusion", ("--interval", 2), {"blocks"}),
        ("first-block", (), {"macs", "first", "last", "warm_up"}),
        ("first-block", ("--model", "digits", "--steps", 6), {"threshold", "last", "warm_up"}),
        ("magcache", ("--max-skip", 3), {"threshold", "retention"}),
        ("pab", ("--window", "0-1000"), {"attn", "mlp"}),
        ("smoothcache", (), {"alpha"}),
        ("taylorseer", ("--model", "digits", "--steps", 6, "--order", 1), {"interval", "warm_up", "granularity"}),
    ],
)
def test_every_method_can_be_searched(
    workplace: Path, method: str, words: tuple[object, ...], varied: set[str]
) -> None:
    output = f"{method}-{'model' if '--model' in words else 'profile'}.json"
    goal = {"min_psnr": 10.0} if method == "first-block" else {"max_macs": 1.0 if method == "eoc" else 0.9}
    target = () if method == "eoc" else (f"--{next(iter(goal)).replace('_', '-')}", *goal.values())
    said = dicache("calibrate", method, "--search", *words, *target, "--runs", 1, "--trials", 1, "-o", output, "--json")
    found = json.loads(said.stdout)["search"]
    assert set(found["axes"]) == set(found["parameters"]) == varied
    assert found["goal"] == goal
    assert found["trials"] == len(found["front"]) == 1
    assert found["front"][0]["psnr"] == found["psnr"]
    assert Schedule.load(output).method == method


def test_a_search_says_what_nothing_beats_and_may_be_kept_in_a_journal(workplace: Path) -> None:
    words = ("--model", "digits", "--steps", 6, "--max-macs", 0.9, "--runs", 4, "--trials", 8, "-o", "front.json")
    text = dicache("calibrate", "fora", "--search", "--branches", "attn,mlp", *words, "--storage", "mine.log").stdout
    assert "each schedule that differs was tried; all trials computed as much as" in text
    table = text.partition("What nothing beats in both, on these runs:\n")[2].partition("\nOn 4 runs")[0]
    front = Schedule.load("front.json").measured["search"]["front"]
    shares = [row["macs_fraction"] for row in front]
    assert shares == sorted(shares)
    assert [row["psnr"] for row in front] == sorted(row["psnr"] for row in front)
    assert len(table.splitlines()) == 2 + len(front)
    assert table.count("(best)") == 1
    assert Path("mine.log").exists()


def test_the_fewest_macs_for_good_images_are_searched(workplace: Path) -> None:
    said = json.loads(
        dicache("calibrate", "teacache", "--search", "--min-psnr", 10, *SMALL, "-o", "q.json", "--json").stdout
    )
    assert said["search"]["goal"] == {"min_psnr": 10.0}
    assert said["search"]["psnr"] >= 10
    assert said["search"]["macs_fraction"] < 1


def test_a_share_of_the_macs_is_the_inverse_of_a_speed_up(workplace: Path) -> None:
    for method in ("fora", "teacache"):
        dicache("calibrate", method, "--target-speedup", 1.6, "-o", "a.json")
        dicache("calibrate", method, "--max-macs", 1 / 1.6, "-o", "b.json")
        assert Schedule.load("a.json").table() == Schedule.load("b.json").table()


def test_what_a_fit_is_worth_is_told_and_written(workplace: Path) -> None:
    said = dicache("calibrate", "teacache", "--threshold", 0.2, "--negative", "reference", "--fit-to", "body")
    assert "fitted to the body: 14 pairs, x from" in said.stdout
    assert "median of each step  R2" in said.stdout
    assert "RMSE" in said.stdout
    schedule = Schedule.load("teacache.json")
    assert isinstance(schedule.policy, TeaCachePolicy)
    assert schedule.policy.negative == schedule.settings["negative"] == "reference"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fora", "--search"), "give one of --target-speedup, --max-macs and --min-psnr"),
        (("fora", "--search", "--max-macs", 0.5, "--min-psnr", 30), "give one of"),
        (("fora", "--interval", 2, "--trials", 5), "--trials goes with --search"),
        (("teacache", "--min-psnr", 30), "--min-psnr goes with --search"),
        (("teacache", "--search", "--threshold", 0.1), "leave --threshold out"),
        (("first-block", "--search", "--threshold", 0.1), "leave --threshold out"),
        (("smoothcache", "--search", "--alpha", 0.1), "either --alpha or --search"),
        (("smoothcache",), "either --alpha or --search"),
        (("pab",), "give --ranges, or --search"),
        (("taylorseer", "--max-macs", 0.5), "--max-macs goes with --search"),
        (("teacache", "--target-speedup", 2, "--max-macs", 0.5), "either --target-speedup or --max-macs"),
    ],
)
def test_options_that_do_not_go_together(words: tuple[object, ...], message: str) -> None:
    result = dicache("calibrate", *words, fails=True)
    assert result.exit_code == 2
    assert message in result.stderr


def test_optuna_is_imported_for_a_search_alone() -> None:
    run = "from dicache.cli import main; main(['calibrate', 'teacache', '--help'], standalone_mode=False)"
    code = f"import sys, dicache; {run}; print({{'optuna', 'torch'}} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "set()"
