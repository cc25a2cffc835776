"""`dicache calibrate l2c` on the bundled model: trained, read, replayed and corrected."""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dicache.schedules import Schedule
from tests.cli.test_commands import dicache, refused

STEPS = 6
SITES = 24  # 12 blocks of digits
TRAIN = ("--model", "digits", "--steps", STEPS, "--iterations", 3, "--batch", 2, "--penalty", 100, "--learning-rate", 1)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a published router and one that was trained, which is the current one while the tests run."""
    folder = tmp_path_factory.mktemp("work")
    before = Path.cwd()
    os.chdir(folder)
    # Of the indices 4, 2 and 0, steps 1, 3 and 5: all, every second and no output is held.
    held = {4: torch.full((SITES,), -4.0), 2: torch.tensor([-4.0, 4.0] * 12), 0: torch.full((SITES,), 4.0)}
    routers = {f"{index}.prob": held.get(index, torch.randn(SITES)) for index in range(STEPS)}
    torch.save({"routers": routers, "opt": {}, "args": argparse.Namespace(l1=5e-6)}, "published.pt")
    dicache("calibrate", "l2c", *TRAIN)
    yield folder
    os.chdir(before)


def rows(file: str) -> dict[str, str]:
    sites: dict[str, str] = json.loads(dicache("schedules", "show", file, "--json").stdout)["sites"]
    return sites


def test_a_published_router_is_read(workplace: Path) -> None:
    words = ("--router", "published.pt", "--model", "digits", "-o", "read.json")  # the steps are the router's
    said = dicache("calibrate", "l2c", *words).stdout
    assert "Holds 36 of 144 outputs, 25.0%" in said
    assert rows("read.json") == {
        f"{n}.{kind}": f"CRC{'CR'[kind == 'attn']}CC" for n in range(12) for kind in ("attn", "mlp")
    }
    schedule = Schedule.load("read.json")
    assert schedule.target.unbound() == ()
    assert (schedule.target.scheduler, schedule.target.num_inference_steps) == ("DDIMScheduler", STEPS)
    assert schedule.measured["penalty"] == 5e-6


def test_a_trained_router_says_how_and_is_read_again_with_another_threshold(workplace: Path) -> None:
    schedule = Schedule.load("l2c.json")
    told = schedule.measured
    assert (told["penalty"], told["iterations"], told["batch"], told["seed"]) == (100, 3, 2, 0)
    assert told["first_tenth"]["sum_of_betas"] == pytest.approx(SITES / 2)
    assert told["last_tenth"]["sum_of_betas"] < SITES / 4
    # Three updates of 1 against so large a penalty: a beta of 0.047.
    assert set(rows("l2c.json").values()) == {"CRCRCR"}
    found = dicache(
        "calibrate", "l2c", "--router", "l2c.router.pt", "--model", "digits", "--threshold", 0.01, "-o", "all.json"
    )
    assert "Holds 0 of 144 outputs" in found.stdout
    again = json.loads(dicache("calibrate", "l2c", *TRAIN, "--threshold", 0.01, "--json").stdout)
    assert (again["held"], again["macs_fraction"]) == (0, 1.0)
    dicache("calibrate", "l2c", *TRAIN)


def test_a_profile_says_for_what_to_train(workplace: Path) -> None:
    dicache("profile", "--model", "digits", "--runs", 1, "--steps", 4, "--scheduler", "dpm", "-o", "dpm.h5")
    words = ("--iterations", 1, "--batch", 1, "--threshold", 0.6, "--save-router", "mine.pt", "-o", "dpm.json")
    dicache("calibrate", "l2c", "--train", "--profile", "dpm.h5", *words)
    schedule = Schedule.load("dpm.json")
    assert schedule.target.scheduler == "DPMSolverMultistepScheduler"
    assert set(rows("dpm.json").values()) == {"CRCR"}
    assert Path("mine.pt").is_file()
    assert "for 4 steps, the schedule for 6" in refused(
        "calibrate", "l2c", "--router", "mine.pt", "--model", "digits", "--steps", 6
    )
    assert "trained for scheduler DPMSolverMultistepScheduler, found DDIMScheduler" in refused(
        "calibrate", "l2c", "--router", "mine.pt", "--model", "digits"
    )


def test_images_are_generated_and_eoc_corrects_them(workplace: Path) -> None:
    dicache(
        "profile", "--model", "digits", "--runs", 2, "--steps", STEPS, "--priors-for", "read.json", "-o", "priors.h5"
    )
    dicache("calibrate", "l2c", "--router", "published.pt", "--profile", "priors.h5", "-o", "read.json")
    said = dicache("calibrate", "eoc", "--base", "read.json", "--profile", "priors.h5", "--weight", 0.005).stdout
    assert "Corrects 36 of the 36 outputs that read.json holds" in said
    assert rows("eoc.json") == rows("read.json")
    corrections = Schedule.load("eoc.json").corrections
    assert corrections is not None
    assert corrections.sites == {
        f"{n}.{kind}": f"C.C{'C.'[kind == 'attn']}CC" for n in range(12) for kind in ("attn", "mlp")
    }
    pictures: list[np.ndarray] = []
    for words in ((), ("--schedule", "read.json"), ("--schedule", "eoc.json")):
        dicache("generate", "--model", "digits", "--class", 7, "--steps", STEPS, *words, "-o", f"p{len(pictures)}")
        pictures.append(np.asarray(Image.open(f"p{len(pictures)}/7-0.png")).astype(float))
    plain, read, corrected = pictures
    assert all(0 < np.abs(picture - plain).mean() < 20 for picture in (read, corrected))
    assert not np.array_equal(read, corrected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threshold", 1.2), "the threshold must be from 0 (all is computed) to 1, found 1.2"),
        (("--steps", 5), "an even number of them, 2 or more, found 5; sample in 6 steps"),
        (("--steps", 1), "found 1; sample in 2 steps"),
        (("--steps", 4, "--penalty", -1), "the penalty must be 0 or more"),
        (("--router", "nowhere.pt"), "nowhere.pt does not exist"),
        (("--router", "published.pt", "--steps", 8), "the router is for 6 steps, the schedule for 8"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(workplace: Path, words: tuple[object, ...], message: str) -> None:
    assert message in refused("calibrate", "l2c", "--model", "digits", "-o", "refused.json", *words)
    assert not Path("refused.json").exists()
    assert not Path("refused.router.pt").exists()


def test_wrong_usage(workplace: Path) -> None:
    for words in (
        ("--router", "published.pt", "--train"),
        ("--router", "published.pt", "--penalty", 1),
        ("--profile", "dpm.h5", "--scheduler", "dpm"),
        ("--profile", "dpm.h5", "--model", "digits"),
    ):
        assert dicache("calibrate", "l2c", *words, fails=True).exit_code == 2
