"""Runs that are made together, against the same runs made one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions
from dicache.profiler import ProfileError, storage
from dicache.profiler.batches import Batch
from dicache.profiler.profiling import profile_pipeline
from tests.profiler.test_profiling import profiled
from tests.tiny import dit, pipeline_of


class Kept:
    """Stands for a pass that keeps what it is given."""

    def __init__(self) -> None:
        self.given: Any = None

    def site(self, place: int, out: Any) -> None:
        self.given = out


def test_each_run_is_given_its_samples_of_both_halves() -> None:
    runs: Any = [Kept(), Kept(), Kept()]
    batch = Batch(runs, 6, torch.device("cpu"))
    samples = torch.arange(6.0)  # the unguided ones of the runs 0, 1 and 2, then the guided ones
    frames = torch.arange(12.0).reshape(12, 1)  # two rows a sample
    batch.site(0, [samples, frames, torch.tensor([[7.0]])])
    assert [run.given[0].tolist() for run in runs] == [[0, 3], [1, 4], [2, 5]]
    assert [run.given[1].flatten().tolist() for run in runs] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert [run.given[2].tolist() for run in runs] == [[[7]]] * 3  # the same for all
    with pytest.raises(ProfileError, match=r"a tensor of shape \(4, 2\) has no row for each of 6 samples"):
        batch.site(0, [torch.zeros(4, 2)])
    with pytest.raises(ProfileError, match=r"a batch of 4 for 3 runs.* take --batch 1"):
        Batch(runs, 4, torch.device("cpu"))


@pytest.mark.parametrize("model", ["digits", "scenes", "flow"])
def test_runs_made_together_have_the_numbers_of_single_ones(model: str, tmp_path: Path) -> None:
    pipeline = load(model, device="cpu")
    conditions = default_conditions(pipeline, 5)  # two alone, two together, one alone
    for batch in (1, 2):
        path = tmp_path / f"{batch}.h5"
        given: Any = {"sampling": Sampling(steps=4), "priors": True, "batch": batch, "progress": False}
        profile_pipeline(pipeline, model, path, conditions, **given)
    one, two = (storage.load(tmp_path / f"{batch}.h5") for batch in (1, 2))
    assert one.runs == two.runs
    assert one.provenance == two.provenance
    for name, values in one.arrays.items():
        size = np.nan_to_num(np.abs(values)).max()
        found = two.arrays[name]
        np.testing.assert_allclose(found, values, rtol=2e-3, atol=1e-5 * size, equal_nan=True, err_msg=name)
    for site in (one.anatomy.sites[0], one.anatomy.sites[-1]):
        (_, mean), (_, other) = (storage.load_prior(tmp_path / f"{batch}.h5", site) for batch in (1, 2))
        np.testing.assert_allclose(other, mean, rtol=1e-3, atol=1e-4 * np.abs(mean).max())


def test_a_model_that_makes_something_else_of_a_prompt_in_a_batch_is_refused(tmp_path: Path) -> None:
    """LattePipeline cuts a single prompt to its length, and pads several."""
    pipeline = load("clips", device="cpu")
    given: Any = {"sampling": Sampling(steps=4), "batch": 2, "progress": False}
    with pytest.raises(ProfileError, match=r"depends on the others in its batch.* Go on with --batch 1"):
        profile_pipeline(pipeline, "clips", tmp_path / "p.h5", default_conditions(pipeline, 3), **given)
    assert len(storage.header(tmp_path / "p.h5")[1]) == 2  # made alone


def test_a_run_that_fails_is_taken_out_of_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the class 2 an output is not finite."""
    pipeline = pipeline_of(dit)
    embedding = pipeline.transformer.transformer_blocks[2].norm1.emb.class_embedder.embedding_table
    embedding.weight.data[2] = torch.nan
    given: Any = {"sampling": Sampling(steps=4, guidance=4.0), "priors": True, "progress": False}
    for batch in (1, 3):
        profile_pipeline(
            pipeline, "tiny", tmp_path / f"{batch}.h5", ["1", "3", "4", "5", "2", "6"], batch=batch, **given
        )
    one, three = (storage.load(tmp_path / f"{batch}.h5") for batch in (1, 3))
    assert [run.ok for run in three.runs] == [True, True, True, True, False, True]
    assert one.runs == three.runs
    (_, mean), (_, other) = (storage.load_prior(tmp_path / f"{batch}.h5", "1.mlp") for batch in (1, 3))
    assert np.array_equal(mean, other)
    assert np.isfinite(mean).all()


def test_a_batched_profile_goes_on_one_by_one(tmp_path: Path) -> None:
    path = profiled(tmp_path / "p.h5", ["1", "2"], batch=2)
    conditions = [str(i) for i in range(1, 8)]
    profiled(path, conditions, batch=2, resume=True)
    whole = storage.load(profiled(tmp_path / "whole.h5", conditions))
    part = storage.load(path)
    assert part.runs == whole.runs
    np.testing.assert_allclose(part.delta_cosine, whole.delta_cosine, atol=1e-5)
