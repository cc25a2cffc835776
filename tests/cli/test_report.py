"""`dicache report` as a user types it, on the bundled model."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dicache.cli import main


def dicache(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile, a plan, and a schedule that decides at run time."""
    folder = tmp_path_factory.mktemp("report")
    profile = folder / "digits.h5"
    for command in (
        ("profile", "--model", "digits", "--runs", 3, "--steps", 6, "-o", profile),
        ("calibrate", "fora", "--interval", 2, "--profile", profile, "-o", folder / "fora.json"),
        ("calibrate", "first-block", "--target-speedup", 1.3, "--profile", profile, "-o", folder / "first.json"),
    ):
        assert dicache(*command).exit_code == 0
    return folder


def test_it_runs_the_model_and_says_what_was_achieved(folder: Path) -> None:
    evaluated = folder / "evaluated.json"
    row = {"schedule": "fora", "macs_fraction": 0.6, "psnr": {"mean": 30.0, "low": 29.0, "high": 31.0}}
    evaluated.write_text(json.dumps({"model": "digits", "results": [row], "fewer_steps": []}))
    output = folder / "all.html"
    schedules = [folder / "fora.json", folder / "first.json"]
    made = dicache(
        "report", folder / "digits.h5", *schedules, "--evaluated", evaluated, "--images", 2, "-o", output, "--json"
    )
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)
    assert told == {"report": str(output), "bytes": output.stat().st_size, "schedules": ["fora", "first"]}
    page = output.read_text()
    sections = ["provenance", "similarity", "blocks", "teacache", "schedules", "pareto", "achieved", "images"]
    assert re.findall(r'<section id="(\w+)"', page) == sections
    assert page.count("data:image/webp;base64,") == 2 * 3
    planned = re.search(r"<th scope=\"row\">fora</th><td>([\d.]+)</td><td>([\d.]+)</td><td>4</td><td>4</td>", page)
    assert planned is not None
    assert float(planned[1]) == pytest.approx(float(planned[2]), abs=0.002)


def test_a_profile_alone_needs_no_model(folder: Path) -> None:
    made = dicache("report", folder / "digits.h5", "-o", folder / "profile.html")
    assert made.exit_code == 0, made.output
    assert re.fullmatch(rf"Wrote {re.escape(str(folder / 'profile.html'))}, [\d.]+ kB\n", made.output)


def test_a_model_that_is_not_to_be_had_is_told_with_what_to_do(folder: Path) -> None:
    words = ("report", folder / "digits.h5", folder / "fora.json", "-o", folder / "none.html")
    made = dicache(*words, "--model", folder / "gone")
    assert made.exit_code == 1
    assert "the images are made by running the model of the profile, and it cannot be loaded: " in made.output
    assert "Say where it is with --model, or leave the images out with --images 0" in made.output
    assert not (folder / "none.html").exists()
    assert dicache(*words, "--model", folder / "gone", "--images", 0).exit_code == 0
    assert 'id="images"' not in (folder / "none.html").read_text()
