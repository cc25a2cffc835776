from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dicache.models.loading import load
from dicache.models.names import ModelError, find
from dicache.models.sampling import Sampling, class_id, default_conditions, read_conditions, sample
from tests.models.folders import PIPELINES
from tests.tiny import dit, pipeline_of


def test_a_bundled_model_a_short_name_a_hub_id_and_a_folder_are_found(tmp_path: Path) -> None:
    assert find("digits").bundled
    assert find("pixart").location == "PixArt-alpha/PixArt-XL-2-1024-MS"
    assert find("someone/some-model").name == "some-model"
    (tmp_path / "model_index.json").write_text("{}")
    assert find(str(tmp_path)).location == str(tmp_path)


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'pixert'; did you mean pixart\? Known are"):
        find("pixert")


def test_a_folder_without_an_index_a_file_and_a_folder_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without model_index\.json"):
        find(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match="is a file; needed the folder"):
        find(str(tmp_path / "model_index.json"))
    with pytest.raises(ModelError, match=r"there is no folder \./nothing"):
        find("./nothing")


def test_a_folder_that_diffusers_wrote_is_loaded(tmp_path: Path) -> None:
    pipeline_of(dit).save_pretrained(tmp_path)
    pipeline = load(str(tmp_path), scheduler="DPMSolverMultistep")
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert not pipeline.transformer.training


def test_a_truncated_model_an_unknown_dtype_and_scheduler_are_refused_in_one_line(tmp_path: Path) -> None:
    pipeline_of(dit).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="unknown dtype 'float8'"):
        load(str(tmp_path), dtype="float8")
    with pytest.raises(ModelError, match="scheduler 'Nothing' is unknown with DiTPipeline"):
        load(str(tmp_path), scheduler="Nothing")
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load") as error:
        load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_conditions_are_spread_over_the_classes() -> None:
    assert default_conditions(load("digits"), 12) == [str(i % 10) for i in range(12)]
    assert default_conditions(load("digits"), 5) == ["0", "2", "4", "6", "8"]


def test_a_class_is_known_by_number_and_by_name() -> None:
    pipeline = load("digits")
    assert class_id(pipeline, "seven") == class_id(pipeline, "7") == 7
    with pytest.raises(ModelError, match="unknown class 'ten'; needed one of zero, one"):
        class_id(pipeline, "ten")


def test_prompts_are_read_a_line_each(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red fox\n\n a lighthouse \n")
    assert read_conditions(file) == ["a red fox", "a lighthouse"]
    file.write_text("\n")
    with pytest.raises(ModelError, match="is empty"):
        read_conditions(file)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ModelError, match="is not text"):
        read_conditions(file)


def test_an_option_that_the_pipeline_does_not_take_is_refused() -> None:
    with pytest.raises(ModelError, match="DiTPipeline does not take height; found 64"):
        sample(load("digits"), ["1"], [0], Sampling(steps=2, height=64))
    with pytest.raises(ModelError, match="steps cannot be 0"):
        Sampling(steps=0)


def test_a_short_name_brings_how_the_model_is_usually_called() -> None:
    assert Sampling().usual_for("pixart") == Sampling(steps=20, guidance=4.5, height=1024, width=1024)
    schnell = Sampling(steps=8, guidance=0.0, height=1024, width=1024, text_tokens=256)
    assert Sampling(steps=8).usual_for("flux-schnell") == schnell
    assert Sampling(steps=8).usual_for("digits") == Sampling(steps=8)


def calls_of(kind: str, guidance: float | None) -> list[float | None]:
    """Return the guidance that the transformer was given in each call, of two prompts and one step."""
    pipeline = PIPELINES[kind]()
    pipeline.set_progress_bar_config(disable=True)
    calls: list[float | None] = []

    def called(module: nn.Module, args: Any, kwargs: Any) -> None:
        assert len(kwargs["hidden_states"]) == 2
        calls.append(None if kwargs["guidance"] is None else float(kwargs["guidance"][0]))

    pipeline.transformer.register_forward_pre_hook(called, with_kwargs=True)
    sample(pipeline, ["a fox", "a lake"], [0, 1], Sampling(steps=1, guidance=guidance))
    return calls


def test_guidance_is_an_input_of_a_distilled_model_and_a_second_pass_of_another() -> None:
    assert calls_of("flux", 2.5) == [2.5]
    assert calls_of("flux", None) == [3.5]  # the pipeline's own
    assert calls_of("flux-schnell", 2.5) == [None, None]
    assert calls_of("flux-schnell", 0.0) == [None]
    assert calls_of("flux-schnell", None) == [None]


def test_flux_is_asked_for_the_size_and_the_text_of_its_parts() -> None:
    pipeline = PIPELINES["flux"]()
    pipeline.tokenizer_2.model_max_length = 24
    known = Sampling().resolved(pipeline)
    assert (known.height, known.width, known.text_tokens) == (pipeline.vae.config.sample_size,) * 2 + (24,)
    assert Sampling(height=64, text_tokens=8).resolved(pipeline) == replace(known, height=64, text_tokens=8)
