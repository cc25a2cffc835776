"""The usual metrics: what they are given, and what is said where a package, weights or images are missing."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from dicache.evaluate import networks
from dicache.evaluate.networks import DISTANCES, SCORES, Request
from dicache.models.names import ModelError

IMAGES = np.random.default_rng(0).random((3, 16, 16, 3)).astype(np.float32)
REQUEST = Request(["a red fox", "a fox", "a red red fox"])


def installed(monkeypatch: pytest.MonkeyPatch, module: str, **classes: Any) -> None:
    made = ModuleType(module)
    vars(made).update(classes)
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module, made)


@pytest.mark.parametrize(("name", "table"), [("lpips", DISTANCES), ("fid", SCORES), ("is", SCORES)])
def test_a_missing_package_is_named_with_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, table: dict[str, Callable[..., Any]]
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ModelError, match=rf"{name}: .*`pip install 'dicache\[metrics\]'`") as raised:
        table[name](Request([], real=tmp_path))
    assert "\n" not in str(raised.value)


def test_weights_that_cannot_be_downloaded_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    installed(monkeypatch, "torchmetrics.image.lpip", LearnedPerceptualImagePatchSimilarity=offline)
    with pytest.raises(ModelError, match=r"lpips: the weights .* not on this machine.*Name or service") as raised:
        DISTANCES["lpips"](REQUEST)
    assert "\n" not in str(raised.value)


def test_lpips_is_given_pairs_between_minus_one_and_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def network(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        assert one.shape == two.shape == (1, 3, 16, 16)
        assert -1 <= one.min() < -0.9
        return (one - two).abs().mean()

    installed(monkeypatch, "torchmetrics.image.lpip", LearnedPerceptualImagePatchSimilarity=lambda net: network)
    found = DISTANCES["lpips"](REQUEST)(IMAGES, IMAGES[::-1])
    assert found == pytest.approx(2 * np.abs(IMAGES - IMAGES[::-1]).mean(axis=(1, 2, 3)), rel=1e-5)


def test_the_frechet_distance_keeps_the_real_images_from_one_set_to_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Metric:
        def __init__(self, **options: Any) -> None:
            assert options == {"feature": 2048, "normalize": True, "reset_real_features": False}
            self.real: list[torch.Tensor] = []
            self.made: list[torch.Tensor] = []

        def reset(self) -> None:
            self.made.clear()

        def update(self, picture: torch.Tensor, real: bool) -> None:
            assert picture.shape == (1, 3, 16, 16)
            (self.real if real else self.made).append(picture)

        def compute(self) -> float:
            assert len(self.real) == 2
            return float(len(self.made))

    installed(monkeypatch, "torchmetrics.image.fid", FrechetInceptionDistance=Metric)
    with pytest.raises(ModelError, match="pass their folder as --real"):
        SCORES["fid"](REQUEST)
    with pytest.raises(ModelError, match="has 0 images; needed a folder of real ones"):
        SCORES["fid"](Request([], real=tmp_path))
    for name in ("a.png", "b.jpg"):
        Image.fromarray((IMAGES[0] * 255).astype(np.uint8)).save(tmp_path / name)
    score = SCORES["fid"](Request([], real=tmp_path))
    assert score(IMAGES) == 3
    assert score(IMAGES[:2]) == 2


def test_the_inception_score_begins_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    metric = SimpleNamespace(reset=seen.clear, update=seen.append, compute=lambda: (torch.tensor(len(seen)), 0))
    installed(monkeypatch, "torchmetrics.image.inception", InceptionScore=lambda normalize: metric)
    score = SCORES["is"](REQUEST)
    assert [score(IMAGES), score(IMAGES[:1])] == [3, 1]


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A tiny CLIP with random weights, in a folder as the hub's."""
    words = ["a</w>", "red</w>", "fox</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=8)
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 5, "max_position_embeddings": 8, "bos_token_id": 3, "eos_token_id": 4}
    torch.manual_seed(0)
    vision = {**size, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)).save_pretrained(tmp_path)
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(pictures, tokenizer).save_pretrained(tmp_path)
    return tmp_path


def test_the_clip_score_is_the_cosine_of_each_image_and_its_own_prompt(
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = SCORES["clip"](Request(REQUEST.conditions, clip_model=str(clip_folder)))
    whole = score(IMAGES)
    each = [
        SCORES["clip"](Request([prompt], clip_model=str(clip_folder)))(IMAGES[i : i + 1])
        for i, prompt in enumerate(REQUEST.conditions)
    ]
    assert 0 <= whole <= 100
    assert whole == pytest.approx(np.mean(each), abs=1e-3)
    monkeypatch.setattr(networks, "BATCH", 2)
    assert score(IMAGES) == pytest.approx(whole, abs=1e-3)
    video = np.stack([IMAGES * 0, IMAGES, IMAGES * 0], axis=1)  # its middle frame is judged
    assert score(video) == pytest.approx(whole, abs=1e-3)


def test_a_clip_model_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="clip: the weights of its network are not on this machine") as raised:
        SCORES["clip"](Request(["a"], clip_model=str(tmp_path / "nowhere")))
    assert "\n" not in str(raised.value)
