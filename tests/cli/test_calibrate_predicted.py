"""The commands of TaylorSeer, SmoothCache, MagCache, PAB, AdaCache, T-GATE and EOC, on the bundled model."""

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
    settings: dict[str, tuple[object, ...]] = {
        "taylorseer": ("--order", 2),
        "faster-diffusion": ("--blocks", 5),
        "magcache": ("--threshold", 9, "--max-skip", 1),
        "pab": ("--ranges", "attn=2,mlp=3", "--window", "100-800"),
        "eoc": ("--base", "base.json", "--weight", 0.05),
    }
    for name, words in settings.items():
        dicache("calibrate", name, *words, "-o", f"drawn-{name}.json")
    pictures = {}
    for name, file in {"base": "base.json", **{name: f"drawn-{name}.json" for name in settings}}.items():
        dicache("generate", "--model", "digits", "--class", 7, "--schedule", file, "--steps", 8, "-o", name)
        pictures[name] = np.asarray(Image.open(f"{name}/7-0.png")).astype(float)
    dicache("generate", "--model", "digits", "--class", 7, "--steps", 8, "-o", "plain")
    plain = np.asarray(Image.open("plain/7-0.png")).astype(float)
    assert all(0 < np.abs(picture - plain).mean() < 40 for picture in pictures.values())
    assert not np.array_equal(pictures["eoc"], pictures["base"])


def test_tgate(workplace: Path) -> None:
    words = ("--gate", 5, "--sp-interval", 3, "--fi-interval", 2, "--warm-up", 1)
    scenes = ("--model", "scenes", "--steps", 8)
    told = dicache("calibrate", "tgate", *scenes, *words).stdout
    schedule = Schedule.load("tgate.json")
    assert f"{schedule.macs_fraction():.3f} of the MACs" in told
    found = rows("tgate.json")
    assert (found["3.attn"], found["3.cross_attn"], found["3.mlp"]) == ("CCRCCRCR", "CCCCCRRR", "CCCCCCCC")
    shown = dicache("schedules", "show", "tgate.json").stdout
    assert f"{schedule.macs_fraction():.3f} of the MACs with guidance, " in shown
    assert "passes           22222111\n" in shown
    said = json.loads(dicache("schedules", "show", "tgate.json", "--json").stdout)
    assert said["collapse_guidance_from"] == 5
    assert said["macs_fraction"] < said["macs_fraction_unguided"] == schedule.macs_fraction(guided=False)

    dicache("calibrate", "tgate", *scenes, *words, "--after-gate", "guided", "-o", "guided.json")
    told = dicache("schedules", "diff", "tgate.json", "guided.json").stdout
    assert "One guidance pass is computed in the place of two: A from step 5." in told

    cost = ("cost", "--model", "scenes", "--json")
    by_file = json.loads(dicache(*cost, "--schedule", "tgate.json").stdout)
    by_name = json.loads(dicache(*cost, "--steps", 8, "--method", "tgate", *words).stdout)
    assert by_file["macs"] == by_name["macs"]
    assert by_file["fraction"] == pytest.approx(schedule.macs_fraction(), abs=1e-6)
    unguided = json.loads(dicache(*cost, "--guidance", 1, "--schedule", "tgate.json").stdout)
    assert unguided["fraction"] == pytest.approx(schedule.macs_fraction(guided=False), abs=1e-6)


def test_tgate_for_a_model_without_guidance_counts_one_pass(workplace: Path) -> None:
    words = ("--model", "pixart-lcm", "--gate", 1, "--sp-interval", 1, "--warm-up", 0)
    told = json.loads(dicache("calibrate", "tgate", *words, "--json").stdout)
    assert told["macs_fraction"] == Schedule.load("tgate.json").macs_fraction(guided=False)
    assert told["macs_fraction"] > 0.9


def test_what_is_evaluated_costs_what_was_planned(workplace: Path) -> None:
    dicache("calibrate", "tgate", "--model", "scenes", "--steps", 4, "--gate", 2, "--warm-up", 0)
    words = ("--model", "scenes", "--schedule", "tgate.json", "--runs", 3, "--timing-rounds", 0, "--json")
    (result,) = json.loads(dicache("evaluate", *words).stdout)["results"]
    assert result["macs_fraction"] == pytest.approx(Schedule.load("tgate.json").macs_fraction())
    assert result["computed_steps"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "digits", "--steps", 20), "DiTTransformer2DModel has no cross-attention to hold"),
        (("--model", "pixart", "--gate", 20), "1 to 19 of 20 steps, found 20"),
        (("--model", "pixart", "--gate", 0), "the gate must be step 1 or later, found 0"),
        (("--model", "pixart", "--gate", 2), "the warm-up must be shorter than the gate, 0 to 1 steps, found 2"),
        (("--model", "pixart", "--sp-interval", 0), "sp_interval must be 1"),
    ],
)
def test_tgate_refuses_what_cannot_be(workplace: Path, words: tuple[object, ...], said: str) -> None:
    assert said in refused("calibrate", "tgate", *words)


def test_adacache(workplace: Path) -> None:
    told = dicache("calibrate", "adacache", "--codebook", "9:2").stdout
    assert "No frames in the latents, or none that can be told apart: the motion factor is 1" in told
    assert "Foreseen on 2 runs: 6 steps computed, 6 to 6" in told
    assert rows("adacache.json")["3.mlp"] == "CCSCSCCC"
    shown = dicache("schedules", "show", "adacache.json").stdout
    assert "codebook 9:2 on the change of what the attention adds in block 5" in shown
    dicache("calibrate", "adacache", "--max-macs", 0.6, "--branch", "rest", "-o", "fitted.json")
    assert Schedule.load("fitted.json").macs_fraction() <= 0.6
    dicache("schedules", "freeze", "fitted.json")
    assert not Schedule.load("fitted-frozen.json").adaptive
    assert "codebook" in dicache("schedules", "diff", "adacache.json", "fitted.json").stdout
    assert "block 3 was not measured" in refused("calibrate", "adacache", "--preset", "slow", "--decision-block", 3)
    assert "cannot be reached in 8 steps" in refused("calibrate", "adacache", "--target-speedup", 9)
    for words in (("--codebook", "9"), ("--decision-block", "x"), ("--no-motion", "--published-motion")):
        assert dicache("calibrate", "adacache", *words, fails=True).exit_code == 2
