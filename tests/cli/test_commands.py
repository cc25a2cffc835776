"""Every command as a user types it, in an empty folder, on the bundled model."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from dicache.cli import main
from dicache.profiler.storage import load
from dicache.schedules import Schedule


def dicache(*words: object, fails: bool = False) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert (result.exit_code != 0) == fails, result.output
    return result


def refused(*words: object) -> str:
    """Return the one line with which a command is refused, and not by wrong usage."""
    result = dicache(*words, fails=True)
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if not re.match(r"profile digits|\w+: +\d+%", line)]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a profile and two schedules, which is the current one while the tests run."""
    folder = tmp_path_factory.mktemp("work")
    before = Path.cwd()
    os.chdir(folder)
    dicache("profile", "--model", "digits", "--runs", 4, "--steps", 10)
    dicache("calibrate", "fora", "--interval", 2)
    dicache("calibrate", "teacache", "--target-speedup", 1.4)
    yield folder
    os.chdir(before)


def test_a_profile_is_where_the_next_command_looks_for_it(workplace: Path) -> None:
    assert [path.name for path in Path("profiles").iterdir()] == ["digits-ddim-10.h5"]
    shown = json.loads(dicache("profiles", "show", "--json").stdout)
    assert (shown["model"], shown["runs"], shown["steps"]) == ("digits", 4, 10)
    assert shown["sites"][:3] == ["0.attn", "0.mlp", "1.attn"]
    assert shown["arrays"]["/sites/diff_l1"] == [4, 1, 10, 24, 3]
    told = dicache("profiles", "show").stdout
    assert "4 runs of 10 steps, 0 failed" in told
    likeness = shown["redundancy"]
    assert list(likeness) == ["attn", "mlp", "block delta", "change", "correlation", "rank correlation"]
    profile = load("profiles/digits-ddim-10.h5")
    assert likeness["mlp"] == pytest.approx(np.nanmean(profile.similarity("mlp")), abs=1e-5)
    x, y = profile.relative_l1("input").ravel(), profile.relative_l1("output").ravel()
    assert likeness["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    assert f"{likeness['change']:.4f}  relative, of all blocks' delta" in told


def test_schedules_are_shown_as_scripts_expect_them(workplace: Path) -> None:
    shown = json.loads(dicache("schedules", "show", "fora.json", "--json").stdout)
    assert (shown["method"], shown["num_inference_steps"], shown["steps"]) == ("fora", 10, 10)
    assert shown["adaptive"] is False
    assert shown["sites"]["11.mlp"] == "CCRCRCRCRC"
    adaptive = json.loads(dicache("schedules", "show", "teacache.json", "--json").stdout)
    assert adaptive["adaptive"] is True
    assert set(adaptive["sites"]["0.attn"]) == {"C", "S"}
    assert 1 / adaptive["macs_fraction"] >= 1.4
    text = dicache("schedules", "show", "fora.json").stdout
    assert "attn 0-11" in text
    assert "CCRCRCRCRC" in text


def test_schedules_are_valid_for_their_model(workplace: Path) -> None:
    said = dicache("schedules", "validate", "fora.json", "teacache.json", "--model", "digits").stdout
    assert said.count("fits digits") == 2


def test_a_schedule_without_a_profile_says_what_it_does_not_bind(workplace: Path) -> None:
    dicache(
        "calibrate", "fora", "--model", "digits", "--steps", 6, "--interval", 3, "--anchor", "start", "-o", "f.json"
    )
    assert json.loads(dicache("schedules", "show", "f.json", "--json").stdout)["sites"]["0.attn"] == "CRRCRR"
    assert "does not bind weights, dtype, latents, scheduler" in dicache("schedules", "show", "f.json").stdout


def test_fora_finds_the_interval_for_a_target(workplace: Path) -> None:
    said = json.loads(dicache("calibrate", "fora", "--target-speedup", 2.2, "-o", "t.json", "--json").stdout)
    assert 1 / said["macs_fraction"] >= 2.2
    assert json.loads(Path("t.json").read_text())["settings"]["interval"] == 3


def test_images_are_generated_with_and_without_a_schedule(workplace: Path) -> None:
    dicache("generate", "--model", "digits", "--class", "seven", "--steps", 10, "--num-images", 2, "-o", "plain")
    said = dicache("generate", "--model", "digits", "--class", 7, "--schedule", "fora.json", "-o", "cached", "--json")
    assert json.loads(said.stdout)["macs_fraction"] < 0.7
    plain, cached = (np.asarray(Image.open(file)).astype(float) for file in ("plain/seven-0.png", "cached/7-0.png"))
    assert plain.shape == (32, 32, 3)
    assert 0 < np.abs(plain - cached).mean() < 10
    assert sorted(path.name for path in Path("plain").iterdir()) == ["seven-0.png", "seven-1.png"]


def test_an_evaluation_has_a_result_a_schedule_and_the_baseline(workplace: Path) -> None:
    words = ["evaluate", "--model", "digits", "--schedule", "fora.json", "--schedule", "teacache.json", "--runs", "2"]
    said = json.loads(dicache(*words, "--timing-rounds", "1", "--json").stdout)
    fora, teacache = said["results"]
    assert fora["schedule"] == "fora"
    assert fora["runs"] == 2
    assert fora["computed_steps"] == 6
    assert len(said["prompts"]) == len(fora["psnr_each"]) == 2
    assert set(fora["psnr"]) == {"mean", "low", "high"}
    assert fora["speedup"] > 0
    assert 2 <= teacache["computed_steps"] < 10
    assert [row["schedule"] for row in said["fewer_steps"]]
    table = dicache(*words, "--timing-rounds", "0", "--metrics", "psnr,ssim").stdout
    assert "uncached" in table
    assert "accuracy" not in table
    (foreseen,) = re.findall(r"(\S+): (\S+) steps foreseen .* (\S+) computed here, (\d+) to (\d+) an image", table)
    assert foreseen[0] == "teacache"
    assert float(foreseen[1]) == Schedule.load("teacache.json").measured["computed_steps"]
    assert int(foreseen[3]) <= float(foreseen[2]) == pytest.approx(teacache["computed_steps"], abs=0.05)
    assert float(foreseen[2]) <= int(foreseen[4])


@pytest.mark.parametrize(
    "words",
    [
        ("delta", "profiles/digits-ddim-10.h5"),
        ("similarity", "profiles/digits-ddim-10.h5"),
        ("similarity", "profiles/digits-ddim-10.h5", "--lag", "2"),
        ("teacache", "profiles/digits-ddim-10.h5", "--schedule", "teacache.json"),
        ("schedule", "fora.json", "teacache.json"),
    ],
)
def test_pictures_are_drawn(workplace: Path, words: tuple[str, ...]) -> None:
    dicache("plot", *words, "-o", "picture.png")
    assert Image.open("picture.png").size[0] > 600


def test_the_models_are_listed(workplace: Path) -> None:
    known = json.loads(dicache("models", "--json").stdout)
    assert "digits" in known["bundled"]
    assert known["hub"]["pixart"]["repository"] == "PixArt-alpha/PixArt-XL-2-1024-MS"


def test_a_schedule_is_frozen_and_replayed(workplace: Path) -> None:
    told = dicache("schedules", "freeze", "teacache.json").stdout
    assert "Wrote teacache-frozen.json: teacache, 10 steps" in told
    assert "4 runs decide alike at" in told
    assert json.loads(dicache("schedules", "show", "teacache-frozen.json", "--json").stdout)["adaptive"] is False
    dicache("generate", "--model", "digits", "--class", 3, "--schedule", "teacache-frozen.json", "-o", "frozen")


def test_a_profile_of_prompts_from_a_file(workplace: Path) -> None:
    Path("classes.txt").write_text("three\n8\n")
    words = ("--prompts", "classes.txt", "--steps", 4, "-o", "two.h5", "--lags", 1)
    told = dicache("profile", "--model", "digits", *words).stdout
    assert "Next: dicache calibrate teacache --target-speedup 1.8 --profile two.h5" in told
    assert json.loads(dicache("profiles", "show", "two.h5", "--json").stdout)["runs"] == 2


def test_bad_input_is_one_line_with_what_to_do(workplace: Path) -> None:
    assert "did you mean digits?" in refused("profile", "--model", "digit", "--runs", 1)
    assert "pass --resume" in refused("profile", "--model", "digits", "--runs", 4, "--steps", 10)
    assert "does not exist; make a profile with" in refused("profiles", "show", "nowhere.h5")
    assert "does not exist; make a schedule with" in refused("schedules", "show", "nowhere.json")
    assert "1 (compute everything) or more, found 0" in refused("calibrate", "fora", "--interval", 0)
    assert "threshold must be a number" in refused("calibrate", "teacache", "--threshold", "nan")
    assert "cannot be reached" in refused("calibrate", "teacache", "--target-speedup", 99)
    assert "degree must be 1 to 8, found 30" in refused("calibrate", "teacache", "--degree", 30)
    assert "with an interval of 9 it is 4.7" in refused("calibrate", "fora", "--target-speedup", 500)
    for method in ("fora", "teacache"):
        wrong = dicache("calibrate", method, "--target-speedup", "nan", fails=True)
        assert "--target-speedup must be a finite number, found nan" in wrong.stderr
    assert "has the suffix '.xyz'" in refused("plot", "schedule", "fora.json", "-o", "picture.xyz")
    assert "decides nothing at run time" in refused("schedules", "freeze", "fora.json")
    assert "unknown class 'ten'" in refused("generate", "--model", "digits", "--class", "ten", "-o", "x")
    assert "conditioned on a class; give --class" in refused(
        "generate", "--model", "digits", "--prompt", "a", "-o", "x"
    )


def test_broken_files_are_one_line_with_what_to_do(workplace: Path) -> None:
    Path("cut.json").write_text(Path("fora.json").read_text()[:200])
    assert "cut.json is not JSON" in refused("schedules", "show", "cut.json")
    content = json.loads(Path("fora.json").read_text())
    Path("unknown.json").write_text(json.dumps({**content, "colour": "red"}))
    assert "unknown key 'colour'" in refused("schedules", "validate", "unknown.json")
    content["anatomy"]["model"] = "PixArtTransformer2DModel"
    Path("other.json").write_text(json.dumps(content))
    assert "was made for a PixArtTransformer2DModel, found DiTTransformer2DModel" in refused(
        "schedules", "validate", "other.json", "--model", "digits"
    )
    words = ("generate", "--model", "digits", "--class", 1, "--schedule", "fora.json", "--steps", 12, "-o", "x")
    assert "made for 10 steps, found 12" in refused(*words)
    Path("cut.h5").write_bytes(Path("profiles/digits-ddim-10.h5").read_bytes()[:5000])
    assert "cannot be read as a profile" in refused("calibrate", "teacache", "--profile", "cut.h5")
    with h5py.File("empty.h5", "w"):
        pass
    assert "empty.h5: not a profile" in refused("plot", "delta", "empty.h5", "-o", "x.png")


def test_wrong_usage_exits_with_two(workplace: Path) -> None:
    assert dicache("calibrate", "fora", fails=True).exit_code == 2
    assert dicache("calibrate", "teacache", "--threshold", "much", fails=True).exit_code == 2
    assert dicache("nonsense", fails=True).exit_code == 2


def test_debug_shows_the_traceback(workplace: Path) -> None:
    result = CliRunner().invoke(main, ["schedules", "show", "nowhere.json", "--debug"])
    assert type(result.exception).__name__ == "ScheduleError"
