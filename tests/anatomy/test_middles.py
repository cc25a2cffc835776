"""The stream inside a block, as it was probed, against what the block's modules really make."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dicache.anatomy import Anatomy, AnatomyError, survey
from dicache.anatomy.signal import frames_of, motion_of
from tests.tiny import Build, anatomy_of, arguments, dit, flux, pixart, predict, sd3, sd35
from tests.toys import CHAINS, Chain, toy_inputs


@pytest.mark.parametrize(
    ("build", "middles"),
    [
        (dit, ("norm3",) * 4),
        (pixart, ("attn2",) * 3),
        (sd3, ("norm2",) * 3),
        (sd35, ("norm2",) * 3),
        (flux, ("norm2",) * 3 + ("",) * 2),
    ],
)
def test_the_middle_is_what_comes_behind_the_attention(build: Build, middles: tuple[str, ...]) -> None:
    anatomy = anatomy_of(build)
    assert tuple(block.middle for block in anatomy.blocks) == middles
    assert Anatomy.from_json(anatomy.to_json()) == anatomy


@pytest.mark.parametrize(
    ("chain", "middle"),
    [("plain", "norm2"), ("dual", "ff"), ("grid", "norm2"), ("inline", "norm2"), ("parallel", ""), ("fused", "")],
)
def test_where_branches_lie_side_by_side_there_is_no_middle(chain: str, middle: str) -> None:
    assert {block.middle for block in survey(Chain(**CHAINS[chain]), toy_inputs()).blocks} == {middle}


def test_a_stream_that_something_else_is_added_to_is_not_taken_for_the_attentions_share() -> None:
    assert survey(Chain(**CHAINS["long skip"]), toy_inputs()).blocks[-1].middle == ""


@pytest.mark.parametrize("build", [dit, pixart, sd3])
def test_the_difference_is_the_attentions_output_times_a_gate_of_each_channel(build: Build) -> None:
    model = build()
    block = anatomy_of(build).blocks[1]
    module = model.get_submodule(block.module)
    seen: dict[str, Tensor] = {}

    def given(name: str) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return look

    def made(_: nn.Module, __: Any, out: Any) -> None:
        seen["made"] = out[0] if isinstance(out, tuple) else out

    module.register_forward_pre_hook(given("entered"), with_kwargs=True)
    module.get_submodule(block.middle).register_forward_pre_hook(given("middle"), with_kwargs=True)
    module.get_submodule(block.sites[0].module).register_forward_hook(made)
    predict(model, arguments(model))
    added, out = seen["middle"] - seen["entered"], seen["made"]  # (batch, tokens, channels)
    gate = (added * out).sum(1, keepdim=True) / (out * out).sum(1, keepdim=True)
    assert torch.allclose(added, gate * out, atol=1e-5)
    assert not torch.allclose(gate, torch.ones_like(gate), atol=0.1)


class Patched(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = {"in_channels": 4, **config}


def test_frames_are_counted_on_their_axis_and_by_the_patches_they_share() -> None:
    assert frames_of(Patched(patch_size=2), (2, 4, 8, 16, 16)) == 8
    assert frames_of(Patched(patch_size=2), (2, 8, 4, 16, 16)) == 8  # CogVideoX
    assert frames_of(Patched(patch_size=(1, 2, 2)), (2, 4, 21, 16, 16)) == 21  # Wan
    assert frames_of(Patched(patch_size=2, patch_size_t=2), (2, 8, 4, 16, 16)) == 4
    assert frames_of(Patched(patch_size=2), (2, 4, 16, 16)) == 0


def test_motion_is_the_same_however_the_tokens_lie() -> None:
    clip = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))  # batch, frames, places, channels
    x = clip.double()
    apart = (x[:, 1:] - x[:, :-1]).abs().sum()
    want = float(apart / (x[:, 1:].abs().sum() + x[:, :-1].abs().sum()))
    for tokens in (clip.flatten(1, 2), clip.flatten(0, 1), clip.transpose(1, 2).flatten(0, 1)):
        one, two = motion_of(tokens, 3, 2)
        assert float(one / two) == pytest.approx(want)
    one, two = motion_of(torch.ones(2, 6, 4), 3, 2)
    assert float(one / two) == 0.0


@pytest.mark.parametrize(
    ("shape", "frames"),
    [((6, 3, 4), 3), ((2, 7, 4), 3), ((5, 6, 4), 3), ((2, 6, 4), 0), ((2, 3, 5, 4), 3)],
)
def test_tokens_whose_frames_cannot_be_told_are_refused(shape: tuple[int, ...], frames: int) -> None:
    with pytest.raises(AnatomyError, match=r"cannot be told; leave motion out"):
        motion_of(torch.ones(shape), frames, 2)
