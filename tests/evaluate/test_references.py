from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dicache.anatomy import survey
from dicache.evaluate.evaluation import evaluate
from dicache.evaluate.references import Trajectory, key_of, latent_error, read, write
from dicache.models.loading import load
from dicache.models.sampling import Sampling
from dicache.schedules import Plan, Rule, Schedule, Target

SAMPLING = Sampling(steps=4, guidance=4.0)


def test_the_error_of_latents_is_relative_to_their_length_at_each_step() -> None:
    reference = np.array([[[3.0, 4.0], [0.0, 2.0]]])  # one image, two steps
    latents = reference + np.array([[[0.5, 0.0], [0.0, 1.0]]])
    assert latent_error(latents, reference) == pytest.approx([0.1, 0.5])


def test_a_kept_run_is_read_again_and_a_broken_one_is_made_again(tmp_path: Path) -> None:
    made = Trajectory(np.ones((1, 2, 2, 3), np.float32), np.zeros((1, 4, 5), np.float16))
    write(tmp_path, "key", made)
    kept = read(tmp_path, "key")
    assert kept is not None
    assert np.array_equal(kept.images, made.images)
    assert np.array_equal(kept.latents, made.latents)
    file = tmp_path / "key.npz"
    file.write_bytes(file.read_bytes()[:100])
    assert read(tmp_path, "key") is None
    assert read(tmp_path, "other") is None


def test_the_key_changes_with_all_that_decides_the_images() -> None:
    pipeline = load("digits")
    key = key_of(pipeline, ["1"], [0], SAMPLING)
    assert key == key_of(load("digits"), ["1"], [0], SAMPLING)
    others = [
        key_of(pipeline, ["2"], [0], SAMPLING),
        key_of(pipeline, ["1"], [1], SAMPLING),
        key_of(pipeline, ["1"], [0], replace(SAMPLING, guidance=1.5)),
        key_of(load("digits", scheduler="DPMSolverMultistep"), ["1"], [0], SAMPLING),
    ]
    pipeline.transformer.proj_out_2.bias.data += 1
    others.append(key_of(pipeline, ["1"], [0], SAMPLING))
    pipeline.vae.register_to_config(scaling_factor=2.0)
    others.append(key_of(pipeline, ["1"], [0], SAMPLING))
    assert len({key, *others}) == 7


def test_an_evaluation_uses_the_kept_run_and_tells_the_error_of_each_step(tmp_path: Path) -> None:
    pipeline = load("digits")
    anatomy = survey(pipeline.transformer)
    schedules = [("x", Schedule("x", {}, anatomy, Target(), 4, Plan(4, (Rule("skip", "CC.C"),))))]

    def run() -> tuple[np.ndarray, tuple[float, ...]]:
        uncached, [result], _ = evaluate(
            pipeline,
            schedules,
            ["1"],
            sampling=SAMPLING,
            fewer_steps=False,
            timing_rounds=0,
            references=tmp_path,
            progress=False,
        )
        return uncached.images, result.latent_error

    images, error = run()
    assert error[:2] == (0.0, 0.0)  # nothing is left out before step 2
    assert min(error[2:]) > 0
    [file] = tmp_path.iterdir()
    kept = read(tmp_path, file.stem)
    assert kept is not None
    write(tmp_path, file.stem, Trajectory(kept.images * 0.5, kept.latents))
    assert np.array_equal(run()[0], images * 0.5)
