"""The published models' classes, from folders, through the loading and sampling that the real ones go through."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dicache.models.folders import parameters
from dicache.models.loading import load
from dicache.models.names import HUB, ModelError
from dicache.models.sampling import Sampling, default_conditions, sample
from tests.models.folders import PIPELINES, SIZE, folder

TWO_STEPS = Sampling(steps=2, height=SIZE, width=SIZE)


def images(pipeline: Any, *, seed: int = 0, sampling: Sampling = TWO_STEPS) -> np.ndarray:
    if type(pipeline).__name__ == "DiTPipeline":
        sampling = Sampling(sampling.steps, sampling.guidance)
    [condition] = default_conditions(pipeline, 1)
    made: np.ndarray = sample(pipeline, [condition], [seed], sampling)
    return made


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_folder_is_loaded_and_sampled(kind: str) -> None:
    pipeline = load(str(folder(kind)))
    made = images(pipeline)
    assert made.shape == (1, SIZE, SIZE, 3)
    assert made.std() > 0.01
    assert np.array_equal(made, images(pipeline))
    assert not np.array_equal(made, images(pipeline, seed=1))
    assert type(pipeline.scheduler).__name__ == HUB[kind].sampler
    assert {type(part).__name__ for part in pipeline.components.values()} == {
        type(part).__name__ for part in PIPELINES[kind]().components.values()
    }
    assert not any(part.training for part in pipeline.components.values() if isinstance(part, torch.nn.Module))


@pytest.mark.parametrize("kind", ["pixart", "sd3", "flux"])
def test_the_prompt_matters_and_may_be_cut(kind: str) -> None:
    pipeline = load(str(folder(kind)))
    long = "a red fox in fresh snow"
    whole, other = (sample(pipeline, [text], [0], TWO_STEPS) for text in (long, "a blue fox in fresh snow"))
    assert not np.array_equal(whole, other)
    short = Sampling(steps=2, height=SIZE, width=SIZE, text_tokens=4)
    assert sample(pipeline, [long], [0], short).shape == whole.shape


@pytest.mark.parametrize("kind", ["dit", "sd3", "flux"])
def test_half_precision_is_sampled_to_the_same_kind_of_image(kind: str) -> None:
    pipeline = load(str(folder(kind)), dtype="bfloat16")
    assert pipeline.transformer.dtype == torch.bfloat16
    made = images(pipeline)
    assert made.dtype == np.float32
    assert np.abs(made - images(load(str(folder(kind))))).mean() < 0.05


def test_parameters_are_counted_from_the_headers() -> None:
    pipeline = load(str(folder("dit")))
    parts = (pipeline.transformer, pipeline.vae)
    assert parameters(folder("dit")) == sum(len(p.flatten()) for part in parts for p in part.parameters())


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_index_of_the_time_before_a_model_had_its_class_is_loaded(tmp_path: Path) -> None:
    there = shutil.copytree(folder("pixart"), tmp_path / "old")
    edit_json(there / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit_json(there / "transformer" / "config.json", _class_name="Transformer2DModel")
    pipeline = load(str(there))
    assert type(pipeline.transformer).__name__ == "PixArtTransformer2DModel"
    assert np.array_equal(images(pipeline), images(load(str(folder("pixart")))))


def pickle_weights(file: Path, pickled: str) -> None:
    torch.save(load_file(file), file.with_name(pickled))
    file.unlink()


def bring_code(there: Path, where: str, **changes: Any) -> None:
    edit_json(there / "model_index.json", **changes)
    (there / where).write_text("raise SystemExit('this was run')")


def drop_weight(file: Path, key: str) -> None:
    weights = load_file(file)
    del weights[key]
    save_file(weights, file)


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda there: pickle_weights(there / "transformer" / WEIGHTS, "diffusion_pytorch_model.bin"),
            r"transformer/diffusion_pytorch_model\.bin is no safetensors file.* convert it once: python -c",
        ),
        (
            lambda there: pickle_weights(there / "text_encoder" / "model.safetensors", "pytorch_model.bin"),
            r"text_encoder/pytorch_model\.bin is no safetensors file",
        ),
        (lambda there: (there / "vae" / WEIGHTS).unlink(), "vae holds no weights; needed safetensors files"),
        (lambda there: shutil.rmtree(there / "vae"), r"vae \(AutoencoderKL\) is missing"),
        (lambda there: (there / "tokenizer" / "tokenizer.json").unlink(), "tokenizer holds no vocabulary"),
        (
            lambda there: bring_code(there, "pipeline.py", _class_name=["pipeline", "Mine"]),
            r"its pipeline is \['pipeline', 'Mine'\], code that it brings along, which is never run here",
        ),
        (
            lambda there: bring_code(there, "transformer/mine.py", transformer=["mine", "Mine"]),
            r"its transformer is \['mine', 'Mine'\], code that it brings along",
        ),
        *(
            (lambda there, content=content: (there / "vae" / WEIGHTS).write_bytes(content), said)
            for content, said in (
                (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
                (b"\xff" * 16, "vae/diffusion_pytorch"),
                (b"\x02" + 7 * b"\0" + b"[]", "vae/diffusion_pytorch"),
            )
        ),
        (lambda there: (there / "model_index.json").write_text("{"), r"model_index\.json is not JSON"),
        (lambda there: (there / "model_index.json").write_text("{}"), r"model_index\.json names no pipeline"),
        (
            lambda there: edit_json(there / "model_index.json", _class_name="TomorrowPipeline"),
            "'TomorrowPipeline', which is no pipeline of the diffusers that is installed",
        ),
        (
            lambda there: edit_json(there / "model_index.json", vae=["diffusers", "TomorrowVAE"]),
            "has no class `TomorrowVAE`",
        ),
        (
            lambda there: drop_weight(there / "transformer" / WEIGHTS, "proj_out.weight"),
            r"not complete, proj_out\.weight is missing",
        ),
        (
            lambda there: drop_weight(there / "text_encoder" / "model.safetensors", "encoder.final_layer_norm.weight"),
            r"not complete, encoder\.final_layer_norm\.weight is missing",
        ),
    ],
)
def test_a_folder_that_cannot_be_trusted_or_is_not_whole_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    there = shutil.copytree(folder("pixart"), tmp_path / "model")
    change(there)
    with pytest.raises(ModelError, match=message) as error:
        load(str(there))
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_needs_sentencepiece_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicache.models.folders._importable", lambda module: module != "sentencepiece")
    there = shutil.copytree(folder("pixart"), tmp_path / "model")
    (there / "tokenizer" / "tokenizer.json").rename(there / "tokenizer" / "spiece.model")
    with pytest.raises(ModelError, match="is a SentencePiece model; to read it, `pip install sentencepiece`"):
        load(str(there))
