"""Anatomies written by hand, of models that are not from diffusers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dicache.anatomy import Anatomy, AnatomyError, Inputs, describe, survey
from dicache.conformance import LAWS, Subject
from tests.tiny import randomised
from tests.toys import Chain, DualBlock, SharedBlock, toy_inputs


class Mixer(nn.Module):
    """Self-attention, under a name that does not say so."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        out: Tensor = self.proj(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))
        return out


class DiTBlock(nn.Module):
    """A block with adaLN-Zero, as in the first DiT."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.attn = Mixer(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        out: Tensor = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return out


class DiT(nn.Module):
    """Patches of a picture, a timestep and a class."""

    def __init__(self, dim: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(4, dim, kernel_size=2, stride=2)
        self.t_embedder, self.y_embedder = nn.Linear(1, dim), nn.Embedding(10, dim)
        self.blocks = nn.ModuleList(DiTBlock(dim) for _ in range(depth))
        self.final = nn.Linear(dim, 2 * 2 * 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        patches = self.x_embedder(x)
        c = self.t_embedder(t[:, None] / 1000) + self.y_embedder(y)
        tokens = patches.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, c)
        return nn.functional.pixel_shuffle(self.final(tokens).transpose(1, 2).unflatten(2, patches.shape[2:]), 2)


def plain_dit() -> tuple[nn.Module, Inputs]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    return randomised(DiT()), Inputs((x, torch.tensor([500.0, 500.0]), torch.tensor([1, 2])), {})


def described(**options: Any) -> Anatomy:
    model, inputs = plain_dit()
    return describe(model, inputs, **{"blocks": {"blocks": {"attn": "attn", "mlp": "mlp"}}, **options})


def test_a_model_whose_classes_say_nothing_is_refused_by_the_survey_and_points_to_a_description() -> None:
    with pytest.raises(AnatomyError, match=r"found no transformer blocks.*dicache\.anatomy\.describe"):
        survey(*plain_dit())


def test_a_description_says_where_the_branches_are_and_the_rest_is_measured() -> None:
    anatomy = described()
    assert anatomy.segments == ((0, 3),)
    assert anatomy.latents == (4, 8, 8)
    for block in anatomy.blocks:
        assert (block.returns, block.middle) == ("x", "norm2")
        assert block.norms == {"norm1": ("attn",), "norm2": ("mlp",)}
        # Batch 2, 16 tokens, width 16: four matrices and two products of 16 x 16; to 64 and back.
        assert [site.macs for site in block.sites] == [2 * 16 * (4 * 16 * 16 + 2 * 16 * 16), 2 * 16 * 2 * 16 * 64]


@pytest.mark.parametrize("law", LAWS)
def test_every_law_holds_with_a_description(law: str) -> None:
    model, inputs = plain_dit()
    assert LAWS[law](Subject(model, inputs, described(), thorough=True)) > 0


@pytest.mark.parametrize("block", [DualBlock, SharedBlock])
def test_a_description_of_what_the_survey_understands_is_what_the_survey_finds(block: type[nn.Module]) -> None:
    mlps = (
        {"mlp": "ff", "mlp.context": "ff_context"} if block is DualBlock else {"mlp": "ff#1/2", "mlp.context": "ff#2/2"}
    )
    model = Chain(block)
    anatomy = describe(model, toy_inputs(), {"blocks": {"joint_attn": "attn", **mlps}})
    assert anatomy == survey(model, toy_inputs())


def test_runs_may_be_said_where_the_tensors_do_not_tell_them() -> None:
    assert described(runs=[(0, 1), (1, 3)]).segments == ((0, 1), (1, 3))


def test_a_description_survives_the_round_trip_through_a_file() -> None:
    assert Anatomy.from_json(described().to_json()) == described()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": {"layers": {"attn": "attn"}}}, r"DiT has no list of modules 'layers'; it has blocks, "),
        ({"blocks": {"blocks": {"attention": "attn"}}}, "unknown branch 'attention'; a branch is one of attn"),
        (
            {"blocks": {"blocks": {"attn": "attention"}}},
            r"blocks\.0 calls none of attention directly; it calls adaLN_modulation, attn, mlp",
        ),
        ({"blocks": {"blocks": {"fused": ("gate", "mlp")}}}, r"blocks\.0 does not call its gate once"),
        ({"returns": {"blocks": "hidden_states"}}, r"blocks\.0 is not given 'hidden_states'; it is given x, c"),
        ({"returns": {"blocks": "c"}}, r"an output that is to continue 'c' has another shape than it"),
        ({"returns": {"blocks": ("x", "c")}}, r"blocks\.0 returns 1 outputs"),
        ({"runs": [(0, 2)]}, r"the runs must cover the blocks 0 to 2 in order"),
    ],
)
def test_a_description_that_does_not_fit_the_model_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AnatomyError, match=message):
        described(**options)


def test_blocks_that_are_called_twice_are_refused() -> None:
    with pytest.raises(AnatomyError, match=r"blocks\.0 is called 2 times in a call of the model, needed once"):
        describe(Chain(repeats=2), toy_inputs(), {"blocks": {"attn": "attn", "mlp": "ff"}})
