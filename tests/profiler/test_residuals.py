"""What a profile says of its decision blocks, against what they really added."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from dicache.profiler import ProfileError, rings, storage
from dicache.profiler.profiles import RATES, RESIDUALS
from dicache.profiler.residuals import Residuals
from dicache.profiler.wanted import usual_decision_block
from tests.profiler.test_profiling import profiled
from tests.runtime.test_adacache import anatomy
from tests.tiny import anatomy_of, dit, flux, latte

LAGS, STEPS, FRAMES = 3, 6, 5


def streams(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a stream as it enters, in the middle, and as it leaves: (batch, frames * places, channels)."""
    entered, middle, left = torch.randn(3, 2, FRAMES * 4, 8, generator=torch.Generator().manual_seed(seed))
    return entered, middle, left


@pytest.mark.parametrize("chunk", [1, 700, 1 << 20])
@pytest.mark.parametrize("seen", [True, False])
def test_what_is_measured_is_what_was_added(monkeypatch: pytest.MonkeyPatch, chunk: int, seen: bool) -> None:
    monkeypatch.setattr(rings, "CACHED", chunk)
    measured = Residuals(LAGS, FRAMES)
    for seed in range(2 * STEPS):
        if seed == STEPS:
            measured.restart()  # a second run finds nothing of the first
        entered, middle, left = streams(seed)
        measured.add(seed % STEPS, entered, middle if seen else None, left, 2)
    found = measured.arrays({step: step for step in range(STEPS)}, STEPS)
    for place, kind in enumerate(RESIDUALS):
        if not seen and kind != "block":
            assert all(np.isnan(found[name][:, place]).all() for name in found)
            continue
        added = []
        for step in range(STEPS):
            entered, middle, left = (x.double() for x in streams(STEPS + step))
            start, stop = {"attn": (entered, middle), "rest": (middle, left), "block": (entered, left)}[kind]
            added.append(stop - start)
            assert found["abs_l1"][step, place] == pytest.approx(float(added[-1].abs().mean()), rel=1e-5)
            for lag in range(1, LAGS + 1):
                want = float((added[step] - added[step - lag]).abs().mean()) if lag <= step else np.nan
                assert found["diff_l1"][step, place, lag - 1] == pytest.approx(want, rel=1e-5, nan_ok=True)
            by_frame = added[step].unflatten(1, (FRAMES, 4))
            after, before = by_frame[:, 1:], by_frame[:, :-1]
            want = float((after - before).abs().sum() / (after.abs().sum() + before.abs().sum()))
            assert found["between_frames"][step, place] == pytest.approx(want, rel=1e-5)


def test_nothing_is_compared_across_a_gap_and_images_have_no_motion() -> None:
    measured = Residuals(LAGS, 0)
    for step in (0, 1, 4, 5):
        measured.add(step, *streams(step), 2)
    found = measured.arrays({0: 0, 1: 1, 4: 0, 5: 1}, STEPS)
    lags = np.isfinite(found["diff_l1"][:, 0]).sum(axis=1)
    assert lags.tolist() == [0, 1, 0, 0, 0, 1]
    assert np.isfinite(found["abs_l1"][:, 0]).tolist() == [True, True, False, False, True, True]
    assert np.isnan(found["between_frames"]).all()


def test_a_profile_measures_the_middle_block_or_those_asked_for(tmp_path: Path) -> None:
    profile = storage.load(profiled(tmp_path / "p.h5"))
    assert profile.provenance.decision_blocks == (1,)
    assert profile.arrays["motion/diff_l1"].shape == (3, 1, 4, 1, 3, RATES)
    changes = profile.residual_change(1, "attn")
    assert changes.shape == (3, 1, 4, RATES)
    diff, size = profile.arrays["motion/diff_l1"], profile.arrays["motion/abs_l1"]
    assert changes[0, 0, 3, 1] == diff[0, 0, 3, 0, 0, 1] / size[0, 0, 1, 0, 0]
    assert np.isfinite(changes).sum(axis=3)[0, 0].tolist() == [0, 1, 2, 3]
    assert profile.between_frames(1, "attn") is None
    with pytest.raises(ProfileError, match=r"but 1; take that, or profile again with --decision-blocks 2"):
        profile.residual_change(2, "attn")
    several = storage.load(profiled(tmp_path / "several.h5", decision_blocks=(3, 0)))
    assert several.provenance.decision_blocks == (0, 3)
    with pytest.raises(ProfileError, match="no block 4"):
        profiled(tmp_path / "none.h5", decision_blocks=(4,))


def test_the_usual_decision_block_is_the_middle_one_that_shows_its_attention() -> None:
    assert usual_decision_block(anatomy_of(dit)) == 1
    assert usual_decision_block(anatomy_of(flux)) == 1  # of the first three, which are double
    assert anatomy(latte).blocks[usual_decision_block(anatomy(latte))].path == "temporal_transformer_blocks"


def test_a_profile_of_before_is_read_and_says_what_it_lacks(tmp_path: Path) -> None:
    path = profiled(tmp_path / "p.h5")
    with h5py.File(path, "r+") as file:
        content = json.loads(file.attrs["provenance"])
        del content["decision_blocks"], file["motion"]
        for block in content["anatomy"]["blocks"]:
            del block["middle"]
        file.attrs["provenance"] = json.dumps(content)
    profile = storage.load(path)
    assert np.isfinite(profile.arrays["magnitude"][:, :, 1:]).all()
    with pytest.raises(ProfileError, match="profile again"):
        profile.residual_change(1, "attn")
    with pytest.raises(ProfileError, match=r"another .*decision_blocks"):
        profiled(path, ["1", "2", "3", "4"], resume=True)


def test_what_cannot_be_told_apart_is_said(tmp_path: Path) -> None:
    profile = storage.load(profiled(tmp_path / "p.h5"))
    blind = profile.provenance.anatomy.blocks[1]
    object.__setattr__(blind, "middle", "")
    try:
        assert np.isfinite(profile.residual_change(1, "block")[0, 0, 3, 0])
        with pytest.raises(ProfileError, match="Take the branch `block`"):
            profile.residual_change(1, "rest")
    finally:
        object.__setattr__(blind, "middle", "norm3")
