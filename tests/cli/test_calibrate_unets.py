"""DeepCache and Delta-Cache of a U-Net as a user types them."""

import json
from pathlib import Path

import pytest

from tests.cli.test_commands import dicache, refused
from tests.models.folders import folder


def test_a_pipeline_with_a_u_net_is_calibrated_sampled_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ("--model", folder("sd15"))
    dicache("calibrate", "deepcache", *model, "--steps", 6, "--interval", 3, "--branch", 1)
    shown = json.loads(dicache("schedules", "show", "deepcache.json", "--json").stdout)
    assert (shown["num_inference_steps"], shown["steps"]) == (6, 7)  # PNDM's, the second of which it repeats
    assert [shown["sites"][key] for key in ("1.attn", "2.conv", "28.conv")] == ["CCCCCCC", "CSSCSSC", "CCCCCCC"]
    dicache("calibrate", "delta-cache", *model, "--steps", 6, "--branch", 1, "-o", "delta.json")
    dicache("calibrate", "fora", *model, "--steps", 6, "--interval", 2, "--branches", "attn,mlp")
    for name in ("deepcache", "delta", "fora"):
        dicache("generate", *model, "--schedule", f"{name}.json", "--prompt", "a red fox", "-o", name)
    words = ("--schedule", "deepcache.json", "--schedule", "delta.json", "--runs", 2, "--json")
    results = json.loads(dicache("evaluate", *model, *words).stdout)["results"]
    found = {result["schedule"]: result["macs_fraction"] for result in results}
    assert 0 < found["deepcache"] < found["delta"] < 1
    cost = json.loads(dicache("cost", *model, "--schedule", "deepcache.json", "--json").stdout)
    assert cost["fraction"] == pytest.approx(shown["macs_fraction"], abs=1e-6)


def test_what_a_u_net_cannot_do_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = ("--model", folder("sd15"), "--steps", 4)
    assert "found branch 9, needed one of" in refused("calibrate", "deepcache", *model, "--branch", 9)
    assert "no deep blocks can be skipped; give a branch" in refused("calibrate", "delta-cache", *model)
    assert "a profile measures what a row of blocks adds" in refused("profile", *model, "--runs", 1)
    digits = ("--model", "digits", "--steps", 8)
    assert "DiTTransformer2DModel has none; take fora" in refused("calibrate", "deepcache", *digits)
