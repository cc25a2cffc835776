"""Profiles that are joined, against the same runs in one profile."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dicache.profiler import ProfileError, Provenance, Run, storage
from dicache.profiler.storage import merging, writing
from dicache.schedules import Target
from tests.toys import written

STEPS, PARTS, OUTPUT = 2, 2, (3, 4)
PROVENANCE = Provenance(
    model="toy",
    anatomy=written(2),
    target=Target(num_inference_steps=STEPS, timesteps=(1.0, 0.0)),
    settings={"guidance": 4.0},
    versions={"dicache": "0.1.0"},
    lags=1,
    contexts=("0",),
    parts=(PARTS,),
)
PRIORS = {"0.mlp": ((0, 1), (PARTS, *OUTPUT)), "1.attn": ((1,), (PARTS, *OUTPUT))}
RUNS = [Run(f"prompt {seed % 3}", seed, "failed at step 1 in 0.mlp" if seed == 4 else "ok") for seed in range(7)]


def write(path: Path, runs: Sequence[Run], provenance: Provenance = PROVENANCE) -> Path:
    """Make a profile of runs, whose numbers follow from their seeds."""
    storage.create(path, provenance, PRIORS)
    for run in runs:
        add(path, run)
    return path


def add(path: Path, run: Run) -> None:
    """Add a run whose numbers follow from its seed."""
    numbers = np.random.default_rng(run.seed)
    rows = {name: numbers.normal(size=shape) for name, shape in storage.shapes(PROVENANCE).items()}
    rows["delta/cosine"][:, 0] = np.nan
    with storage.adding(path) as addition:
        for key, (steps, shape) in PRIORS.items():
            for step in steps:
                addition.priors.add(key, step, 0, torch.from_numpy(numbers.normal(size=shape).astype(np.float32)))
        addition.write(storage.RunRecord(run, rows))


def assert_same(one: Path, two: Path) -> None:
    """Check that two profiles hold the same runs and rows bit for bit, and the same means but for rounding."""
    a, b = storage.load(one), storage.load(two)
    assert a.runs == b.runs
    assert storage.array_shapes(one) == storage.array_shapes(two)
    for name, values in a.arrays.items():
        assert np.array_equal(values, b.arrays[name], equal_nan=True), name
    for site in PRIORS:
        (steps, means), (others, means_too) = (storage.load_prior(file, site) for file in (one, two))
        assert steps == others
        np.testing.assert_allclose(means, means_too, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "p.h5", RUNS)


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(len(RUNS))), st.lists(st.integers(0, len(RUNS)), max_size=4), st.randoms())
def test_whatever_the_split_and_the_order_the_joined_profile_is_the_one_made_in_one_go(
    whole: Path, order: list[int], cuts: list[int], shuffled: Random
) -> None:
    with TemporaryDirectory() as folder:
        bounds = [0, *sorted(cuts), len(RUNS)]  # parts may be empty
        files = [
            write(Path(folder, f"{i}.h5"), [RUNS[k] for k in order[start:stop]])
            for i, (start, stop) in enumerate(pairwise(bounds))
        ]
        shuffled.shuffle(files)
        joined = Path(folder, "joined.h5")
        assert storage.merge(files, joined) == tuple(RUNS)
        assert_same(joined, whole)


def test_parts_can_be_joined_in_turns_and_into_one_of_them(tmp_path: Path, whole: Path) -> None:
    a, b, c = (write(tmp_path / name, RUNS[start::3]) for start, name in enumerate("abc"))
    storage.merge([c, a], a)
    storage.merge([b, a], a)
    assert_same(a, whole)
    storage.append(
        a, storage.RunRecord(Run("more", 9), {n: np.zeros(s) for n, s in storage.shapes(PROVENANCE).items()})
    )
    assert len(storage.load(a).runs) == 8


def test_a_file_whose_runs_are_all_in_another_adds_nothing(tmp_path: Path, whole: Path) -> None:
    part = write(tmp_path / "part.h5", RUNS[2:4])
    storage.merge([part, whole, whole], tmp_path / "joined.h5")  # as after a crash between joining and removing
    assert_same(tmp_path / "joined.h5", whole)


def test_means_of_runs_that_two_files_have_are_not_taken_apart(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.h5", RUNS[:4]), write(tmp_path / "two.h5", RUNS[3:])
    with pytest.raises(ProfileError, match=r"two\.h5 has 1 runs that another file has as well, and its priors are"):
        storage.merge([one, two], tmp_path / "joined.h5")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.h5", "two.h5"]


def test_other_numbers_of_the_same_run_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one.h5", [])
    other = write(tmp_path / "other.h5", [])
    for value, path in enumerate((one, other)):
        rows = {name: np.full(shape, value) for name, shape in storage.shapes(PROVENANCE).items()}
        storage.append(path, storage.RunRecord(RUNS[0], rows))
    with pytest.raises(
        ProfileError, match=r"run 'prompt 0' with seed 0 has other numbers in .*other\.h5 than in .*one"
    ):
        storage.merge([one, other], tmp_path / "joined.h5")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_wrong_in_one_of_the_files_is_told_of_that_one(tmp_path: Path, place: int) -> None:
    files = [write(tmp_path / f"{name}.h5", RUNS[i : i + 1]) for i, name in enumerate("abc")]
    name = next(iter(storage.shapes(PROVENANCE)))
    with h5py.File(files[place], "r+") as file:
        numbers = file[name]
        numbers.id.write_direct_chunk((0,) * numbers.ndim, b"no deflated numbers")
    with pytest.raises(ProfileError) as error:
        storage.merge(files, tmp_path / "joined.h5")
    assert str(error.value).startswith(f"{files[place]}: row 0 of its /{name} cannot be inflated")
    assert not any(str(file) in str(error.value) for file in files if file != files[place])
    with h5py.File(files[place], "r+") as file:
        file.move(name, f"{name}-elsewhere")
    with pytest.raises(ProfileError, match=rf"^{files[place]} cannot be read as a profile"):
        storage.merge(files, tmp_path / "joined.h5")


def test_counts_that_fit_no_means_are_refused(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.h5", RUNS[i : i + 1]) for i, name in enumerate("ab")]
    with h5py.File(files[1], "r+") as file:
        site = next(iter(file["priors"]))
        file["priors"][site].attrs["counts"] = np.ones(3, np.int64)
    with pytest.raises(ProfileError, match=rf"^{files[1]}: the prior of {site} is not of as many parts and steps"):
        storage.merge(files, tmp_path / "joined.h5")


def test_profiles_of_other_settings_are_refused_and_other_versions_are_not(tmp_path: Path) -> None:
    one = write(tmp_path / "one.h5", RUNS[:1])
    newer = write(tmp_path / "newer.h5", RUNS[1:2], replace(PROVENANCE, versions={"dicache": "0.2.0"}))
    assert len(storage.merge([one, newer], tmp_path / "joined.h5")) == 2
    other = write(tmp_path / "other.h5", RUNS[2:3], replace(PROVENANCE, settings={"guidance": 1.0}))
    before = one.read_bytes()
    with pytest.raises(
        ProfileError, match=r"other\.h5 cannot be joined with .*one\.h5: it was made with another settings"
    ):
        storage.merge([one, other], one)
    assert one.read_bytes() == before


def test_a_profile_that_was_extended_since_it_was_loaded_says_so(tmp_path: Path) -> None:
    first, second, *_ = storage.shapes(PROVENANCE)
    path = write(tmp_path / "p.h5", RUNS[1:4])
    profile = storage.load(path)
    assert len(profile.arrays[first]) == 3
    storage.merge([path, write(tmp_path / "other.h5", RUNS[:1])], path)
    with pytest.raises(ProfileError, match=r"p\.h5: runs were added to it since it was loaded; load it again"):
        profile.arrays[second]
    assert len(storage.load(path).arrays[second]) == 4


def test_runs_that_come_while_a_merge_waits_are_merged_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = write(tmp_path / "p.h5", RUNS[1:3]), write(tmp_path / "other.h5", RUNS[3:5])
    alone = writing.alone

    def later(output: Path) -> Any:
        monkeypatch.undo()
        storage.merge([path, write(tmp_path / "third.h5", RUNS[:1])], path)  # by another process, in the meantime
        return alone(output)

    monkeypatch.setattr(merging, "alone", later)
    storage.merge([path, other], path)
    assert_same(path, write(tmp_path / "whole.h5", RUNS[:5]))


def test_files_without_a_run_are_joined(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.h5", []) for name in "ab"]
    assert storage.merge(files, tmp_path / "joined.h5") == ()
    assert storage.load(tmp_path / "joined.h5").runs == ()
