"""`dicache schedules show | diff | schema` on files made here."""

import json
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner

from dicache.calibrate.fora import Fora
from dicache.calibrate.methods import planned_schedule
from dicache.cli import main
from dicache.schedules import Plan, Rule, Schedule, Target
from tests.tiny import anatomy_of, dit, pixart


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    planned_schedule(Fora(2, "start"), anatomy_of(dit), Target(dtype="float32"), 50).save("two.json")
    planned_schedule(Fora(3, "start"), anatomy_of(dit), Target(dtype="float16"), 50).save("three.json")
    planned_schedule(Fora(2, "start"), anatomy_of(pixart), Target(), 50).save("other.json")
    rules = (Rule("reuse", "C.C.", branch="mlp", context="uncond"), Rule("skip", "CC.C", "1-2"))
    Schedule("mixed", {}, anatomy_of(dit), Target(), 4, Plan(4, rules)).save("mixed.json")
    return tmp_path


def said(*words: str) -> str:
    result = CliRunner().invoke(main, ["schedules", *words], env={"COLUMNS": "60"})
    assert result.exit_code == 0, result.output
    return result.output


def test_equal_schedules_are_told_in_a_line(folder: Path) -> None:
    assert said("diff", "two.json", "two.json").count("\n") == 1
    assert json.loads(said("diff", "two.json", "two.json", "--json"))["equal"] is True


def test_a_difference_names_settings_target_and_steps(folder: Path) -> None:
    found = json.loads(said("diff", "two.json", "three.json", "--json"))
    assert found["equal"] is False
    assert "interval" in found["settings"]
    assert "dtype" in found["made_for"]
    one, other = found["sites"]["3.mlp"]
    assert (one[:6], other[:6]) == ("CRCRCR", "CRRCRR")
    text = said("diff", "two.json", "three.json")
    assert "interval" in text
    assert "8 of 8 sites differ" in text


def test_schedules_of_other_models_are_compared_in_the_rest(folder: Path) -> None:
    assert "not compared" in said("diff", "two.json", "other.json")


def test_the_drawing_has_step_numbers_and_fits_the_page(folder: Path) -> None:
    text = said("show", "two.json")
    assert "40" in text
    assert text.count("CRCRCR") >= 2
    assert max(len(line) for line in text.splitlines() if "CRCR" in line) <= 60


def test_a_guidance_pass_with_rules_of_its_own_is_drawn_for_itself(folder: Path) -> None:
    text = said("show", "mixed.json")
    assert "uncond" in text
    assert "CRCR" in text
    assert "CCSC" in text


def test_the_schema_is_printed(folder: Path) -> None:
    schema = json.loads(said("schema"))
    jsonschema.validate(json.loads(Path("mixed.json").read_text()), schema, cls=jsonschema.Draft202012Validator)
