"""How the commands behave at a terminal: widths, colours, Ctrl-C, completion, and `--json` beside all of it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from dicache.calibrate.fora import Fora
from dicache.calibrate.methods import planned_schedule
from dicache.cli import main
from dicache.cli.command import INTERVAL, table
from dicache.cli.evaluate import results_table
from dicache.evaluate.quality import Mean
from dicache.profiler import profiling
from dicache.schedules import Target
from tests.figures.synthetic import anatomy
from tests.figures.test_trajectory import RESULT


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield f"{path} {name}", command


def test_every_command_speaks_to_machines() -> None:
    every = dict(commands(main))
    assert len(every) > 30
    assert [path for path, command in every.items() if not any("--json" in p.opts for p in command.params)] == []


def test_a_table_that_is_too_wide_goes_on_below_with_its_first_column_and_no_interval_alone() -> None:
    header, row = ["", "steps", "PSNR dB", INTERVAL, "SSIM"], ["fora", "20", "41.0", "40.0 to 42.0", "0.99"]
    assert table(header, [row]).count("\n") == 2
    first, second, third = table(header, [row], width=22).split("\n\n")
    assert [page.split()[:1] for page in (first, third)] == [["steps"], ["SSIM"]]
    assert all("fora" in page for page in (first, second, third))
    assert second.splitlines()[0].split() == ["PSNR", "dB", "95", "%"]


def test_the_table_of_an_evaluation_fits_80_columns() -> None:
    judged = replace(RESULT, psnr_gain=Mean(-3.0, -4.0, -2.0), judged={"accuracy": 1.0, "frechet": 640.0})
    assert (
        max(map(len, results_table([judged] * 2, 80).splitlines())) <= 80 < len(results_table([judged]).splitlines()[0])
    )


def test_the_models_fit_80_columns() -> None:
    told = CliRunner().invoke(main, ["models"], env={"COLUMNS": "80"}).output
    assert max(map(len, told.splitlines())) <= 80
    assert "PixArt-alpha/PixArt-XL-2-1024-MS" in told


@pytest.fixture
def schedule(tmp_path: Path) -> Path:
    file = tmp_path / "fora.json"
    planned_schedule(Fora(2), anatomy(4), Target(), 6).save(file)
    return file


def test_a_drawing_is_coloured_on_a_terminal_alone_and_not_against_the_users_will(schedule: Path) -> None:
    words = ["schedules", "show", str(schedule)]
    plain, coloured, unwanted = (
        CliRunner().invoke(main, words, color=color, env=env).output
        for color, env in ((False, {}), (True, {}), (True, {"NO_COLOR": "1"}))
    )
    assert "\x1b[36mR\x1b[0m" in coloured
    assert plain == unwanted == click.unstyle(coloured)
    assert "\x1b" not in plain


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(profiling, "profile_pipeline", interrupted)
    result = CliRunner().invoke(main, ["profile", "--model", "digits", "-o", str(tmp_path / "a.h5")])
    assert result.exit_code == 1
    assert result.output == (
        "Error: interrupted; finished runs are kept; the same command with --resume goes on with them\n"
    )


@pytest.mark.parametrize(("typed", "wanted"), [("cal", "calibrate"), ("profile --model dig", "digits")])
def test_the_shell_completes_commands_and_models(typed: str, wanted: str) -> None:
    words = f"dicache {typed}"
    asked = {"_DICACHE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    told = subprocess.run(
        [sys.executable, "-m", "dicache"], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert told.stdout.splitlines() == [f"plain,{wanted}"]
