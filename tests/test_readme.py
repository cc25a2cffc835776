"""The README's commands and examples, as they stand there."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import dicache
from dicache.cli import main
from dicache.models.loading import load
from tests.pipelines.samplers import KINDS
from tests.tiny import dit
from tests.transformers import TRANSFORMERS

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_first_commands_make_the_schedule_that_the_first_example_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [line.partition("#")[0] for line in blocks("console")[0].splitlines()]
    for command in commands:
        dollar, program, *words = shlex.split(command)
        assert (dollar, program) == ("$", "dicache")
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
    assert sorted(os.listdir()) == ["profiles", "teacache.json"]
    names: dict[str, Any] = {"pipe": load("digits")}
    exec(blocks("python")[0], names)
    assert names["cache"].stats.macs_fraction < 0.7
    assert names["image"].size == (32, 32)


def test_the_bare_loop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from tests.tiny import STEPS, scheduled

    scheduled(dit).save("fora.json")
    names: dict[str, Any] = {
        "dicache": dicache,
        "torch": torch,
        "transformer": dit(),
        "timesteps": torch.linspace(999, 0, STEPS)[:, None].expand(-1, 2),
        "latents": torch.zeros(2, 4, 8, 8),
        "labels": torch.tensor([1, 2]),
    }
    exec(blocks("python")[1], names)
    assert names["cache"].stats.calls == STEPS


def test_as_many_classes_and_samplers_are_tested_as_it_says() -> None:
    kinds = {tiny.kind for tiny in TRANSFORMERS.values()}
    said = " ".join(README.split())
    assert f"{len(kinds)} transformer classes of diffusers" in said
    assert f"{len(KINDS)} samplers" in said


def test_every_link_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / link).exists(), link
