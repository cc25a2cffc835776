"""`dicache schedules show`, `diff` and `schema`, as a user types them, on schedules written by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dicache.cli import main
from dicache.schedules import Plan, Rule, Schedule, Target, TeaCachePolicy
from dicache.schedules.schema import schema_text
from tests.toys import written

# What scripts may count on.
KEYS = "method settings num_inference_steps steps adaptive macs_fraction made_for unbound measured sites"


@pytest.fixture(autouse=True)
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder and a terminal of 60 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")


def dicache(*words: str) -> str:
    result = CliRunner().invoke(main, ["schedules", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def planned(file: str, *rules: Rule, steps: int = 4, **fields: Any) -> None:
    replace(Schedule("fora", {"interval": 2}, written(3), Target(), steps, Plan(steps, rules)), **fields).save(file)


def adaptive(file: str, **measured: Any) -> None:
    policy = TeaCachePolicy(0.1, (2.0, -1.0), (0.0, 1.0))
    Schedule("teacache", {}, written(3), Target(), 4, policy=policy, measured=measured).save(file)


def test_a_plan_is_shown_under_a_ruler() -> None:
    planned("s.json", Rule("skip", "C..C" * 3, blocks="1-2"), steps=12)
    assert dicache("show", "s.json").splitlines() == [
        "fora: interval 2",
        "12 steps of Toy, 0.800 of the MACs",  # 6 times 200 of 12 times 500
        "made for nothing in particular",
        "does not bind weights, dtype, latents, scheduler, num inference steps, timesteps, noise levels, guidance",
        "",
        "  step      0    5    10",
        "  attn 0    CCCCCCCCCCCC",
        "  attn 1-2  CSSCCSSCCSSC",
        "  mlp 0     CCCCCCCCCCCC",
        "  mlp 1-2   CSSCCSSCCSSC",
        "",
        "C computed, R reused, S skipped with its block; step 0 is the noisiest",
    ]


def test_a_long_plan_goes_on_below() -> None:
    planned("s.json", Rule("reuse", "C." * 50), steps=100)
    lines = dicache("show", "s.json").splitlines()
    assert [line.split()[1] for line in lines if line.startswith("  step")] == ["0", "40", "80"]
    assert "  attn 0-2  " + "CR" * 20 in lines


def test_each_pass_with_rules_of_its_own_is_shown_with_its_share() -> None:
    planned("s.json", Rule("reuse", "C.C."), Rule("skip", "C...", context="uncond"))
    text = dicache("show", "s.json")
    uncond, other = text.index("pass uncond, 0.550 of the MACs"), text.index("any other pass, 0.730 of the MACs")
    assert text.index("  attn 0-2  CSSS") in range(uncond, other)
    assert text.index("  attn 0-2  CRCR") > other
    shown = json.loads(dicache("show", "s.json", "--json"))
    assert list(shown) == [*KEYS.split(), "macs_fraction_by_context", "sites_by_context"]
    assert shown["macs_fraction"] == pytest.approx(0.73)
    assert shown["macs_fraction_by_context"] == {"uncond": pytest.approx(0.55)}
    assert shown["sites_by_context"]["uncond"]["2.mlp"] == "CSSS"


def test_scripts_find_what_they_expect_and_null_for_what_is_not_known() -> None:
    planned("s.json", anatomy=replace(written(2), macs=0))
    shown = json.loads(dicache("show", "s.json", "--json"))
    assert list(shown) == KEYS.split()
    assert shown["macs_fraction"] is None
    assert "4 steps of Toy, MACs not known" in dicache("show", "s.json")


def test_a_policy_is_shown_as_it_is_expected_to_decide() -> None:
    adaptive("s.json", expected_steps="C..C", macs_fraction=0.4)
    text = dicache("show", "s.json")
    assert "4 steps of Toy, 0.400 of the MACs expected" in text
    assert "p = 2 x -1" in text
    assert "  attn 0-2  CSSC" in text


def test_a_policy_of_which_nothing_is_expected_is_not_drawn_as_if_it_computed_everything() -> None:
    adaptive("s.json")
    text = dicache("show", "s.json")
    assert "how much of the MACs is decided at run time" in text
    assert "CCCC" not in text


def test_equal_schedules_are_one_line() -> None:
    planned("a.json", Rule("reuse", "C.C."))
    planned("b.json", Rule("reuse", "C.C."))
    assert dicache("diff", "a.json", "b.json") == "a.json and b.json say the same: fora, 4 steps of Toy\n"
    assert json.loads(dicache("diff", "a.json", "b.json", "--json"))["equal"] is True


def test_two_plans_are_compared_step_by_step_for_the_blocks_that_differ() -> None:
    planned("a.json", Rule("reuse", "C.C.", branch="mlp"))
    rules = (Rule("reuse", "C.C.", "1", "mlp"), Rule("reuse", "C..C", "0", "mlp"), Rule("reuse", "C..C", "2", "mlp"))
    planned("b.json", *rules, settings={"interval": 3}, target=Target(dtype="float32"))
    assert dicache("diff", "a.json", "b.json").splitlines() == [
        "A  a.json: fora, 4 steps of Toy, 0.820 of the MACs",
        "B  b.json: fora, 4 steps of Toy, 0.820 of the MACs",
        "",
        "settings",
        "  interval  2 | 3",
        "",
        "made for",
        "  dtype  - | float32",
        "",
        "2 of 6 sites differ, at 2 of 4 steps",
        "  step     0",
        "  mlp 0 A  CRCR",
        "        B  CRRC",
        "             ^^",
        "  mlp 2 A  CRCR",
        "        B  CRRC",
        "             ^^",
        "",
        "C computed, R reused, S skipped with its block; step 0 is the noisiest",
    ]
    said = json.loads(dicache("diff", "a.json", "b.json", "--json"))
    assert {"equal", "made_for", "settings", "sites", "macs_fraction"} < said.keys()
    assert said["equal"] is False
    assert said["made_for"] == {"dtype": [None, "float32"]}
    assert said["settings"] == {"interval": [2, 3]}
    assert said["sites"] == {"0.mlp": ["CRCR", "CRRC"], "2.mlp": ["CRCR", "CRRC"]}
    assert said["macs_fraction"] == pytest.approx([0.82, 0.82])


def test_passes_that_differ_are_named() -> None:
    planned("a.json", Rule("reuse", "C.C.", "*", "*", "uncond"))
    planned("b.json", Rule("reuse", "C..C", "*", "*", "uncond"))
    text = dicache("diff", "a.json", "b.json")
    assert "pass uncond: 6 of 6 sites differ, at 2 of 4 steps" in text
    assert "any other pass" not in text


def test_plans_that_cannot_be_laid_side_by_side_are_told_from_plans_that_do_the_same() -> None:
    planned("a.json", Rule("reuse", "C.C."))
    planned("more steps.json", Rule("reuse", "C.C.C."), steps=6)
    planned("other model.json", Rule("reuse", "C.C."), anatomy=written(5))
    planned("other rules.json", Rule("reuse", "C.C.", "0-1"), Rule("reuse", "C.C.", "2"))
    adaptive("unforeseen.json")
    for other, said in (
        ("more steps.json", "not compared step by step, as the numbers of steps differ"),
        ("other model.json", "not compared: the models have other blocks or branches"),
        ("other rules.json", "Every site is computed, reused and skipped at the same steps, by rules that"),
        ("unforeseen.json", "not compared: it is decided at run time"),
    ):
        assert said in dicache("diff", "a.json", other)
        assert json.loads(dicache("diff", other, "a.json", "--json"))["equal"] is False


def test_two_policies_that_are_expected_to_do_the_same_are_not_said_to_do_it() -> None:
    adaptive("a.json", expected_steps="C..C", computed_steps=2.0)
    adaptive("b.json", expected_steps="C..C", computed_steps=2.1)
    assert "It is expected that every site is computed" in dicache("diff", "a.json", "b.json")


def test_a_missing_file_is_one_line() -> None:
    planned("a.json")
    result = CliRunner().invoke(main, ["schedules", "diff", "a.json", "nowhere.json"])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "Error: nowhere.json does not exist; make a schedule with `dicache calibrate`"
    ]


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_the_schema_is_printed(words: tuple[str, ...]) -> None:
    assert json.loads(dicache("schema", *words)) == json.loads(schema_text())
