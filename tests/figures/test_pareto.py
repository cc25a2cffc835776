import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.collections import LineCollection
from matplotlib.colors import same_color
from matplotlib.lines import Line2D

from dicache.cli import main
from dicache.figures import FigureError
from dicache.figures.pareto import Measured, Point, Series, best_of, pareto, read_series, series_of
from tests.figures.test_trajectory import RESULT

OURS = Series("MagCache", (Point(0.7, 40, 39, 41, 1.4), Point(0.5, 35, 34, 36, 1.9)))
PEER = Series("diffusers MagCache", (Point(0.6, 36, 35, 37, 1.6),), "peer")
STEPS = Series("fewer steps", (Point(0.5, 38, 37, 39, 2.0),), "steps")


def row(name: str, macs: float, psnr: Any, **more: Any) -> dict[str, Any]:
    return {"schedule": name, "macs_fraction": macs, "psnr": psnr, "speedup": None, "runs": 4, **more}


def places(line: Line2D) -> Any:
    return np.asarray(line.get_xydata()).tolist()


def written(file: Path, content: Any) -> Path:
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_the_front_leaves_out_what_another_point_betters() -> None:
    points = [(0.5, 30.0), (0.6, 29.0), (0.7, 40.0), (0.7, 39.0), (0.3, 20.0)]
    assert best_of(points) == [(0.3, 20), (0.5, 30), (0.7, 40)]
    assert best_of(points, cheaper=1) == [(0.7, 40)]  # as speed-ups, the last one is both the fastest and the best


def test_a_series_is_a_line_by_cost_with_its_intervals() -> None:
    macs, time = pareto(Measured("digits", 4, (OURS, PEER, STEPS))).axes
    front, ours, peer, steps = macs.lines
    assert places(ours) == [[0.5, 35], [0.7, 40]]
    assert places(front) == [[0.5, 38], [0.7, 40]]
    (drawn, *_) = macs.collections
    assert isinstance(drawn, LineCollection)
    bars = [np.asarray(segment).tolist() for segment in drawn.get_segments()]
    assert bars == [[[0.5, 34], [0.5, 36]], [[0.7, 39], [0.7, 41]]]
    assert places(time.lines[1]) == [[1.4, 40], [1.9, 35]]
    assert (macs.get_xlabel(), time.get_xlabel()) == (
        "share of the uncached multiply-accumulates",
        "measured speed-up over the uncached run",
    )
    assert peer.get_color() == ours.get_color()  # the same method
    assert (peer.get_linestyle(), ours.get_linestyle(), steps.get_linestyle()) == ("--", "-", ":")
    assert peer.get_marker() == ours.get_marker()
    assert same_color(peer.get_markerfacecolor(), "white")


def test_the_legend_says_whose_a_method_is() -> None:
    legend = pareto(Measured("digits", 4, (STEPS, PEER, OURS))).axes[-1].get_legend()
    assert legend is not None
    named = ["dicache", "MagCache", "other projects", "diffusers MagCache", "no cache", "fewer steps"]
    assert [text.get_text() for text in legend.get_texts()] == named


def test_without_times_there_is_one_panel() -> None:
    untimed = Series("FORA", (Point(0.5, 30),))
    assert len(pareto(Measured(None, None, (untimed,))).axes) == 1
    with pytest.raises(FigureError, match="there is no point to draw"):
        pareto(Measured(None, None, ()))


def test_results_of_an_evaluation_are_a_series_a_method() -> None:
    fewer = replace(RESULT, name="2 steps", macs_fraction=0.6, speedup=1.5)
    found = series_of("digits", {"TeaCache": [RESULT, replace(RESULT, macs_fraction=0.5)]}, [fewer])
    assert (found.model, found.runs) == ("digits", 2)
    assert found.series == (
        Series("TeaCache", (Point(0.7, 30.25, 29, 31), Point(0.5, 30.25, 29, 31))),
        Series("fewer steps", (Point(0.6, 30.25, 29, 31, 1.5),), "steps"),
    )


def test_rows_of_a_name_are_one_series_across_files(tmp_path: Path) -> None:
    mean = {"mean": 30.0, "low": 29.0, "high": 31.0}
    one = {"model": "digits", "results": [row("fora", 0.5, mean)], "fewer_steps": [row("10 steps", 0.5, mean)]}
    two = {"model": "digits", "results": [row("fora", 0.4, mean), row("their FORA", 0.4, mean, source="peer")]}
    front = [{"parameters": {"interval": 2}, "psnr": 33.5, "macs_fraction": 0.6}]
    searched = {"method": "fora", "measured": {"model": "digits", "search": {"front": front}}}
    contents = {"one.json": one, "two.json": two, "fora.json": searched}
    measured = read_series([written(tmp_path / name, content) for name, content in contents.items()])
    assert (measured.model, measured.runs) == ("digits", 4)
    assert {each.name: (len(each.points), each.source) for each in measured.series} == {
        "fora": (2, "dicache"),
        "fewer steps": (1, "steps"),
        "their FORA": (1, "peer"),
        "fora, searched": (1, "dicache"),
    }
    assert measured.series[0].points[0] == Point(0.5, 30, 29, 31, None)
    assert measured.series[-1].points == (Point(0.6, 33.5),)


def run(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["plot", "pareto", *map(str, words)])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "holds neither results nor what a search measured"),
        ({"measured": {}}, "holds no front of a search; make it with `dicache calibrate --search`"),
        ({"measured": {"search": {"front": [3]}}}, "has no list of rows where it should"),
        ({"results": [{}]}, "has a row of schedule None"),
        ({"results": [row("fora", 0.5, {"mean": None})]}, "has None in a row of fora; needed numbers"),
        (
            {"results": [row("fora", 0.5, 3, source="mine")]},
            "source 'mine'; needed a name, and one of dicache, peer, steps",
        ),
        ({"results": [row("fora", float("nan"), 30)]}, "has nan in a row of fora"),
        ({"results": []}, "there is no point to draw"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, content: Any, told: str) -> None:
    code, said = run(written(tmp_path / "it.json", content), "-o", tmp_path / "it.png")
    assert code == 1
    assert told in said
    assert said.count("\n") == 1
    assert not (tmp_path / "it.png").exists()


def test_the_command_draws_files_of_one_model(tmp_path: Path) -> None:
    files = [
        written(tmp_path / f"{model}.json", {"model": model, "results": [row("fora", 0.5, 30)]})
        for model in ("digits", "scenes")
    ]
    picture = tmp_path / "pareto.png"
    assert run(files[0], "-o", picture) == (0, f"Wrote {picture}\n")
    assert picture.stat().st_size > 10_000
    code, said = run(*files, "-o", picture)
    assert code == 1
    assert "digits.json is of digits" in said
    assert "scenes.json of scenes; needed one model" in said
    assert "does not exist; needed an output of `dicache evaluate --json`" in run(tmp_path / "no", "-o", picture)[1]
    assert run("-o", picture)[0] == 2
