"""`dicache schedules export`, `import`, `formats` and `dicache profiles export`, `import`, as a user types them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from dicache.cli import main
from dicache.formats import NAMES
from dicache.schedules import Plan, Rule, Schedule, Target
from tests.toys import written


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def dicache(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def planned(file: str, *rules: Rule) -> None:
    Schedule("fora", {"interval": 2}, written(4), Target(), 4, Plan(4, rules)).save(file)


def test_an_export_says_what_is_lost_and_how_it_is_loaded_in_the_file_as_well() -> None:
    planned("fora.json", Rule("reuse", "C.C."))
    told = dicache("schedules", "export", "fora.json", "--to", "cache-dit").stdout
    text = Path("fora.cache-dit.yaml").read_text()
    lost = "branches, held before their gates, become one held change of all blocks"
    load = "cache_dit.enable_cache(pipe, **cache_dit.load_configs('fora.cache-dit.yaml'))"
    assert f"  lost: {lost}\n" in told
    assert f"# Lost: {lost}\n" in text
    for where in (told, text):
        assert load in where
        assert "the mask is shifted by a step from the second" in where
    assert yaml.safe_load(text)["cache_config"]["steps_computation_mask"] == [1, 0, 1, 0]


def test_a_format_without_comments_has_a_text_beside_it() -> None:
    planned("fora.json", Rule("reuse", "C.C."))
    found: dict[str, Any] = json.loads(
        dicache("schedules", "export", "fora.json", "--to", "smoothcache", "-o", "s.json", "--json").stdout
    )
    assert json.loads(Path("s.json").read_text()) == {"attn1": [1, 0, 1, 0], "ff": [1, 0, 1, 0]}
    assert "Call enable before and disable after each generation" in Path("s.json.txt").read_text()
    assert (found["file"], found["lost"], found["changed"]) == ("s.json", [], [])


def test_what_changes_the_picture_is_refused_in_a_line_and_written_with_lossy() -> None:
    planned("t.json", Rule("skip", "C.C.", predictor="taylor", order=1))
    refused = dicache("schedules", "export", "t.json", "--to", "diffusers-magcache", code=1).stderr
    assert len(refused.strip().splitlines()) == 1
    assert "Pass --lossy to write the rest" in refused
    assert not Path("t.diffusers-magcache.json").exists()
    told = dicache("schedules", "export", "t.json", "--to", "diffusers-magcache", "--lossy").stdout
    assert "  changed: the last output would be held where the plan has a taylor of order 1\n" in told


def test_what_a_format_asks_for_is_set_by_name() -> None:
    planned("t.json", Rule("skip", "CC.C", predictor="taylor", order=1))
    refused = dicache("schedules", "export", "t.json", "--to", "sglang-dpcache", "--set", "height=512", code=1).stderr
    assert "the schedule does not say pipeline, checkpoint, width" in refused
    names = ("pipeline", "checkpoint", "quality", "scheduler", "scheduler_config_sha256")
    values = [*(f"{name}=x" for name in names), "height=512", "width=512", "guidance_scale=4.5"]
    values += ["do_classifier_free_guidance=true", "timesteps=[3,2,1,0]", "sigmas=[4,3,2,1,0]"]
    dicache("schedules", "export", "t.json", "--to", "sglang-dpcache", *(w for v in values for w in ("--set", v)))
    request = json.loads(Path("t.sglang-dpcache.json").read_text())["request"]
    assert (request["quality"], request["height"], request["do_classifier_free_guidance"]) == ("x", 512, True)
    assert dicache("schedules", "export", "t.json", "--to", "mask", "--set", "height", code=2)


def test_an_import_takes_the_model_from_options_and_says_so() -> None:
    Path("mask.txt").write_text("1 0 1 0")
    told = dicache("schedules", "import", "mask.txt", "--from", "mask", "--model", "digits", "--steps", 4).stdout
    assert "read from mask.txt as mask; given besides: model digits, steps 4" in told
    made = Schedule.load("mask.dicache.json")
    assert made.table()["7.mlp"] == "CSCS"
    assert made.target.num_inference_steps == 4
    assert "given besides: model digits, steps 4" in dicache("schedules", "show", "mask.dicache.json").stdout


def test_formats_are_listed_and_an_unknown_one_is_refused() -> None:
    listed = json.loads(dicache("schedules", "formats", "--json").stdout)
    assert [each["name"] for each in listed] == list(NAMES)
    assert all(each["export"] or each["import"] for each in listed)
    table = dicache("schedules", "formats").stdout.splitlines()
    assert table[2].split()[:3] == ["cache-dit", "yes", "yes"]
    planned("fora.json", Rule("reuse", "C.C."))
    refused = dicache("schedules", "export", "fora.json", "--to", "smothcache", code=1).stderr
    assert "unknown format 'smothcache'; known: cache-dit" in refused


def test_rows_of_sglang_become_a_profile_that_teacache_is_calibrated_from() -> None:
    for name, scale in (("a", 1.0), ("b", 1.1)):
        rows = {str(i): [5, scale * 0.1 * i, scale * 0.2 * i] for i in range(6)}
        Path(f"{name}.json").write_text(json.dumps({"single": rows}))
    told = dicache(
        "profiles",
        "import",
        "a.json",
        "b.json",
        "--from",
        "sglang-rows",
        "--model",
        "digits",
        "--steps",
        6,
        "-o",
        "p.h5",
    ).stdout
    assert "2 runs of 6 steps of digits, each the mean of a file" in told
    calibrate = ("calibrate", "teacache", "--profile", "p.h5", "--threshold", 0.5, "--degree", 1, "-o", "t.json")
    dicache(*calibrate)
    policy = Schedule.load("t.json").policy
    assert policy is not None
    assert policy.to_json()["coefficients"] == pytest.approx([2.0, 0.0], abs=1e-6)
    dicache("profiles", "export", "p.h5", "--to", "sglang-rows")
    back = json.loads(Path("p.sglang-rows.json").read_text())["single"]
    assert back["5"] == [2, pytest.approx(0.525), pytest.approx(1.05)]
