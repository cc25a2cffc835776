"""`dicache cost` as a user types it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from dicache.calibrate.fora import Fora
from dicache.calibrate.mask import Mask
from dicache.calibrate.pab import Pab
from dicache.calibrate.published import Row
from dicache.cli.cost import in_words, settings_of
from tests.cli.test_commands import dicache, refused


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cost")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def counted(*words: object) -> dict[str, float]:
    content: dict[str, float] = json.loads(dicache("cost", *words, "--json").stdout)
    return content


def test_the_macs_of_a_published_model_need_no_weights() -> None:
    found = counted("--model", "pixart")
    assert found["macs_paper"] == pytest.approx(85.651e12, rel=1e-3)
    assert found["macs"] > found["macs_paper"]
    assert found["fraction"] == 1
    assert (found["steps"], found["passes"], found["text_tokens"]) == (20, 2, 120)
    text = dicache("cost", "--model", "dit", "--steps", 20, "--guidance", 1).stdout
    assert "dit: 20 steps, 1 pass a step, 256 x 256" in text
    assert "all: all matrix products, convolutions and attention" in text
    assert "papers': linear and convolution layers only" in text


def test_size_text_and_guidance_are_options() -> None:
    usual = counted("--model", "pixart")
    assert counted("--model", "pixart", "--guidance", 0)["macs"] == usual["macs"] / 2
    assert counted("--model", "pixart", "--text-tokens", 300)["macs_paper"] > usual["macs_paper"]
    half = counted("--model", "pixart", "--height", 512)["macs_paper"]
    assert half == pytest.approx(usual["macs_paper"] / 2, rel=0.01)


def test_a_schedule_and_the_method_that_made_it_cost_the_same() -> None:
    words = ("--interval", 3, "--blocks", 5, "--boundary", 2)
    dicache("calibrate", "delta-dit", "--model", "digits", "--steps", 9, *words, "-o", "d.json")
    by_file = counted("--model", "digits", "--schedule", "d.json")
    by_name = counted("--model", "digits", "--steps", 9, "--method", "delta-dit", *words)
    assert by_file["macs"] == by_name["macs"]
    assert by_file["fraction_paper"] == pytest.approx(1 - 6 * 5 / (9 * 12))
    shown = json.loads(dicache("schedules", "show", "d.json", "--json").stdout)
    assert by_file["fraction"] == pytest.approx(shown["macs_fraction"], abs=1e-6)


def test_a_methods_options_are_read_as_its_settings() -> None:
    words = ("--interval", "3", "--anchor=start", "--branches", "attn,mlp", "--from", "2", "--to=5")
    assert Fora(**settings_of(Fora, words)) == Fora(3, "start", ("attn", "mlp"), 2, 5)
    lists = ("--steps-computed", "0-", "--steps-computed", "mlp=0,3")
    assert settings_of(Mask, lists) == {"steps_computed": {"*": "0-", "mlp": "0,3"}}
    ranges = settings_of(Pab, ("--ranges", "attn=2,cross_attn=6", "--window", "100,850"))
    assert ranges == {"ranges": {"attn": 2, "cross_attn": 6}, "window": (100.0, 850.0)}
    with pytest.raises(click.UsageError, match="the method needs --interval"):
        settings_of(Fora, ("--anchor", "end"))
    with pytest.raises(click.UsageError, match=r"no option --colour; it has --interval, --anchor"):
        settings_of(Fora, ("--colour", "red"))
    with pytest.raises(click.UsageError, match="--interval has no value"):
        settings_of(Fora, ("--interval",))
    with pytest.raises(click.UsageError, match="--interval takes a number, found 'two'"):
        settings_of(Fora, ("--interval", "two"))


def test_the_table_of_published_numbers_tells_what_deviates_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("A", "near", 2.0, 2.001), Row("B", "far", 50.0, 51.0, "%", "because")]
    monkeypatch.setattr("dicache.calibrate.published.published_rows", lambda: rows)
    text = dicache("cost", "--published").stdout
    assert "+0.050%" in text
    assert "+2.000%" in text
    assert "B: far: because" in text
    assert "1 of 2 rows are within 0.1%" in text
    said = json.loads(dicache("cost", "--published", "--json").stdout)["rows"]
    assert [row["reproduced"] for row in said] == [True, False]


def test_numbers_are_written_in_fitting_units() -> None:
    assert [in_words(macs) for macs in (85.651e12, 0.5e12, 3e9, 2e6)] == ["85.651 T", "0.500 T", "3.000 G", "2.000 M"]


def test_bad_input_is_one_line_with_what_to_do() -> None:
    assert "did you mean digits?" in refused("cost", "--model", "digit")
    assert "not in the package; needed one of dit" in refused("cost", "--model", "ltx")
    assert "multiples of 8, found 100" in refused("cost", "--model", "dit", "--height", 100)
    assert "below the 20 steps, found 30" in refused(
        "cost", "--model", "digits", "--steps", 20, "--method", "fora", "--interval", 30
    )
    dicache("calibrate", "mask", "--model", "digits", "--steps", 4, "--steps-computed", "0-:2")
    assert "of 12 blocks, found a PixArtTransformer2DModel" in refused(
        "cost", "--model", "scenes", "--schedule", "mask.json"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --model or --published"),
        (("--published", "--model", "dit"), "--published has models and methods of its own"),
        (("--model", "dit", "--interval", 2), "no option --interval; a method's options stand behind --method"),
        (("--model", "dit", "--method", "fora", "--schedule", "x.json"), "either --schedule or --method"),
        (("--model", "digits", "--method", "foras"), "'foras' is no method that plans without a measurement"),
        (("--model", "digits", "--method", "teacache"), "'teacache' is no method that plans"),
    ],
)
def test_wrong_usage_exits_with_two(words: tuple[object, ...], message: str) -> None:
    result = dicache("cost", *words, fails=True)
    assert result.exit_code == 2
    assert message in result.stderr
