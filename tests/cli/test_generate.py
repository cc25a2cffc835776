import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from dicache.cli import main
from tests.models.folders import SIZE, folder


def generate(*words: object) -> Result:
    return CliRunner().invoke(main, ["generate", *(str(word) for word in words)])


@pytest.mark.parametrize("kind", ["pixart", "pixart-sigma", "sd3", "flux"])
def test_a_folder_makes_an_image_of_a_prompt(kind: str, tmp_path: Path) -> None:
    size = ["--height", SIZE, "--width", 2 * SIZE]
    words = ["--model", folder(kind), "--prompt", "A red fox!", "--steps", 2, *size, "--seed", 3, "-o", tmp_path]
    result = generate(*words, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images"] == [str(tmp_path / "a-red-fox-3.png")]
    assert Image.open(tmp_path / "a-red-fox-3.png").size == (2 * SIZE, SIZE)


def test_another_scheduler_makes_another_image(tmp_path: Path) -> None:
    words = ["--model", "digits", "--class", "three", "--steps", 4]
    assert generate(*words, "-o", tmp_path / "own").exit_code == 0
    assert generate(*words, "--scheduler", "dpm", "-o", tmp_path / "dpm").exit_code == 0
    own, other = ((tmp_path / name / "three-0.png").read_bytes() for name in ("own", "dpm"))
    assert own != other


def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path: Path) -> None:
    there = shutil.copytree(folder("pixart"), tmp_path / "model")
    shutil.rmtree(there / "vae")
    for words, message in (
        (["--model", there], "vae (AutoencoderKL) is missing"),
        (["--model", folder("pixart"), "--scheduler", "x"], "scheduler 'x' is unknown with PixArtAlphaPipeline"),
        (["--model", folder("pixart"), "--device", "tpu"], "unknown device 'tpu'"),
        (["--model", tmp_path / "nowhere"], "there is no folder"),
    ):
        result = generate(*words, "--prompt", "a red fox", "--steps", 2, "-o", tmp_path)
        assert result.exit_code == 1
        [line] = result.stderr.splitlines()
        assert line.startswith("Error: ")
        assert message in line
