import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dicache.anatomy import survey
from dicache.models import zoo
from dicache.models.judges import judges_of
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions, guidance_argument, sample
from dicache.models.zoo import flow, flow_text, scene_data
from dicache.models.zoo.autoencoders import new_autoencoder
from dicache.models.zoo.scene_judge import load_judge
from dicache.models.zoo.scene_text import Reader
from dicache.models.zoo.words import tokenised

FOLDER = zoo.folder("flow")
CAPTION = "a small red circle above a large blue square on a striped background"


def test_every_word_of_the_grammar_is_one_token_of_clip() -> None:
    tokenizer = flow_text.tokenizer()
    for caption in scene_data.captions(100):
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= flow_text.LENGTH
        assert [tokenizer.decode(i) for i in ids[1:-1]] == caption.split()
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_other_words_fall_into_pieces() -> None:
    tokenizer = flow_text.tokenizer()
    assert tokenizer.tokenize("a dog") == ["a</w>", "do", "g</w>"]  # of dotted


def test_the_pooled_feature_is_that_of_the_end_and_sees_no_padding() -> None:
    torch.manual_seed(0)
    encoder = flow_text.PooledReader().encoder.eval()
    ids, _ = tokenised(flow_text.tokenizer(), [CAPTION, "a red circle"], flow_text.LENGTH)
    with torch.no_grad():
        out = encoder(input_ids=ids)
        short = encoder(input_ids=ids[1:, :5])
    ends = (ids == encoder.config.eos_token_id).int().argmax(dim=1)
    assert ends.tolist() == [14, 4]
    assert torch.equal(out.pooler_output, out.last_hidden_state[[0, 1], ends])
    assert torch.allclose(out.pooler_output[1:], short.pooler_output, atol=1e-5)


def test_the_recipe_trains_what_the_pipeline_calls(tmp_path: Path) -> None:
    """Latents, positions and times of the training are those that the unmodified pipeline gives the model."""
    torch.manual_seed(0)
    reader, pooled = Reader(width=flow.TEXT_WIDTH, masked=False).eval(), flow_text.PooledReader().eval()
    autoencoder = new_autoencoder((8, 8), 4, shift=0.0)
    transformer = flow.new_transformer().eval()
    flow.save(tmp_path, autoencoder, transformer, reader.encoder, pooled.encoder)
    pipeline = load(str(tmp_path), device="cpu")
    called: list[dict[str, torch.Tensor]] = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args, kwargs: called.append(kwargs), with_kwargs=True)
    sample(pipeline, [CAPTION], [0], Sampling(steps=2, guidance=2.0))
    cond, uncond = called[:2]
    features, pool = flow.encode_texts([CAPTION, ""], reader.encoder, pooled.encoder)
    assert torch.allclose(cond["encoder_hidden_states"], features[:1], atol=1e-5)
    assert torch.allclose(uncond["encoder_hidden_states"], features[1:], atol=1e-5)
    assert torch.allclose(cond["pooled_projections"], pool[:1], atol=1e-5)
    assert torch.allclose(uncond["pooled_projections"], pool[1:], atol=1e-5)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cond["hidden_states"], flow.packed(noise))
    places, no_places = flow.places(16, "cpu")
    assert torch.equal(cond["img_ids"], places)
    assert torch.equal(cond["txt_ids"], no_places)
    assert cond["timestep"].tolist() == [1.0]
    shifted = 3 * 0.5 / (1 + 2 * 0.5)  # the second of two steps
    assert called[2]["timestep"].item() == pytest.approx(shifted, abs=1e-3)


def test_a_folder_of_flow_is_judged_by_the_judge_of_scenes(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert judges_of(str(tmp_path), None, [CAPTION]) == {}
    (tmp_path / "judged_as.txt").write_text("scenes\n")
    judges = judges_of(str(tmp_path), None, [CAPTION])
    image = scene_data.draw(scene_data.parse(CAPTION), 0)[None]
    assert judges["accuracy"](image) == 1.0
    assert judges["accuracy"](1 - image) == 0.0


def test_the_survey_finds_the_double_and_the_single_blocks() -> None:
    anatomy = survey(flow.new_transformer().eval())
    kinds = [block.kind for block in anatomy.blocks]
    assert kinds == ["FluxTransformerBlock"] * 4 + ["FluxSingleTransformerBlock"] * 6


def test_the_unmodified_pipeline_loads_and_samples_the_folder_without_a_network() -> None:
    code = f"""
from diffusers import FluxPipeline
pipeline = FluxPipeline.from_pretrained({str(FOLDER)!r})
out = pipeline(
    {CAPTION!r}, negative_prompt="", true_cfg_scale=2.0, num_inference_steps=2, height=32, width=32,
    max_sequence_length=16, output_type="np",
)
assert out.images.shape == (1, 32, 32, 3), out.images.shape
"""
    closed = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **closed}, check=True, capture_output=True)


def test_the_model_is_as_large_and_as_small_as_promised() -> None:
    config = json.loads((FOLDER / "transformer" / "config.json").read_text())
    assert config["num_layers"] >= 4
    assert config["num_layers"] + config["num_single_layers"] >= 10
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 6.5e6


def test_pictures_show_what_their_captions_ask_for() -> None:
    pipeline = load("flow")
    conditions = default_conditions(pipeline, 24)
    assert all(scene_data.parse(condition).held_out for condition in conditions)
    images = sample(pipeline, conditions, range(24), Sampling().usual_for("flow"))
    assert images.shape == (24, 32, 32, 3)
    verdict = load_judge(zoo.folder("scenes")).judge(images, conditions).shares()
    assert judges_of("flow", pipeline, conditions)["accuracy"](images) == verdict["everything"]
    assert verdict.pop("everything") >= 0.7
    assert min(verdict.values()) >= 0.85


def test_a_picture_does_not_depend_on_its_batch() -> None:
    pipeline = load("flow")
    sampling = Sampling(steps=4, guidance=2.0)
    together = sample(pipeline, ["a blue square", CAPTION], [5, 6], sampling)
    assert np.allclose(together[1:], sample(pipeline, [CAPTION], [6], sampling), atol=1e-3)


def test_guidance_of_the_bundled_model_is_a_second_pass() -> None:
    pipeline = load("flow")
    assert guidance_argument(pipeline) == "true_cfg_scale"
    usual = Sampling().usual_for("flow").resolved(pipeline)
    assert (usual.height, usual.width, usual.text_tokens) == (32, 32, 16)
    assert usual.guidance is not None
    assert usual.guidance > 1


def test_a_model_folder_comes_with_its_card() -> None:
    card = (FOLDER / "README.md").read_text()
    for word in ("held-out", "minutes", "What it is not", "true_cfg_scale"):
        assert word in card


def test_the_recipe_is_in_the_package() -> None:
    assert "flow" in zoo.NAMES
    assert {"seed", "work", "steps"} <= set(inspect.signature(flow.train).parameters)
