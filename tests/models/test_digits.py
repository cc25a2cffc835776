import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline

from dicache.models import zoo
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions, sample
from dicache.models.zoo import digits, training
from dicache.models.zoo.judge import DigitJudge, Judge, load_judge, variety

FOLDER = zoo.folder("digits")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge(FOLDER)


def test_the_unmodified_pipeline_loads_and_samples_the_folder() -> None:
    pipeline = DiTPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.get_label_ids(["seven", "zero"]) == [7, 0]
    generator = torch.Generator().manual_seed(0)
    images = pipeline(class_labels=[7], num_inference_steps=2, generator=generator, output_type="np").images
    assert images.shape == (1, 32, 32, 3)


def test_the_model_is_as_large_and_as_small_as_promised() -> None:
    config = json.loads((FOLDER / "transformer" / "config.json").read_text())
    assert config["num_layers"] >= 12
    assert (config["sample_size"] // config["patch_size"]) ** 2 >= 64
    assert config["norm_type"] == "ada_norm_zero"
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors", ".md", ".png"}
    assert sum(file.stat().st_size for file in files) < 10e6


def test_the_judge_knows_held_out_digits(judge: Judge) -> None:
    _, held_out = digits.load()
    seen = judge.classify(held_out.images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())
    assert (seen == held_out.labels.numpy()).mean() >= 0.985


def test_the_judge_refuses_noise_and_other_digits(judge: Judge) -> None:
    train, _ = digits.load()
    images = train.images[:200].permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    labels = train.labels[:200].numpy()
    assert judge.accuracy(images, labels) > 0.98
    assert judge.accuracy(images, (labels + 1) % 10) < 0.02
    noise = np.random.default_rng(0).uniform(size=images.shape)
    assert judge.frechet(noise) > 10 * judge.frechet(images)


def test_variety_is_the_deviation_of_a_pixel_within_its_class() -> None:
    images = np.array([[[0.0]], [[1.0]], [[0.5]], [[0.5]]])
    assert variety(images, np.array([0, 0, 1, 1])) == pytest.approx(0.25)


@pytest.mark.parametrize(("guidance", "share"), [(4.0, 0.97), (1.5, 0.93)])
def test_samples_are_the_digits_that_were_asked_for(judge: Judge, guidance: float, share: float) -> None:
    pipeline = load("digits")
    conditions = default_conditions(pipeline, 60)
    labels = np.array([int(condition) for condition in conditions])
    images = sample(pipeline, conditions, range(60), Sampling(steps=20, guidance=guidance))
    assert judge.accuracy(images, labels) >= share
    if guidance == 1.5:
        assert variety(images.mean(axis=3), labels) >= 0.75 * judge.variety


def test_an_image_does_not_depend_on_its_batch() -> None:
    pipeline = load("digits")
    sampling = Sampling(steps=4)
    together = sample(pipeline, ["3", "8"], [5, 6], sampling)
    alone = sample(pipeline, ["8"], [6], sampling)
    assert np.allclose(together[1:], alone, atol=1e-4)


def test_a_training_goes_on_where_it_was_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    data, _ = digits.load()

    def trained(work: Path, *, break_off_after: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        judge = DigitJudge()
        batches: list[torch.Tensor] = []

        def loss(generator: torch.Generator) -> torch.Tensor:
            if len(batches) == break_off_after:
                raise KeyboardInterrupt
            batches.append(torch.randint(64, (8,), generator=generator))
            out: torch.Tensor = judge(data.images[batches[-1]]).square().mean()
            return out

        training.fit("judge", judge, loss, steps=6, learning_rate=1e-3, work=work, seed=0)
        return torch.cat([p.detach().flatten() for p in judge.parameters()])

    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    part.mkdir()
    want = trained(whole)
    with pytest.raises(KeyboardInterrupt):
        trained(part, break_off_after=4)
    assert torch.equal(trained(part), want)
    assert torch.equal(trained(part), want)  # one that is done is only loaded


def test_latents_are_normalised_inside_the_autoencoder() -> None:
    pipeline = load("digits")
    data, _ = digits.load()
    with torch.no_grad():
        latents = pipeline.vae.encode(digits.as_rgb(data.images[:500])).latent_dist.mean
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.2
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.2
    assert pipeline.vae.config.scaling_factor == 1.0


def test_the_recipe_is_in_the_package() -> None:
    assert {"seed", "work", "steps"} <= set(inspect.signature(digits.train).parameters)
