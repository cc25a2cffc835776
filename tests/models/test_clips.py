import inspect
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import LatteTransformer3DModel

from dicache.models import zoo
from dicache.models.judges import judges_of
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions, sample
from dicache.models.zoo import clip_data, clip_text, clips
from dicache.models.zoo.clip_data import Clip
from dicache.models.zoo.clip_judge import Judge, load_judge
from dicache.models.zoo.words import t5_tokenizer

FOLDER = zoo.folder("clips")
CAPTION = "a red circle moving right fast on a black background"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge(FOLDER)


def real(count: int, *, held_out: bool = True) -> tuple[np.ndarray, list[str]]:
    """Return real clips in [0, 1], shape (n, 8, 32, 32, 3), and their captions."""
    shown = [clip_data.clip_at(index, held_out=held_out) for index in range(count)]
    frames = clip_data.drawn(shown, seed=1).permute(0, 1, 3, 4, 2).numpy() / 255
    return frames, [clip.caption() for clip in shown]


def centres(clip: np.ndarray) -> np.ndarray:
    """Return x and y of the object in each frame, shape (8, 2), of a clip of shape (8, 32, 32, 3)."""
    away = np.abs(clip - clip[0, 0, 0]).sum(axis=3)
    weight = away / away.sum(axis=(1, 2), keepdims=True)
    rows, columns = np.mgrid[:32, :32] + 0.5
    return np.stack([(weight * columns).sum(axis=(1, 2)), (weight * rows).sum(axis=(1, 2))], axis=1)


def test_a_caption_is_read_back_as_the_clip_it_describes() -> None:
    clip = Clip("red", "circle", "right", "fast", "black")
    assert clip.caption() == CAPTION
    assert clip_data.parse(CAPTION) == clip
    assert clip_data.parse("A red circle moving right") == Clip("red", "circle", "right", None, None)
    assert clip_data.parse("a red circle standing still") == Clip("red", "circle", "still", None, None)
    for index in range(200):
        clip = clip_data.clip_at(index)
        assert clip_data.parse(clip.caption()) == clip


@pytest.mark.parametrize("caption", ["", "a dog", f"{CAPTION} at night", "a red circle standing still fast"])
def test_what_is_not_of_the_grammar_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="not of the grammar"):
        clip_data.parse(caption)


@pytest.mark.parametrize(
    ("motion", "step"),
    [
        ("moving right fast", (2.25, 0)),
        ("moving left slowly", (-0.75, 0)),
        ("moving up fast", (0, -2.25)),
        ("moving down slowly", (0, 0.75)),
        ("standing still", (0, 0)),
    ],
)
def test_an_object_moves_as_its_caption_says(motion: str, step: tuple[float, float]) -> None:
    for index in range(10):
        clip = clip_data.draw(clip_data.parse(f"a red circle {motion} on a black background"), index)
        moved = np.diff(centres(clip), axis=0)  # (7, 2)
        assert moved == pytest.approx(np.tile(step, (7, 1)), rel=0.15, abs=0.1)
        assert 3 < centres(clip).min() < centres(clip).max() < 29  # and stays in sight


def test_training_and_held_out_clips_share_no_combination() -> None:
    def combinations(held_out: bool) -> set[tuple[object, ...]]:
        seen = (clip_data.clip_at(index, held_out=held_out) for index in range(3000))
        return {(clip.colour, clip.shape, clip.direction, clip.speed) for clip in seen}

    assert not combinations(True) & combinations(False)
    held_out = clip_data.captions(clips.PROMPTS)
    assert len(set(held_out)) == clips.PROMPTS
    assert all(clip_data.parse(caption).held_out for caption in held_out)


def test_a_clip_follows_from_its_index_alone() -> None:
    few, _ = real(3)
    more, _ = real(9)
    assert np.array_equal(few, more[:3])


def test_every_word_of_the_grammar_is_one_token() -> None:
    tokenizer = t5_tokenizer(clip_text.WORDS)
    for caption in clip_data.captions(100):
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 1 <= clip_text.TOKENS
        assert tokenizer.unk_token_id not in ids


def test_the_judge_reads_held_out_clips(judge: Judge) -> None:
    frames, captions = real(400)
    assert min(judge.judge(frames, captions).shares().values()) >= 0.99


def test_the_judge_refuses_what_was_not_asked_for(judge: Judge) -> None:
    frames, captions = real(400)
    asked = [clip_data.parse(caption) for caption in captions]
    turn = {"left": "right", "right": "left", "up": "down", "down": "up", "still": "up"}
    turned = [Clip(c.colour, c.shape, turn[c.direction], c.speed, None).caption() for c in asked]
    verdict = judge.judge(frames, turned)
    assert verdict.direction.mean() < 0.01
    assert verdict.background.all()  # the captions do not say it
    moving = np.array([clip.direction != clip_data.STILL for clip in asked])
    assert judge.judge(frames[moving, ::-1], list(np.array(captions)[moving])).direction.mean() < 0.01  # backwards
    noise = np.random.default_rng(0).uniform(size=frames.shape)
    assert judge.frechet(noise) > 10 * judge.frechet(frames)


def test_the_unmodified_pipeline_loads_and_samples_the_folder_without_a_network() -> None:
    code = f"""
from diffusers import LattePipeline
pipeline = LattePipeline.from_pretrained({str(FOLDER)!r})
out = pipeline(
    "a red circle moving right", num_inference_steps=2, video_length=8, height=32, width=32, clean_caption=False
)
assert len(out.frames[0]) == 8 and out.frames[0][0].size == (32, 32), out.frames
"""
    closed = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **closed}, check=True, capture_output=True)


def test_the_model_is_as_large_and_as_small_as_promised() -> None:
    config = json.loads((FOLDER / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "LatteTransformer3DModel"
    assert config["num_layers"] >= 6
    assert config["video_length"] >= 8
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 6.5e6


def test_the_autoencoder_keeps_held_out_frames() -> None:
    pipeline = load("clips")
    frames, _ = real(40)
    batch = torch.from_numpy(frames).float().flatten(0, 1).permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(batch).latent_dist.mean
        decoded = pipeline.vae.decode(latents).sample.clamp(-1, 1)
    assert 10 * torch.log10(4 / (decoded - batch).square().mean()) > 31
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.25
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.25
    assert pipeline.vae.config.scaling_factor == 1.0


def test_the_default_conditions_are_captions_that_training_never_saw() -> None:
    conditions = default_conditions(load("clips"), 40)
    assert len(set(conditions)) == 40
    assert all(clip_data.parse(condition).held_out for condition in conditions)


def test_clips_show_and_move_what_their_captions_ask_for() -> None:
    pipeline = load("clips")
    conditions = default_conditions(pipeline, 24)
    frames = sample(pipeline, conditions, range(24), Sampling(steps=20).usual_for("clips"))
    assert frames.shape == (24, 8, 32, 32, 3)
    verdict = load_judge(FOLDER).judge(frames, conditions).shares()
    assert min(verdict["shape"], verdict["direction"]) >= 0.8
    assert judges_of("clips", pipeline, conditions)["accuracy"](frames) == verdict["everything"]


def test_a_clip_does_not_depend_on_its_batch() -> None:
    pipeline = load("clips")
    sampling = Sampling(steps=4)
    together = sample(pipeline, ["a blue square standing still", CAPTION], [5, 6], sampling)
    alone = sample(pipeline, [CAPTION], [6], sampling)
    assert np.allclose(together[1:], alone, atol=1e-3)


def test_zeros_among_the_tokens_change_nothing() -> None:
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        num_attention_heads=clips.HEADS,
        attention_head_dim=clips.HEAD_WIDTH,
        in_channels=4,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        cross_attention_dim=clips.HEADS * clips.HEAD_WIDTH,
        caption_channels=clip_text.WIDTH,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        attention_bias=True,
        video_length=2,
    ).eval()
    latents, text, t = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 5, clip_text.WIDTH), torch.tensor([500])
    text[..., 0] = 1.0
    padded = torch.cat([text, torch.zeros(1, 100, clip_text.WIDTH)], dim=1)

    def change() -> float:
        with torch.no_grad():
            short, long = (transformer(latents, t, encoder_hidden_states=tokens).sample for tokens in (text, padded))
        return float((short - long).abs().max())

    assert change() > 1e-2
    clips.hide_padding(transformer)
    assert change() < 1e-4


def test_a_model_folder_comes_with_its_card() -> None:
    card = (FOLDER / "README.md").read_text()
    for word in ("held-out", "minutes", "What it is not", "video_length=8"):
        assert word in card


def test_the_recipe_is_in_the_package() -> None:
    assert {"seed", "work", "steps"} <= set(inspect.signature(clips.train).parameters)
