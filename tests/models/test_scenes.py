import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline

from dicache.models import zoo
from dicache.models.judges import judges_of
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions, sample
from dicache.models.zoo import scene_data, scene_text, scenes
from dicache.models.zoo.scene_data import Item, Scene
from dicache.models.zoo.scene_judge import Judge, SceneJudge, as_input, load_judge
from dicache.models.zoo.words import t5_tokenizer

FOLDER = zoo.folder("scenes")
CAPTION = "a small red circle above a large blue square on a striped background"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge(FOLDER)


def real(count: int, *, held_out: bool = True) -> tuple[np.ndarray, list[Scene]]:
    """Return real images in [0, 1], shape (n, 32, 32, 3), and what they show."""
    shown = [scene_data.scene_at(index, held_out=held_out) for index in range(count)]
    return scene_data.drawn(shown, seed=1).permute(0, 2, 3, 1).numpy() / 2 + 0.5, shown


def test_a_caption_is_read_back_as_the_scene_it_describes() -> None:
    small_red_circle, large_blue_square = Item("small", "red", "circle"), Item("large", "blue", "square")
    scene = Scene(small_red_circle, "above", large_blue_square, "striped")
    assert scene.caption() == CAPTION
    assert scene_data.parse(CAPTION) == scene
    assert scene_data.parse("A red circle") == Scene(Item(None, "red", "circle"), None, None, None)
    for index in range(200):
        scene = scene_data.scene_at(index)
        assert scene_data.parse(scene.caption()) == scene


@pytest.mark.parametrize("caption", ["", "a dog", f"{CAPTION} at night", "a red circle above", "red circle"])
def test_what_is_not_of_the_grammar_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="not of the grammar"):
        scene_data.parse(caption)


def test_prompts_that_the_judge_cannot_read_have_no_accuracy() -> None:
    pipeline = load("scenes")
    assert set(judges_of("scenes", pipeline, [CAPTION])) == {"accuracy"}
    assert set(judges_of("scenes", pipeline, [CAPTION] * 128)) == {"accuracy", "frechet"}
    assert set(judges_of("scenes", pipeline, [CAPTION, "a dog"])) == set()


def test_below_is_above_the_other_way_round() -> None:
    one, two = Item("small", "red", "circle"), Item("large", "blue", "square")
    above, below = Scene(one, "above", two, "plain"), Scene(two, "below", one, "plain")
    assert above.slots == below.slots == (one, two)
    assert above.layout == below.layout == "vertical"
    assert above.held_out == below.held_out
    assert (above.places, below.places) == (("top", "bottom"), ("bottom", "top"))


def test_training_and_held_out_scenes_share_no_combination() -> None:
    def combinations(held_out: bool) -> set[frozenset[object]]:
        return {
            frozenset(scene.slots) if scene.second else frozenset({scene.first, scene.background})
            for scene in (scene_data.scene_at(index, held_out=held_out) for index in range(3000))
        }

    assert not combinations(True) & combinations(False)


def test_a_scene_follows_from_its_index_alone() -> None:
    few, _ = real(3)
    more, _ = real(9)
    assert np.array_equal(few, more[:3])
    assert scene_data.captions(9)[:3] == scene_data.captions(3)


def test_a_red_circle_above_a_blue_square_is_drawn_so() -> None:
    image = scene_data.draw(scene_data.parse(CAPTION), 0)
    red, blue = image[8, 16], image[23, 16]  # within two pixels of the objects' centres
    assert red[0] > 0.75 > 0.25 > red[2]
    assert blue[2] > 0.75 > 0.25 > blue[0]
    assert image[4, 1] == pytest.approx(image[28, 1])  # a stripe
    assert abs(image[4, 1] - image[4, 5]).min() > 0.2  # and the next


def test_shapes_cover_their_area() -> None:
    areas = {shape: scene_data.coverage(shape, 16, 16, 7).sum() for shape in scene_data.SHAPES}
    assert areas["circle"] == pytest.approx(np.pi * 7**2, rel=0.01)
    assert areas["square"] == pytest.approx((2 * 0.88 * 7) ** 2, rel=0.01)
    assert areas["cross"] == pytest.approx(2 * 14 * 0.68 * 7 - (0.68 * 7) ** 2, rel=0.01)


def test_every_word_of_the_grammar_is_one_token() -> None:
    tokenizer = t5_tokenizer(scene_text.WORDS)
    for caption in scene_data.captions(100):
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 1 <= scene_text.TOKENS
        assert tokenizer.unk_token_id not in ids


def test_a_token_is_taught_the_place_of_its_own_object() -> None:
    below = "a red circle below a large blue square"
    own = scene_text.own_classes([scene_data.parse(below)])
    top, bottom = scene_data.PLACES.index("top"), scene_data.PLACES.index("bottom")
    assert own["place"][0].tolist() == [bottom] * 3 + [-1] + [top] * 4 + [-1] * 8
    assert own["size"][0].tolist() == [-1] * 4 + [1] * 4 + [-1] * 8  # the first one's size is not said


def test_the_judge_reads_held_out_scenes(judge: Judge) -> None:
    images, shown = real(400)
    verdict = judge.judge(images, [scene.caption() for scene in shown])
    assert min(verdict.shares().values()) >= 0.99


def test_the_judge_refuses_what_was_not_asked_for(judge: Judge) -> None:
    images, shown = real(400)
    two = [index for index, scene in enumerate(shown) if scene.second and scene.first != scene.second]
    exchanged = [Scene(shown[i].second or shown[i].first, shown[i].relation, shown[i].first, None) for i in two]
    verdict = judge.judge(images[two], [scene.caption() for scene in exchanged])
    assert verdict.relation.mean() < 0.01
    assert verdict.background.all()  # the captions do not say it
    noise = np.random.default_rng(0).uniform(size=images.shape)
    assert judge.frechet(noise) > 10 * judge.frechet(images)


def test_normalised_features_have_a_deviation_of_one_and_the_same_logits() -> None:
    images, _ = real(100)
    batch = as_input(images)
    network = SceneJudge()
    with torch.no_grad():
        before = network(batch)
        network.normalise(batch)
        after = network(batch)
        assert torch.allclose(network.embed(batch).std(dim=0), torch.ones(128), atol=1e-3)
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)


def test_an_attribute_that_a_caption_leaves_open_is_right(judge: Judge) -> None:
    images, shown = real(50)
    captions = [scene.caption(sizes=False, background=False) for scene in shown]
    assert judge.accuracy(images, captions) >= 0.98


def test_the_unmodified_pipeline_loads_and_samples_the_folder_without_a_network() -> None:
    code = f"""
import torch
from diffusers import PixArtAlphaPipeline
pipeline = PixArtAlphaPipeline.from_pretrained({str(FOLDER)!r})
out = pipeline({CAPTION!r}, num_inference_steps=2, use_resolution_binning=False, clean_caption=False, output_type="np")
assert out.images.shape == (1, 32, 32, 3), out.images.shape
"""
    closed = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **closed}, check=True, capture_output=True)


def test_the_model_is_as_large_and_as_small_as_promised() -> None:
    config = json.loads((FOLDER / "transformer" / "config.json").read_text())
    assert config["num_layers"] >= 12
    assert (config["sample_size"] // config["patch_size"]) ** 2 >= 64
    assert config["norm_type"] == "ada_norm_single"
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 11e6


def test_the_autoencoder_keeps_held_out_scenes() -> None:
    pipeline = load("scenes")
    images, _ = real(200)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(batch).latent_dist.mean
        decoded = pipeline.vae.decode(latents).sample.clamp(-1, 1)
    assert 10 * torch.log10(4 / (decoded - batch).square().mean()) > 33
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.2
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.2
    assert pipeline.vae.config.scaling_factor == 1.0


def test_the_default_conditions_are_captions_that_training_never_saw() -> None:
    conditions = default_conditions(load("scenes"), 40)
    assert len(set(conditions)) == 40
    assert all(scene_data.parse(condition).held_out for condition in conditions)


def test_pictures_show_what_their_captions_ask_for() -> None:
    pipeline = load("scenes")
    conditions = default_conditions(pipeline, 24)
    images = sample(pipeline, conditions, range(24), Sampling())
    verdict = load_judge(FOLDER).judge(images, conditions).shares()
    assert verdict.pop("everything") >= 0.70
    assert min(verdict.values()) >= 0.85
    assert judges_of("scenes", pipeline, conditions)["accuracy"](images) >= 0.70


def test_text_tokens_of_padding_change_nothing() -> None:
    pipeline = PixArtAlphaPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)

    def image(tokens: int) -> np.ndarray:
        return np.asarray(
            pipeline(
                CAPTION,
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(0),
                max_sequence_length=tokens,
                use_resolution_binning=False,
                clean_caption=False,
                output_type="np",
            ).images
        )

    assert np.allclose(image(scene_text.TOKENS), image(120), atol=1e-4)


def test_a_model_folder_comes_with_its_card() -> None:
    card = (FOLDER / "README.md").read_text()
    for word in ("held-out", "minutes", "What it is not"):
        assert word in card


def test_the_recipe_is_in_the_package(tmp_path: Path) -> None:
    assert {"seed", "work", "steps"} <= set(inspect.signature(scenes.train).parameters)
