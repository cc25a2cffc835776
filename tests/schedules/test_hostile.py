"""Schedule files from strangers: refused with the project's own error, before memory is taken for what they ask."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from dicache.schedules import Schedule, ScheduleError, corrections
from dicache.schedules.documents import MAX_BYTES, MAX_MESSAGE
from tests.hostile import changed
from tests.schedules.test_file import ADAPTIVE, STATIC
from tests.schedules.test_schema import SCHEDULES, written

WRITTEN = Path(__file__).parent.parent / "written"
DOCUMENTS = [written(schedule) for schedule in SCHEDULES]
BLOCK = written(STATIC)["anatomy"]["blocks"][0]


@settings(max_examples=150, deadline=None)
@given(changed(DOCUMENTS))
def test_a_changed_document_is_read_or_refused(document: Any) -> None:
    try:
        schedule = Schedule.from_json(document)
    except ScheduleError:
        return
    assert Schedule.from_json(written(schedule)) == schedule
    assert len(schedule.table()) == len(schedule.anatomy.sites)


def with_anatomy(**changes: Any) -> Any:
    content = written(STATIC)
    return {**content, "anatomy": {**content["anatomy"], **changes}}


TOO_LARGE: dict[str, tuple[Any, str]] = {
    "steps of a policy": ({**written(ADAPTIVE), "steps": 10**9}, "no more than 10000; found 1000000000"),
    "steps of a plan": (
        {**written(STATIC), "steps": 10**9, "plan": {"steps": 10**9, "rules": []}},
        "no more than 10000; found 1000000000",
    ),
    "blocks": (
        with_anatomy(blocks=[{**BLOCK, "blocks": "0-999999999", "module": "b.0-999999999"}]),
        "more than 10000 blocks or sites",
    ),
    "entries": (with_anatomy(blocks=[{**BLOCK, "blocks": "0-9999", "module": "b.0-9999"}] * 99), "more than 10000"),
    "a segment": (with_anatomy(segments=["0-999999999"]), "segments up to block 999999999"),
    "a number of a block": (with_anatomy(segments=["0-" + "9" * 5000]), "is not a range of blocks"),
    "rules": (
        {
            **with_anatomy(blocks=[{**BLOCK, "blocks": "0-999", "module": "b.0-999"}], segments=["0-999"]),
            "steps": 100,
            "plan": {"steps": 100, "rules": [{"action": "reuse", "steps": "C" * 100, "branch": "mlp"}] * 100},
        },
        "more than any model needs",
    ),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_is_too_large_is_refused_before_memory_is_taken(name: str, tmp_path: Path) -> None:
    content, message = TOO_LARGE[name]
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    tracemalloc.start()
    try:
        with pytest.raises(ScheduleError, match=message) as refused:
            Schedule.load(path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 3 * path.stat().st_size + 30e6
    assert len(str(refused.value)) < len(str(path)) + MAX_MESSAGE + 20


def test_a_file_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    with path.open("wb") as file:
        file.truncate(10**9)  # takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ScheduleError, match=r"s\.json: found more than 16 MB, which no such file has"):
            Schedule.load(path)
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested more than 32 deep"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested more than 32 deep"),
        ('{"steps": ' + "9" * 5000 + "}", "whole number of 5000 digits"),
        ('{"format": "\\u001b[2J"}', r"the character '\\x1b'"),
        ('{"\\ud800": 1}', r"the character '\\ud800'"),
    ],
)
def test_a_document_that_no_schedule_is_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ScheduleError, match=message):
        Schedule.load(tmp_path / "s.json")


def test_a_message_does_not_repeat_a_large_file(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({**written(STATIC), "method": ["long"] * 100_000}))
    with pytest.raises(ScheduleError, match="method cannot be") as refused:
        Schedule.load(tmp_path / "s.json")
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("file", sorted(WRITTEN.glob("schedules-1/*.json")), ids=lambda file: file.stem)
def test_a_file_of_every_format_that_was_written_is_read(file: Path) -> None:
    schedule = Schedule.load(file)
    assert json.loads(file.read_text())["format"] == "dicache.schedule/1"
    assert set("".join(schedule.table().values())) <= set("CRS")


def test_a_file_of_the_future_says_what_to_install(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"format": "dicache.schedule/2", "steps": {"new": "things"}}))
    with pytest.raises(ScheduleError, match=r"is newer than 'dicache.schedule/1': `pip install --upgrade dicache`"):
        Schedule.load(path)
    path.write_text(json.dumps({"format": "dicache.schedule/12", "dicache": "3.1"}))
    with pytest.raises(ScheduleError, match=r"schedule/12', which is newer .*: `pip install 'dicache>=3\.1'`"):
        Schedule.load(path)
    path.write_text(json.dumps({"format": "dicache.schedule/2", "dicache": "1; curl evil"}))
    with pytest.raises(ScheduleError, match="`pip install --upgrade dicache`"):
        Schedule.load(path)


@pytest.mark.parametrize("name", ["../t", "/etc/passwd", "..", "a/../b", "a\\b", "t\0", ""])
def test_tensors_lie_beside_the_schedule_and_nowhere_else(name: str, tmp_path: Path) -> None:
    content = json.loads((WRITTEN / "schedules-1" / "corrections.json").read_text())
    content["corrections"]["file"] = name
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(ScheduleError, match=r"must lie beside the schedule|which is not text"):
        Schedule.load(tmp_path / "s.json")


def test_tensors_that_do_not_fit_or_never_end_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (WRITTEN / "schedules-1" / "corrections.json").read_text()
    name = json.loads(text)["corrections"]["file"]
    (tmp_path / "s.json").write_text(text)
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ScheduleError, match=f"{name} is not a file"):
        Schedule.load(tmp_path / "s.json")
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes((WRITTEN / "schedules-1" / name).read_bytes())
    Schedule.load(tmp_path / "s.json")
    monkeypatch.setattr(corrections, "host_memory", lambda: 100)
    with pytest.raises(ScheduleError, match=f"{name} takes .* bytes of memory, and 100 are free"):
        Schedule.load(tmp_path / "s.json")


@pytest.mark.parametrize("returns", [7, {"a": 1}, [None, 7], ["hidden_states", ["x"]], True])
def test_what_a_block_returns_is_text(returns: Any) -> None:
    with pytest.raises(ScheduleError, match=r"returns must be|have names, found"):
        Schedule.from_json(with_anatomy(blocks=[{**BLOCK, "returns": returns}]))
