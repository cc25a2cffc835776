import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from dicache.cli import main
from dicache.cli.generate import _file_names
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


def test_no_image_is_written_over_another(tmp_path: Path) -> None:
    words = ["--model", "digits", "--steps", 2, "-o", tmp_path, "--json"]
    two = generate(*words, "--class", "7", "--class", " 7", "--class", "3")
    assert two.exit_code == 0, two.output
    files = json.loads(two.stdout)["images"]
    assert len({*files}) == 3
    assert all(Path(file).exists() for file in files)
    assert files[2] == str(tmp_path / "3-0.png")
    first, second = ("a very long caption of a red square that is " + end for end in ("left of it", "right of it"))
    names = _file_names([first, second, "?!", "a cat"])
    assert len({*names.values()}) == 4
    assert names["a cat"] == "a-cat"
    assert names[first] == _file_names([first])[first]  # whatever is made with it


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
