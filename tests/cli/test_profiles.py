"""`dicache profile --shard` and `dicache profiles merge`."""

import json
from pathlib import Path

import pytest

from dicache.profiler import storage
from tests.cli.test_commands import dicache, refused
from tests.profiler.test_merging import RUNS, assert_same, write


def test_a_part_of_a_profile_has_its_runs_alone_and_says_how_to_join_them(tmp_path: Path) -> None:
    output = tmp_path / "p.h5"
    told = dicache("profile", "--model", "digits", "--runs", 3, "--steps", 2, "--shard", "1/2", "-o", output).stdout
    assert f"dicache profiles merge {output}.*-of-2 -o {output}" in told
    assert [run.seed for run in storage.header(f"{output}.1-of-2")[1]] == [0, 2]
    assert not output.exists()


def test_a_file_is_replaced_only_if_it_is_named_among_those_to_join(tmp_path: Path) -> None:
    one, two, whole = (tmp_path / name for name in ("one.h5", "two.h5", "whole.h5"))
    write(one, RUNS[:3]), write(two, RUNS[3:]), write(whole, RUNS)
    before = two.read_bytes()
    assert f"{two} exists; name it among the files" in refused("profiles", "merge", one, "-o", two)
    assert two.read_bytes() == before
    said = json.loads(dicache("profiles", "merge", two, one, "-o", two, "--json").stdout)
    assert said == {"profile": str(two), "runs": 7, "failed": 1}
    assert_same(two, whole)


def test_what_is_no_part_or_no_profile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("0/2", "3/2", "1", "a/b"):
        said = dicache("profile", "--model", "digits", "--shard", part, fails=True).output
        assert f"{part!r} is no part of a whole; write 1/8 to 8/8" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = dicache("profile", "--model", "digits", "--shard", "1/2", fails=True).output
    assert "--shard is for processes that know nothing of one another" in said
    (tmp_path / "x.h5").write_text("no profile")
    assert "x.h5 cannot be read as a profile" in refused(
        "profiles", "merge", tmp_path / "x.h5", "-o", tmp_path / "y.h5"
    )
    assert not (tmp_path / "y.h5").exists()
