"""`dicache calibrate mask | delta-cache | delta-dit` as a user types it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dicache import Schedule
from tests.cli.test_commands import dicache, refused

DIGITS = ("--model", "digits", "--steps", 20)


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a profile, which is the current one while the tests run."""
    folder = tmp_path_factory.mktemp("ranges")
    before, cache = Path.cwd(), os.environ.get("XDG_CACHE_HOME")
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    dicache("profile", "--model", "digits", "--runs", 2, "--steps", 8)
    yield folder
    os.chdir(before)
    os.environ.pop("XDG_CACHE_HOME")
    if cache is not None:
        os.environ["XDG_CACHE_HOME"] = cache


def sites(file: str) -> dict[str, str]:
    content: dict[str, str] = json.loads(dicache("schedules", "show", file, "--json").stdout)["sites"]
    return content


def test_the_masks_of_a_paper_can_be_written_down() -> None:
    dicache("calibrate", "mask", *DIGITS, "--steps-computed", "0-10:2,11-", "-o", "quarter.json")
    assert set(sites("quarter.json").values()) == {"CRCRCRCRCRCCCCCCCCCC"}
    dicache("calibrate", "mask", "--steps-computed", "mlp=0-:2", "--steps-computed", "attn=0,4-", "-o", "half.json")
    assert sites("half.json")["3.attn"] == "CRRRCCCC"
    assert sites("half.json")["3.mlp"] == "CRCRCRCR"
    dicache("calibrate", "mask", "--steps-computed", "0-:2", "--branches", "mlp", "-o", "mlp.json")
    assert sites("mlp.json")["3.attn"] == "CCCCCCCC"


def test_a_range_of_blocks_is_skipped() -> None:
    dicache("calibrate", "delta-cache", *DIGITS, "--blocks", "middle", "-o", "m.json")
    found = sites("m.json")
    assert [key for key in found if "S" in found[key]][0::2] == [f"{i}.attn" for i in range(1, 10)]
    dicache("calibrate", "delta-cache", "--interval", 4, "--blocks", 2, "--start", 3)
    assert sites("delta-cache.json")["4.mlp"] == "CSSSCSSS"
    assert set(sites("delta-cache.json")["2.mlp"]) == {"C"}


def test_the_order_is_read_from_a_profile_unless_it_is_given() -> None:
    said = json.loads(dicache("calibrate", "delta-dit", "--json").stdout)
    assert set(said["order"]) == {"aligned", "reversed"}
    better = min(said["order"], key=said["order"].__getitem__)
    schedule = Schedule.load("delta-dit.json")
    assert schedule.settings["order"] == better
    assert schedule.target.weights is not None
    assert f"order {better}" in dicache("calibrate", "delta-dit").stdout
    given = json.loads(dicache("calibrate", "delta-dit", "--order", "reversed", "--json").stdout)
    assert "order" not in given
    assert Schedule.load("delta-dit.json").settings["order"] == "reversed"
    dicache("calibrate", "delta-dit", *DIGITS)
    assert Schedule.load("delta-dit.json").settings["order"] == "aligned"


def test_a_budget_gives_interval_and_blocks() -> None:
    for words in (("--target-speedup", 1.6), ("--max-macs", 0.625)):
        said = dicache("calibrate", "delta-dit", *DIGITS, *words).stdout
        assert "Interval 2; blocks 3-11 are skipped early, 0-8 late" in said
    settings = Schedule.load("delta-dit.json").settings
    assert (settings["interval"], settings["blocks"]) == (2, 9)


def test_a_budget_as_papers_count_needs_no_weights() -> None:
    words = ("--model", "pixart", "--max-macs", "53.53T", "--boundary", 12)
    said = dicache("calibrate", "delta-dit", *words, "-o", "p.json").stdout
    assert "Interval 2; blocks 7-27 are skipped early, 0-20 late" in said
    schedule = Schedule.load("p.json")
    assert (schedule.settings["interval"], schedule.settings["blocks"]) == (2, 21)
    assert schedule.target.num_inference_steps == schedule.steps == 20
    assert "take 85.629 T" in refused("calibrate", "delta-dit", "--model", "pixart", "--max-macs", "90T")


def test_boundary_blocks_and_order_are_searched() -> None:
    words = ("--search", "--max-macs", 0.75, "--interval", 2, "--runs", 1, "--trials", 2, "-o", "s.json", "--json")
    found = json.loads(dicache("calibrate", "delta-dit", *words).stdout)["search"]
    assert set(found["parameters"]) == {"blocks", "boundary", "order"}
    assert found["macs_fraction"] <= 0.75
    assert Schedule.load("s.json").settings["interval"] == 2


def test_bad_input_is_one_line_with_what_to_do() -> None:
    assert "blocks 8-12 are skipped, but DiTTransformer2DModel has the blocks 0-11" in refused(
        "calibrate", "delta-cache", "--blocks", "8-12"
    )
    assert "0 to 8 elapsed steps, found 9" in refused("calibrate", "delta-dit", "--boundary", 9)
    assert "1 (compute everything) or more, found 0" in refused("calibrate", "delta-dit", "--interval", 0)
    assert "1 to 12 blocks of DiTTransformer2DModel can be skipped, found 13" in refused(
        "calibrate", "delta-dit", "--blocks", 13
    )
    assert "no step 8 of 8" in refused("calibrate", "mask", "--steps-computed", "0,8")
    assert "step 0 must be computed" in refused("calibrate", "mask", "--steps-computed", "1-")
    assert "cannot be reached" in refused("calibrate", "delta-dit", "--max-macs", 0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mask",), "--steps-computed"),
        (("mask", "--steps-computed", "0", "--steps-computed", "0,1"), "given more than once for all"),
        (("delta-dit", "--max-macs", 7), "neither a share such as 0.55 nor a number of MACs such as 53.53T"),
        (("delta-dit", "--max-macs", "0.5", "--target-speedup", 2), "give either --target-speedup or --max-macs"),
        (("delta-dit", "--max-macs", "0.5", "--blocks", 2), "give either --blocks or one of"),
        (("delta-dit", *DIGITS, "--order", "auto"), "give --profile instead of --model"),
        (("delta-dit", "--trials", 5), "--trials goes with --search"),
    ],
)
def test_options_that_do_not_go_together(words: tuple[object, ...], message: str) -> None:
    result = dicache("calibrate", *words, fails=True)
    assert result.exit_code == 2
    assert message in result.stderr
