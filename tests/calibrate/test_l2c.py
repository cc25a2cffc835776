"""Routers from files, and the plans that they give."""

import argparse
import os
import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dicache import apply
from dicache.anatomy import Anatomy
from dicache.calibrate import CalibrationError
from dicache.calibrate.l2c import LearningToCache, Router, load_checkpoint, read_router
from dicache.calibrate.methods import METHODS
from dicache.schedules import Schedule, Target
from tests.tiny import Build, anatomy_of, every_transformer, sample
from tests.toys import written

STEPS = 20
DEPTH = 28
# How many of the 56 logits of the even indices 0, 2, ..., 18 are below the threshold: as in the published router of 20
# steps at 0, 10, 16 and 18 and in all, elsewhere made up.
HELD = (0, 1, 5, 10, 16, 30, 34, 40, 56, 56)
NEVER_TRAINED = -4.0  # would be held, were it looked at


def published(file: Path, **changed: Any) -> Path:
    """Write a file as the released training does: logits are 3 and, from the last site on, -3."""
    routers = {f"{index}.prob": torch.full((2 * DEPTH,), NEVER_TRAINED) for index in range(STEPS)}
    for pair, held in enumerate(HELD):
        routers[f"{2 * pair}.prob"] = torch.tensor([3.0] * (2 * DEPTH - held) + [-3.0] * held)
    args = argparse.Namespace(model="DiT-XL/2", num_sampling_steps=STEPS, l1=5e-6, lr=0.001, ste_threshold=None)
    torch.save({"routers": routers, "opt": {"state": {}, "param_groups": []}, "args": args, **changed}, file)
    return file


def schedule_of(router: Router, threshold: float = 0.1, anatomy: Anatomy | None = None, **options: Any) -> Schedule:
    settings = {"target": Target(), "steps": router.steps, "model": "toy", **options}
    return LearningToCache(threshold).schedule(router, anatomy or written(DEPTH), **settings)


def test_a_published_file_gives_its_published_numbers(tmp_path: Path) -> None:
    router = read_router(published(tmp_path / "DDIM20_router.pt"))
    assert (router.steps, router.sites, router.target) == (STEPS, None, Target())
    schedule = schedule_of(router)
    rows = schedule.table()
    computed = [sum(row[step] == "C" for row in rows.values()) for step in range(STEPS)]
    assert computed[0::2] == [56] * 10  # the steps of the odd indices, whatever their routers say
    assert computed[1::2] == [56 - held for held in reversed(HELD)]  # index 18 is step 1, index 0 is step 19
    assert sum(computed[1::2]) == 312
    assert schedule.measured["held"] == 248
    assert schedule.measured["held_share"] == pytest.approx(0.221, abs=5e-4)
    assert schedule.measured["penalty"] == 5e-6
    assert schedule.measured["learning_rate"] == 0.001
    assert schedule.measured["router"] == "DDIM20_router.pt"
    # Index 10, step 9: the last 30 of attention and MLP in turn, that is blocks 13 to 27.
    assert [rows["12.mlp"][9], rows["13.attn"][9], rows["13.mlp"][9]] == ["C", "R", "R"]
    # Index 2, step 17: the MLP of the last block alone.
    assert [key for key, row in rows.items() if row[17] == "R"] == ["27.mlp"]
    assert METHODS["l2c"] is LearningToCache


def test_a_site_is_computed_where_beta_exceeds_the_threshold() -> None:
    logits = np.array(
        [[0.0, -2.0, 0.5, -5.0], [5.0, 5.0, 5.0, -1.0]]
    )  # betas 0.5, 0.119, 0.622, 0.0067; the last 0.269
    router = Router(logits, None, Target(), {})

    def letters(threshold: float) -> list[str]:
        return list(schedule_of(router, threshold, written(2)).table().values())

    assert letters(0.1) == ["CCCC", "CCCC", "CCCC", "CRCC"]
    assert letters(0.2) == ["CCCC", "CRCC", "CCCC", "CRCC"]
    assert letters(0.5) == ["CRCC", "CRCC", "CCCC", "CRCR"]  # 0.5 does not exceed 0.5
    assert set(letters(0.0)) == {"CCCC"}
    assert set(letters(1.0)) == {"CRCR"}


@every_transformer
def test_any_mask_can_be_written_and_is_what_is_replayed(build: Build) -> None:
    anatomy = anatomy_of(build)
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(2, len(anatomy.sites)))
    schedule = schedule_of(Router(logits, anatomy.sites, Target(), {}), 0.5, anatomy)
    rows = schedule.table()
    for place, key in enumerate(anatomy.sites):
        assert rows[key] == f"C{'CR'[int(logits[0, place] <= 0)]}C{'CR'[int(logits[1, place] <= 0)]}"
    assert Schedule.from_json(schedule.to_json()).table() == rows
    model = build()
    ran: list[list[str]] = []

    def note(key: str, *_: object) -> None:
        ran[-1].append(key)

    for block in anatomy.blocks:
        for site in block.sites:
            # A matrix inside of it runs when it is computed, and only then.
            pieces = [model.get_submodule(f"{block.module}.{path}") for path in site.modules]
            inside = [part for piece in pieces for part in piece.modules() if part not in pieces]
            matrix = next(part for part in inside if isinstance(part, nn.Linear))
            matrix.register_forward_hook(partial(note, block.key(site)))
    with apply(model, schedule) as cache:
        model.register_forward_pre_hook(lambda *_: ran.append([]))
        sample(model, cache)
        letters = [row[step] for row in rows.values() for step in range(4)]
        assert cache.stats.computed_sites == letters.count("C")
        assert cache.stats.reused_sites == letters.count("R")
    assert [set(step) for step in ran] == [{key for key, row in rows.items() if row[i] == "C"} for i in range(4)]


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


def changed(file: Path, change: Mapping[str, Any]) -> Path:
    content = torch.load(file, weights_only=False)
    for key, value in change.items():
        if value is None:
            del content["routers"][key]
        else:
            content["routers"][key] = value
    torch.save(content, file)
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"4.prob": torch.tensor([1.0, np.nan] * DEPTH)}, r"logit 1 of 4\.prob is nan, needed a finite number"),
        ({"0.prob": torch.full((56,), np.inf)}, r"logit 0 of 0\.prob is inf"),
        ({"19.prob": None}, "holds routers of 19 steps, but these go in pairs"),
        ({"7.prob": None}, r"must be 0\.prob, 1\.prob, \.\.\., one a step, found 0\.prob"),
        ({"weight": torch.zeros(3)}, "21 in all"),
        ({"2.prob": torch.zeros(54)}, "not one row of logits each, all of one length"),
        ({"2.prob": torch.zeros(2, 28)}, "not one row of logits each"),
        ({"2.prob": "text"}, "not one row of logits each"),
    ],
)
def test_routers_that_are_broken_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_router(changed(published(tmp_path / "r.pt"), change))


def test_what_was_never_trained_may_be_anything(tmp_path: Path) -> None:
    router = read_router(changed(published(tmp_path / "r.pt"), {"3.prob": torch.full((7,), np.nan)}))
    assert router.logits.shape == (10, 56)


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("routers", "opt", "args"):
        file = published(tmp_path / "r.pt", **{part: Harmful()})
        with pytest.raises(CalibrationError, match=r"r\.pt holds posix\.system, which is neither a tensor nor a plain"):
            read_router(file)
    namespace = argparse.Namespace(l1=Harmful())
    with pytest.raises(CalibrationError, match="was not loaded"):
        read_router(published(tmp_path / "r.pt", args=namespace))
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(CalibrationError, match="is no torch checkpoint"):
        read_router(tmp_path / "pickle.pt")
    assert not (tmp_path / "harmed").exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # nor is it allowed to others afterwards


def test_a_file_that_is_missing_cut_off_or_something_else_is_refused(tmp_path: Path) -> None:
    whole = published(tmp_path / "r.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"model": {}}, tmp_path / "model.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name, message in [
        ("nowhere.pt", "does not exist; needed a file of routers, or --train"),
        (".", "is a folder"),
        ("cut.pt", "is no torch checkpoint, or was cut off"),
        ("empty.pt", "is no torch checkpoint, or was cut off"),
        ("model.pt", "holds model, needed args, opt, routers"),
        ("tensor.pt", "holds Tensor, needed args, opt, routers"),
    ]:
        with pytest.raises(CalibrationError, match=message) as caught:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_router_of_another_model_or_step_count_is_refused(tmp_path: Path) -> None:
    router = read_router(published(tmp_path / "r.pt"))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"steps": 50}, "the router is for 20 steps, the schedule for 50"),
        ({"steps": 19}, "an even number of them, 2 or more, found 19; sample in 20 steps"),
        ({"steps": 0}, "found 0; sample in 2 steps"),
        ({"anatomy": written(12)}, r"for 28 blocks \(56 logits a step\), but this Toy has 12"),
    ]
    for options, message in wrong:
        with pytest.raises(CalibrationError, match=message):
            schedule_of(router, **options)
    ours = Router(np.zeros((1, 4)), written(2).sites, Target(weights="beef"), {})
    with pytest.raises(CalibrationError, match="for 2 blocks with 4 branches, but this Toy has 3 with 6"):
        schedule_of(ours, anatomy=written(3))
    with pytest.raises(CalibrationError, match="trained for weights beef, found fa7a"):
        schedule_of(ours, anatomy=written(2), target=Target(weights="fa7a"))


@every_transformer
def test_the_published_layout_is_only_taken_where_blocks_are_an_attention_and_an_mlp(build: Build) -> None:
    anatomy = anatomy_of(build)
    router = Router(np.zeros((2, len(anatomy.sites))), None, Target(), {})
    if build.__name__ == "dit":
        schedule_of(router, anatomy=anatomy)
        return
    with pytest.raises(CalibrationError, match="for blocks of an attention and an MLP, but block 0 of this"):
        schedule_of(router, anatomy=anatomy)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_is_from_0_to_1(threshold: float) -> None:
    with pytest.raises(CalibrationError, match=r"the threshold must be from 0 \(all is computed\) to 1, found"):
        LearningToCache(threshold)
