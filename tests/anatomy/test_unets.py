"""What a survey finds in U-Nets."""

import json
from typing import Any

import pytest
import torch

from dicache.anatomy import Anatomy, AnatomyError, Site, survey
from dicache.anatomy.inputs import Inputs
from dicache.anatomy.unets import is_unet
from dicache.schedules import Schedule, ScheduleError, Target, TeaCachePolicy
from tests.tiny import Build, anatomy_of, arguments, both_unets, dit, unet, unet_xl


def test_blocks_are_residual_blocks_transformers_and_samplers_in_the_order_in_which_they_run() -> None:
    anatomy = anatomy_of(unet)
    kinds = {"ResnetBlock2D": "r", "Transformer2DModel": "a", "Downsample2D": "d", "Upsample2D": "u"}
    assert (
        "".join(kinds[block.kind] for block in anatomy.blocks) == "raradraradrr" + "rar" + "rrru" + "rararau" + "rarara"
    )
    assert anatomy.segments == ((0, 32),)
    assert anatomy.links == ((-1, 30), (1, 28), (3, 26), (4, 23), (6, 21), (8, 19), (9, 17), (10, 16), (11, 15))
    assert [anatomy.enclosed(branch) for branch in (0, 1, 8)] == [(0, 30), (2, 28), (12, 15)]
    assert anatomy.blocks[5].shapes == ((8, 4, 4), (16, 4, 4))
    assert sum(block.macs for block in anatomy.blocks) > 0.98 * anatomy.macs


def test_what_is_added_to_a_residual_blocks_stream_is_a_site_and_so_is_a_samplers_convolution() -> None:
    resnet, transformer, *_, sampler = anatomy_of(unet).blocks[:5]
    assert [(site.branch, site.module, site.inner) for site in resnet.sites] == [
        ("conv", "conv2", ("conv1", "time_emb_proj"))
    ]
    assert resnet.norms == {"norm1": ("conv",), "norm2": ("conv",)}
    assert [(site.branch, site.module) for site in transformer.sites] == [
        ("attn", "transformer_blocks.0.attn1"),
        ("cross_attn", "transformer_blocks.0.attn2"),
        ("mlp", "transformer_blocks.0.ff"),
    ]
    assert transformer.norms["transformer_blocks.0.norm2"] == ("cross_attn",)
    assert sampler.sites == (Site("conv", "conv", sampler.macs),)


def test_several_transformer_blocks_in_a_row_have_numbered_branches() -> None:
    deep = anatomy_of(unet_xl).blocks[9]
    assert [site.branch for site in deep.sites] == [
        f"{kind}.{k}" for k in range(3) for kind in ("attn", "cross_attn", "mlp")
    ]
    assert deep.norms["transformer_blocks.2.norm3"] == ("mlp.2",)


@both_unets
def test_a_description_is_written_and_read(build: Build) -> None:
    anatomy = anatomy_of(build)
    written = json.loads(json.dumps(anatomy.to_json()))
    assert Anatomy.from_json(written) == anatomy
    with pytest.raises(AnatomyError, match="links must each go from a block to a later one"):
        Anatomy.from_json({**written, "links": [[5, 99]]})


@pytest.mark.parametrize(
    "config",
    [
        {"layers_per_block": 1},
        {"layers_per_block": (1, 2, 1), "reverse_transformer_layers_per_block": None},
        {"use_linear_projection": True, "attention_head_dim": (1, 2, 4), "upcast_attention": True},  # SD2
        {
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        {"mid_block_type": None},
        {"resnet_time_scale_shift": "scale_shift", "resnet_skip_time_act": True},
        {"class_embed_type": None, "time_cond_proj_dim": 4},  # LCM
    ],
)
def test_other_u_nets_are_understood_and_their_innermost_branch_is_inside_all_others(config: dict[str, Any]) -> None:
    model = unet(**config)
    anatomy = survey(model, Inputs((), arguments(model)))
    assert survey(model).links == anatomy.links
    inside = [anatomy.enclosed(branch) for branch in range(len(anatomy.links))]
    assert inside == sorted(inside)
    assert [stop for _, stop in inside] == sorted((stop for _, stop in inside), reverse=True)


def test_a_u_net_that_is_not_understood_is_refused_with_what_was_found() -> None:
    simple = {"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
    simple |= {"up_block_types": ("UpBlock2D", "UpBlock2D", "SimpleCrossAttnUpBlock2D")}
    with pytest.raises(AnatomyError, match=r"down_blocks\.0\.attentions\.0 is a Attention without transformer_blocks"):
        survey(unet(**simple))
    model: Any = unet()
    model.down_blocks[1].motion_modules = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(AnatomyError, match=r"down_blocks\.1 has motion_modules, a ModuleList, besides its resnets"):
        survey(model)
    model = unet()
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(AnatomyError, match=r"FreeU is on .* disable_freeu"):
        survey(model)
    assert is_unet(model)
    assert not is_unet(dit())


def test_something_else_that_leaves_a_range_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = unet()
    inner, own = model.down_blocks[1].resnets[0], model.conv_out.forward
    seen: list[torch.Tensor] = []
    inner.register_forward_hook(lambda *call: seen.append(call[2]))
    monkeypatch.setattr(model.conv_out, "forward", lambda x: own(x) + seen[-1].mean())
    with pytest.raises(AnatomyError, match=r"something else that the blocks from .* on make is used behind them"):
        survey(model)


def test_a_policy_is_refused() -> None:
    policy = TeaCachePolicy(0.1, coefficients=(1.0, 0.0), input_range=(0.0, 1.0))
    with pytest.raises(ScheduleError, match="UNet2DConditionModel is a U-Net; needed a plan"):
        Schedule("teacache", {}, anatomy_of(unet), Target(), 4, policy=policy)
