"""The schedule file: round trip, and the refusal of everything that is not a schedule."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dicache.schedules import Plan, Rule, Schedule, ScheduleError, Target, TeaCachePolicy
from tests.toys import written

TARGET = Target("0123456789abcdef", "float32", (4, 8, 8), "DDIMScheduler", 3, (2.0, 1.0, 0.0), (1.5, 0.0, -1.5))
STATIC = Schedule(
    "delta-cache",
    {"interval": 2, "note": "ein Füchslein, 狐"},
    written(4, (0, 3), (3, 4)),
    TARGET,
    3,
    Plan(3, (Rule("skip", "C.C", blocks="0-2"), Rule("reuse", "CC.", branch="mlp", context="uncond"))),
    measured={"r2": 0.5},
)
ADAPTIVE = Schedule(
    "teacache",
    {},
    written(2),
    Target(),
    3,
    policy=TeaCachePolicy(0.15, (1.0, -0.5, 0.25), (0.0, 0.5), first_steps=2, last_steps=0),
)
both_kinds = pytest.mark.parametrize("schedule", [STATIC, ADAPTIVE], ids=["static", "adaptive"])


@both_kinds
def test_a_schedule_survives_being_saved_and_loaded(schedule: Schedule, tmp_path: Path) -> None:
    schedule.save(tmp_path / "made" / "here.json")  # makes the folder
    assert Schedule.load(tmp_path / "made" / "here.json") == schedule


@pytest.mark.parametrize("text", ["a [ b ] c", "[ ]", "x [\n1,\n 2 ] y", "[  {[ ]}  ]", '"', "\\"])
def test_text_in_the_settings_survives_whatever_is_in_it(text: str, tmp_path: Path) -> None:
    schedule = Schedule("test", {"prompt": text, "prompts": [text, text]}, written(2), Target(), 3, Plan(3))
    schedule.save(tmp_path / "s.json")
    assert Schedule.load(tmp_path / "s.json").settings == {"prompt": text, "prompts": [text, text]}


def test_the_file_is_one_that_a_person_can_read(tmp_path: Path) -> None:
    STATIC.save(tmp_path / "s.json")
    lines = (tmp_path / "s.json").read_text().splitlines()
    assert '    "timesteps": [2.0, 1.0, 0.0],' in lines
    assert '        "steps": "C.C",' in lines
    assert max(map(len, lines)) < 120


@both_kinds
def test_saving_leaves_one_file_and_no_part_of_one(schedule: Schedule, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    STATIC.save(path)
    schedule.save(path)  # over the old one
    assert os.listdir(tmp_path) == ["s.json"]


def test_a_schedule_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    STATIC.save(path)
    before = path.read_bytes()
    broken = Schedule("test", {"loss": float("nan")}, written(2), Target(), 3, Plan(3))
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["s.json"]


def test_a_reader_never_sees_a_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.json"
    STATIC.save(path)
    seen = []

    def look(source: Any, target: Any) -> None:
        seen.append((Schedule.load(source), Schedule.load(target)))

    monkeypatch.setattr(os, "replace", look)
    ADAPTIVE.save(path)
    assert seen == [(ADAPTIVE, STATIC)]  # whole before it takes the name


@both_kinds
def test_a_file_that_was_cut_off_anywhere_is_refused(schedule: Schedule, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    schedule.save(path)
    whole = path.read_text()
    for length in range(0, len(whole.rstrip()), 37):
        path.write_text(whole[:length])
        with pytest.raises(ScheduleError, match=r"s\.json is not JSON .* was it cut off\? Calibrate again"):
            Schedule.load(path)


def test_a_missing_file_a_folder_and_a_picture_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"none\.json does not exist; make a schedule with `dicache calibrate`"):
        Schedule.load(tmp_path / "none.json")
    with pytest.raises(ScheduleError, match="is a folder"):
        Schedule.load(tmp_path)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(ScheduleError, match=r"image\.png is not JSON"):
        Schedule.load(tmp_path / "image.png")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_not_finite_is_refused(number: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    ADAPTIVE.save(path)
    path.write_text(path.read_text().replace("0.15", number))
    with pytest.raises(ScheduleError, match=rf"s\.json: found {number}, needed a finite number"):
        Schedule.load(path)


def test_a_number_too_large_to_be_finite_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    STATIC.save(path)
    path.write_text(path.read_text().replace("-1.5", "-1e999"))
    with pytest.raises(ScheduleError, match="finite"):
        Schedule.load(path)


@pytest.mark.parametrize("content", [{}, {"format": "dicache.schedule/0"}, {"format": None}, [], "schedule", None, 3])
def test_another_format_is_refused_with_the_one_that_is_needed(content: Any) -> None:
    with pytest.raises(ScheduleError, match=r"not a schedule: found format .* needed 'dicache\.schedule/1'"):
        Schedule.from_json(content)


@pytest.mark.parametrize("key", ["method", "settings", "steps", "made_for", "measured", "anatomy"])
def test_a_missing_key_is_named(key: str) -> None:
    content = STATIC.to_json()
    del content[key]
    with pytest.raises(ScheduleError, match=f"missing key '{key}'"):
        Schedule.from_json(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"method": 3}, "method cannot be 3"),
        ({"settings": []}, r"settings cannot be \[\]"),
        ({"steps": "3"}, "steps cannot be '3'"),
        ({"steps": True}, "steps cannot be True"),
        ({"steps": 4}, "the plan has 3 steps, the schedule 4"),
        ({"plan": {"steps": 3, "rules": [{"action": "skip", "steps": "C.", "blocks": "0"}]}}, "2 letters for a plan"),
        ({"plan": {"steps": 3, "rules": [{"action": "skip", "steps": "C.C", "blocks": "4"}]}}, "Toy has the blocks"),
        ({"plan": None}, "found None, needed an object"),
        ({"policy": ADAPTIVE.to_json()["policy"]}, "either a plan or a policy"),
        ({"policy": {"name": "magic"}}, "unknown policy"),
        ({"made_for": []}, "made_for must be an object"),
        ({"made_for": {"colour": "red"}}, "made_for: unknown key 'colour'"),
        ({"made_for": {"dtype": 32}}, "made_for: dtype cannot be 32"),
        ({"made_for": {"latents": "8x8"}}, "made_for: latents cannot be '8x8'"),
        ({"made_for": {"timesteps": ["1"]}}, "made_for: timesteps cannot be"),
        ({"made_for": {"num_inference_steps": 2.5}}, "made_for: num_inference_steps cannot be 2.5"),
        ({"anatomy": {}}, "anatomy: missing key"),
    ],
)
def test_a_file_that_contradicts_itself_or_the_format_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_json({**STATIC.to_json(), **change})


@pytest.mark.parametrize("steps", [0, -3])
def test_a_schedule_of_a_policy_needs_a_step_too(steps: int) -> None:
    with pytest.raises(ScheduleError, match="step"):
        Schedule.from_json({**ADAPTIVE.to_json(), "steps": steps})


def test_the_file_is_read_and_written_in_one_encoding_whatever_the_machine_prefers(tmp_path: Path) -> None:
    STATIC.save(tmp_path / "s.json")
    assert Schedule.from_json(json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))) == STATIC
    program = (
        "import sys, warnings; from dicache import Schedule; warnings.simplefilter('error', EncodingWarning); "
        "Schedule.load(sys.argv[1]).save(sys.argv[1])"
    )
    command = [sys.executable, "-X", "warn_default_encoding", "-c", program, str(tmp_path / "s.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_schedule_without_a_plan_or_a_policy_is_refused() -> None:
    content = STATIC.to_json()
    del content["plan"]
    with pytest.raises(ScheduleError, match="either a plan or a policy"):
        Schedule.from_json(content)


@both_kinds
def test_what_is_written_is_plain_json(schedule: Schedule) -> None:
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json(), allow_nan=False))) == schedule
