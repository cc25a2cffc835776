"""The commands of TaylorSeer, SmoothCache, MagCache, PAB and EOC, on the bundled model."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dicache.schedules import Schedule
from tests.cli.test_commands import dicache, refused


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a profile that has priors, which is the current one while the tests run."""
    folder = tmp_path_factory.mktemp("work")
    before = Path.cwd()
    os.chdir(folder)
    dicache("calibrate", "fora", "--model", "digits", "--steps", 8, "--interval", 2, "-o", "base.json")
    dicache("profile", "--model", "digits", "--runs", 2, "--steps", 8, "--priors-for", "base.json")
    yield folder
    os.chdir(before)


def rows(file: str) -> dict[str, str]:
    sites: dict[str, str] = json.loads(dicache("schedules", "show", file, "--json").stdout)["sites"]
    return sites


def test_taylorseer(workplace: Path) -> None:
    dicache("calibrate", "taylorseer", "--interval", 3, "--order", 2, "--warm-up", 2, "--granularity", "branch")
    assert rows("taylorseer.json")["3.mlp"] == "CCRRCRRC"
    words = ("--model", "digits", "--steps", 9, "--granularity", "body", "--anchor", "diffusers", "-o", "body.json")
    dicache("calibrate", "taylorseer", *words)
    assert rows("body.json")["3.mlp"] == "CCSCSSCSS"
    assert "order must be 0 (hold) to 4, found 7" in refused("calibrate", "taylorseer", "--order", 7)


def test_faster_diffusion(workplace: Path) -> None:
    dicache("calibrate", "faster-diffusion", "--interval", 2, "--blocks", 5)
    found = rows("faster-diffusion.json")
    assert (found["4.mlp"], found["5.mlp"]) == ("CSCSCSCS", "CCCCCCCC")
    assert "blocks 0-19 are skipped, but" in refused("calibrate", "faster-diffusion", "--blocks", 20)


def test_smoothcache(workplace: Path) -> None:
    dicache("calibrate", "smoothcache", "--alpha", 9)
    assert set(rows("smoothcache.json").values()) == {"CRRRCRRC"}
    dicache("calibrate", "smoothcache", "--alpha", 0, "-o", "all.json")
    assert set(rows("all.json").values()) == {"C" * 8}


def test_magcache(workplace: Path) -> None:
    dicache("calibrate", "magcache", "--threshold", 9, "--max-skip", 1, "--retention", 0.25, "--never-skip", "5")
    assert set(rows("magcache.json").values()) == {"CCSCSCSC"}
    assert dicache("calibrate", "magcache", "--never-skip", "x", fails=True).exit_code == 2


def test_pab(workplace: Path) -> None:
    dicache("calibrate", "pab", "--ranges", "attn=2,mlp=3", "--window", "100-800")
    found = rows("pab.json")  # DDIM's timesteps are 875, 750, ..., 0
    assert (found["0.attn"], found["0.mlp"]) == ("CRCRCRCC", "CRRCRRCC")
    dicache("calibrate", "pab", "--model", "digits", "--steps", 8, "--ranges", "attn=2", "-o", "model.json")
    assert rows("model.json")["0.attn"] == found["0.attn"]
    assert "cross_attn, but" in refused("calibrate", "pab", "--ranges", "cross_attn=6")
    for words in (("--ranges", "attn"), ("--ranges", "attn=2", "--window", "800")):
        assert dicache("calibrate", "pab", *words, fails=True).exit_code == 2


def test_eoc(workplace: Path) -> None:
    words = ("--base", "base.json", "--weight", 0.005, "--first-steps", 5, "--position-weight", 0.5, "--threshold", 0.1)
    said = dicache("calibrate", "eoc", *words, "--branches", "attn,mlp", "--form", "multiply").stdout
    assert "Corrects 48 of the 72 outputs that base.json holds, with 2.36 MB of trends" in said
    assert Path("eoc.safetensors").is_file()
    assert rows("eoc.json") == rows("base.json")
    schedule = Schedule.load("eoc.json")
    assert schedule.corrections is not None
    assert set(schedule.corrections.sites.values()) == {"CC.C.CCC"}
    Path("eoc.safetensors").rename("away.safetensors")
    assert "eoc.safetensors is missing beside the schedule" in refused("schedules", "show", "eoc.json")
    Path("away.safetensors").rename("eoc.safetensors")


def test_eoc_needs_priors_and_a_base(workplace: Path) -> None:
    dicache("calibrate", "fora", "--interval", 2, "--anchor", "start", "-o", "other.json")
    assert "has no prior of 0.attn at step 0" in refused("calibrate", "eoc", "--base", "other.json")
    assert dicache("calibrate", "eoc", fails=True).exit_code == 2


def test_images_are_generated_with_each_of_them(workplace: Path) -> None:
    pictures = {}
    for name in ("base", "taylorseer", "faster-diffusion", "magcache", "pab", "eoc"):
        dicache("generate", "--model", "digits", "--class", 7, "--schedule", f"{name}.json", "--steps", 8, "-o", name)
        pictures[name] = np.asarray(Image.open(f"{name}/7-0.png")).astype(float)
    dicache("generate", "--model", "digits", "--class", 7, "--steps", 8, "-o", "plain")
    plain = np.asarray(Image.open("plain/7-0.png")).astype(float)
    assert all(0 < np.abs(picture - plain).mean() < 40 for picture in pictures.values())
    assert not np.array_equal(pictures["eoc"], pictures["base"])
