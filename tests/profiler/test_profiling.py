import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dicache.models.sampling import Sampling
from dicache.profiler import ProfileError, storage
from dicache.profiler.profiling import profile_pipeline
from tests.tiny import dit, pipeline_of

SAMPLING = Sampling(steps=4, guidance=4.0)
CONDITIONS = ["1", "2", "3"]


def profiled(path: Path, conditions: list[str] = CONDITIONS, **options: Any) -> Path:
    return profile_pipeline(
        pipeline_of(dit), "tiny", path, conditions, sampling=SAMPLING, lags=2, progress=False, **options
    )


def test_a_profile_holds_every_run_and_where_it_came_from(tmp_path: Path) -> None:
    profile = storage.load(profiled(tmp_path / "p.h5"))
    assert [(run.prompt, run.seed, run.ok) for run in profile.runs] == [("1", 0, True), ("2", 1, True), ("3", 2, True)]
    assert profile.steps == 4
    assert profile.delta_cosine.shape == (3, 1, 4, 4)
    assert profile.sites["dot"].shape == (3, 1, 4, 8, 2)
    assert profile.teacache["output"].shape == (3, 1, 4, 2)
    assert profile.provenance.layout == "batched"
    assert profile.provenance.target.scheduler == "DDIMScheduler"
    assert profile.provenance.target.num_inference_steps == 4
    assert profile.provenance.target.latents == (4, 8, 8)
    assert profile.provenance.settings["guidance"] == 4.0
    assert np.isfinite(profile.delta_cosine[:, :, 1:]).all()


def test_the_names_in_the_file_are_the_contract(tmp_path: Path) -> None:
    shapes = storage.array_shapes(profiled(tmp_path / "p.h5"))
    sites = {f"/sites/{name}" for name in ("diff_l1", "abs_l1", "dot", "norm2")}
    teacache = {f"/teacache/{name}" for name in ("input", "residual", "body", "output")}
    assert set(shapes) == {"/runs/prompt", "/runs/seed", "/runs/status", "/delta/cosine", *sites, *teacache}


def test_similarity_is_one_for_equal_and_follows_from_the_stored_products(tmp_path: Path) -> None:
    profile = storage.load(profiled(tmp_path / "p.h5"))
    similarity = profile.similarity("attn", lag=2)
    dot, norm2 = (profile.sites[name][0, 0, :, 2, :] for name in ("dot", "norm2"))  # site 2 is 1.attn
    assert similarity[0, 0, 3, 1] == pytest.approx(dot[3, 1] / np.sqrt(norm2[3, 0] * norm2[1, 0]))
    assert np.isnan(similarity[0, 0, :2]).all()
    with pytest.raises(ProfileError, match="lag 3 was not measured"):
        profile.similarity("attn", lag=3)
    with pytest.raises(ProfileError, match="it has attn, mlp"):
        profile.similarity("cross_attn")


def test_a_profile_broken_off_goes_on_at_the_next_run_and_equals_an_undisturbed_one(tmp_path: Path) -> None:
    whole = storage.load(profiled(tmp_path / "whole.h5"))
    profiled(tmp_path / "part.h5", CONDITIONS[:1])
    part = storage.load(profiled(tmp_path / "part.h5", resume=True))
    assert part.runs == whole.runs
    assert np.array_equal(part.delta_cosine, whole.delta_cosine, equal_nan=True)
    for name, values in whole.sites.items():
        assert np.array_equal(part.sites[name], values, equal_nan=True), name


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = profiled(tmp_path / "p.h5", CONDITIONS[:1])
    before = path.read_bytes()
    with pytest.raises(ProfileError, match="exists, with 1 runs; pass --resume"):
        profiled(path)
    with pytest.raises(ProfileError, match="other prompts or seeds"):
        profiled(path, ["7", "8"], resume=True)
    pipeline = pipeline_of(dit)
    with pytest.raises(ProfileError, match="begun with another lags"):
        profile_pipeline(pipeline, "tiny", path, CONDITIONS, sampling=SAMPLING, lags=3, resume=True, progress=False)
    assert path.read_bytes() == before


def test_a_failed_run_is_kept_with_its_place_and_left_out(tmp_path: Path) -> None:
    path = profiled(tmp_path / "p.h5")
    pipeline = pipeline_of(dit)
    pipeline.transformer.transformer_blocks[2].ff.net[2].bias.data.fill_(torch.nan)
    with pytest.raises(ProfileError, match=r"every run failed at step 0 in 2\.mlp"):
        profile_pipeline(pipeline, "tiny", tmp_path / "bad.h5", ["1"], sampling=SAMPLING, progress=False)
    record = storage.RunRecord(
        replace(storage.header(path)[1][0], status="failed at step 1 in 0.attn"),
        {
            name: np.zeros(shape[1:])
            for name, shape in storage.array_shapes(path).items()
            if name[1:] in storage.DATASETS
        },
    )
    renamed = {name.lstrip("/"): value for name, value in record.arrays.items()}
    storage.append(path, storage.RunRecord(record.run, renamed))
    profile = storage.load(path)
    assert len(profile.runs) == 4
    assert len(profile.delta_cosine) == 3


def test_wrong_files_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="does not exist; make a profile"):
        storage.load(tmp_path / "nowhere.h5")
    path = profiled(tmp_path / "p.h5", CONDITIONS[:1])
    (tmp_path / "cut.h5").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ProfileError, match="cannot be read as a profile"):
        storage.load(tmp_path / "cut.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(ProfileError, match="not a profile: found format None"):
        storage.load(tmp_path / "other.h5")


def test_a_profile_killed_at_any_moment_can_be_read_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "killed.h5"
    script = (
        "import sys; from pathlib import Path; from tests.profiler.test_profiling import profiled;"
        "profiled(Path(sys.argv[1]), [str(i) for i in range(400)])"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)])
    deadline = time.monotonic() + 120
    while not path.exists() or len(storage.header(path)[1]) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = len(storage.header(path)[1])
    assert 3 <= done < 400
    finished = storage.load(profiled(path, [str(i) for i in range(done + 1)], resume=True))
    assert len(finished.runs) == done + 1
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []
