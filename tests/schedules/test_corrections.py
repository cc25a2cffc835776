"""Corrections and the file of their tensors."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from dicache.schedules import Corrections, Plan, PlanError, Rule, Schedule, ScheduleError, Target, TeaCachePolicy
from dicache.schedules.comparing import compare
from dicache.schedules.schema import schema_text
from tests.toys import written

PLAN = Plan(4, (Rule("reuse", "C.C.", branch="mlp"),))
TRENDS = {f"0/0.mlp/{step}": np.full((2, 3, 4), step, np.float32) for step in (1, 3)}


def corrections(**changed: Any) -> Corrections:
    usual: dict[str, Any] = {
        "form": "multiply",
        "weight": 0.01,
        "contexts": {"0": 2},
        "sites": {"0.mlp": "C.C."},
        "tensors": TRENDS,
    }
    return Corrections(**(usual | changed))


def schedule(**changed: Any) -> Schedule:
    levels = (3.0, 1.0, -1.0, -3.0)
    return Schedule("eoc", {}, written(2), Target(noise_levels=levels), 4, PLAN, corrections=corrections(**changed))


def test_a_schedule_and_its_tensors_are_two_files_that_are_read_together(tmp_path: Path) -> None:
    schedule().save(tmp_path / "eoc.json")
    assert sorted(os.listdir(tmp_path)) == ["eoc.json", "eoc.safetensors"]
    read = Schedule.load(tmp_path / "eoc.json")
    assert read == schedule()
    assert read.corrections is not None
    assert read.corrections.file == "eoc.safetensors"
    assert all(np.array_equal(read.corrections.tensors[name], trend) for name, trend in TRENDS.items())


def test_saved_in_another_place_the_tensors_go_there_too(tmp_path: Path) -> None:
    schedule().save(tmp_path / "eoc.json")
    Schedule.load(tmp_path / "eoc.json").save(tmp_path / "copy" / "other.json")
    assert Schedule.load(tmp_path / "copy" / "other.json") == schedule()
    assert sorted(os.listdir(tmp_path / "copy")) == ["other.json", "other.safetensors"]


def test_what_is_written_is_valid(tmp_path: Path) -> None:
    schedule().save(tmp_path / "eoc.json")
    content = json.loads((tmp_path / "eoc.json").read_text())
    schema = jsonschema.Draft202012Validator(json.loads(schema_text()))
    schema.validate(content)
    for broken in ({"form": "divide"}, {"file": "../x"}, {"file": ""}, {"contexts": {"0": 0}}, {"colour": 1}):
        wrong = {**content, "corrections": {**content["corrections"], **broken}}
        assert not schema.is_valid(wrong)
        with pytest.raises(ScheduleError):
            Schedule.from_json(wrong, tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"form": "divide"}, "unknown form 'divide'; it is multiply or add"),
        ({"weight": float("nan")}, "the weight must be a finite number, found nan"),
        ({"contexts": {"0": 0}}, "1 part or more"),
        ({"contexts": {"0": 3}}, r"0/0\.mlp/1 must be \(parts, tokens, channels\), found \(2, 3, 4\)"),
        ({"sites": {"7.mlp": "C.C."}}, "Toy has no site 7.mlp"),
        ({"sites": {"0.mlp": "C."}}, "2 letters for a plan of 4 steps"),
        ({"sites": {"0.mlp": "CRC."}}, "a letter C or . for each step"),
        ({"sites": {"0.attn": "C.CC"}}, r"0\.attn is corrected at step 1, where the plan does not hold it"),
        ({"sites": {"0.mlp": "..C."}}, r"0\.mlp is corrected at step 0, where the plan does not hold it"),
        ({"tensors": {"0/0.mlp/1": TRENDS["0/0.mlp/1"]}}, r"has no tensor 0/0\.mlp/3"),
        ({"tensors": TRENDS | {"x": TRENDS["0/0.mlp/1"]}}, "has an unknown tensor x"),
        ({"tensors": TRENDS | {"0/0.mlp/3": np.full((2, 3, 4), np.nan)}}, "numbers that are not finite"),
    ],
)
def test_corrections_that_do_not_fit_the_plan_are_refused(changed: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        schedule(**changed)


def test_what_is_predicted_otherwise_cannot_be_corrected() -> None:
    plan = Plan(4, (Rule("reuse", "C.C.", branch="mlp", predictor="taylor", order=1),))
    with pytest.raises(PlanError, match="corrected at step 1, where the plan does not hold it"):
        replace(schedule(), plan=plan)
    with pytest.raises(ScheduleError, match="but the schedule has a policy"):
        replace(schedule(), plan=None, policy=TeaCachePolicy(0.1, (1.0, 0.0), (0.0, 1.0)))


def test_a_file_that_is_missing_or_another_one_is_refused_with_what_to_do(tmp_path: Path) -> None:
    schedule().save(tmp_path / "eoc.json")
    schedule(tensors={name: trend + 1 for name, trend in TRENDS.items()}).save(tmp_path / "other.json")
    os.replace(tmp_path / "other.safetensors", tmp_path / "eoc.safetensors")
    with pytest.raises(
        ScheduleError, match=r"eoc\.json: .*eoc\.safetensors is not the file that this .* was saved with"
    ):
        Schedule.load(tmp_path / "eoc.json")
    with pytest.raises(ScheduleError, match=r"other\.safetensors is missing beside the schedule; .* copy both"):
        Schedule.load(tmp_path / "other.json")
    with pytest.raises(ScheduleError, match="read that"):
        Schedule.from_json(json.loads((tmp_path / "eoc.json").read_text()))


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    schedule().save(tmp_path / "eoc.json")
    (tmp_path / "eoc.safetensors").write_bytes(b"text")
    text = (tmp_path / "eoc.json").read_text()
    digest = json.loads(text)["corrections"]["sha256"]
    (tmp_path / "eoc.json").write_text(
        text.replace(digest, "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1")
    )
    with pytest.raises(ScheduleError, match=r"eoc\.safetensors is not a safetensors file"):
        Schedule.load(tmp_path / "eoc.json")


@pytest.mark.parametrize("name", ["/etc/passwd", "../eoc.safetensors", "..", "a/b", ""])
def test_a_file_elsewhere_is_not_read(name: str, tmp_path: Path) -> None:
    schedule().save(tmp_path / "eoc.json")
    content = json.loads((tmp_path / "eoc.json").read_text())
    content["corrections"]["file"] = name
    with pytest.raises(ScheduleError, match="must lie beside the schedule"):
        Schedule.from_json(content, tmp_path)


def test_corrections_cannot_be_mapped_to_other_steps() -> None:
    with pytest.raises(ScheduleError, match="at its own 4 steps, which cannot be mapped to 2; calibrate for this"):
        schedule().resampled((3.0, -3.0), 2)


def test_two_schedules_with_other_trends_differ() -> None:
    other = schedule(tensors={name: trend + 1 for name, trend in TRENDS.items()})
    assert schedule() != other
    assert set(compare(schedule(), other).sections["corrections"]) == {"sha256"}
    assert compare(schedule(), schedule()).equal


def test_a_plan_in_which_guidance_collapses_is_not_corrected() -> None:
    with pytest.raises(ScheduleError, match="the plan lets guidance collapse from step 2 on; a schedule can do one"):
        replace(schedule(), plan=replace(PLAN, collapse_guidance_from=2))


def test_a_save_that_is_killed_leaves_the_schedule_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "eoc.json"
    schedule().save(path)
    before, write = Schedule.load(path), Path.write_text

    def killed(file: Path, *args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)  # when the tensors are there and the JSON is not
    with pytest.raises(KeyboardInterrupt):
        schedule(weight=0.5).save(path)
    monkeypatch.setattr(Path, "write_text", write)
    assert Schedule.load(path) == before
    for weight in (0.5, 0.25, 0.125):
        schedule(weight=weight, tensors={key: trend + weight for key, trend in TRENDS.items()}).save(path)
        found = Schedule.load(path).corrections
        assert found is not None
        assert found.weight == weight
        assert found.tensors["0/0.mlp/1"][0, 0, 0] == 1 + weight
        assert len(os.listdir(tmp_path)) == 2
    Schedule("fora", {}, written(2), Target(), 4, PLAN).save(path)
    assert os.listdir(tmp_path) == ["eoc.json"]
