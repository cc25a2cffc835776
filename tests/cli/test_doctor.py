"""`dicache doctor`."""

import json

import pytest
from click.testing import CliRunner, Result

from dicache.cli import main
from dicache.conformance import LAWS, LawError, Subject


def doctor(*words: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *words])


@pytest.mark.parametrize(("model", "passes"), [("digits", ["0"]), ("flow", ["cond", "uncond"])])
def test_every_law_holds_on_a_bundled_model(model: str, passes: list[str]) -> None:
    told = doctor("--model", model, "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert [law["law"] for law in found["laws"]] == [*LAWS, "pipeline"]
    assert all(law["holds"] and law["cases"] > 0 and not law["found"] for law in found["laws"])
    assert found["passes"] == dict.fromkeys(passes, "CCCC")
    assert found["anatomy"]["model"] == found["model"]


def test_it_tells_what_the_model_is_made_of_and_what_each_law_says() -> None:
    told = doctor("--model", "digits", "--steps", "2")
    assert told.exit_code == 0
    assert "DiTTransformer2DModel: 12 blocks with 99.9% of its 0.1911 GMACs a call" in told.stdout
    assert "one delta may replace 0-11" in told.stdout
    assert "0-11    transformer_blocks.0-11  BasicTransformerBlock  attn mlp        98.9%" in told.stdout
    for law in LAWS.values():
        assert f"  {law.__doc__}" in told.stdout
    assert "BROKEN" not in told.stdout
    assert told.stdout.endswith("\nAll 11 laws hold\n")


def test_a_broken_law_is_told_and_ends_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(subject: Subject) -> int:
        """nothing is what it seems"""
        raise LawError("everything was as it seemed")

    def failing(subject: Subject) -> int:
        """nothing fails"""
        raise RuntimeError("sizes\n  differ")

    monkeypatch.setitem(LAWS, "compute", broken)
    monkeypatch.setitem(LAWS, "keep", failing)
    told = doctor("--model", "digits", "--steps", "2")
    assert told.exit_code == 1
    assert "found: everything was as it seemed" in told.stdout
    assert "found: RuntimeError: sizes differ" in told.stdout
    assert told.stdout.count("BROKEN") == 2
    assert told.stdout.endswith("\n2 of 11 laws are broken\n")
