from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from dicache.evaluate import counting
from dicache.evaluate.cost import passes_of, planned_cost, schedule_cost
from dicache.evaluate.counting import CostError, Macs, PassCost, Size
from dicache.models.configs import ModelConfig, read_config
from dicache.schedules import Plan, Rule, Schedule, Target
from tests.tiny import SIZE, TEXT_TOKENS, Build, adaptive, anatomy_of, dit, every_model, pixart, scheduled, sd3


def config_of(model: nn.Module) -> ModelConfig:
    config: dict[str, Any] = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}  # type: ignore[arg-type]
    return ModelConfig("tiny", type(model).__name__, config, {}, pixels_per_latent=1)


def counted(build: Build) -> PassCost:
    return PassCost(config_of(build()), Size(SIZE, SIZE, TEXT_TOKENS))


@every_model
def test_what_is_counted_without_numbers_is_what_a_survey_of_the_model_finds(build: Build) -> None:
    surveyed = anatomy_of(build)  # of a batch of two
    found = counted(build).anatomy()
    assert found.sites == surveyed.sites
    assert found.segments == surveyed.segments
    assert found.latents == surveyed.latents
    assert 2 * found.macs == surveyed.macs
    for mine, other in zip(found.blocks, surveyed.blocks, strict=True):
        assert (mine.module, mine.kind, mine.returns, mine.norms) == (
            other.module,
            other.kind,
            other.returns,
            other.norms,
        )
        assert 2 * mine.macs == other.macs
        assert [2 * site.macs for site in mine.sites] == [site.macs for site in other.sites]


def test_the_papers_count_layers_and_no_products_of_attention() -> None:
    # 16 tokens of width 24: attention has four layers of 24 x 24 and two products of 16 x 16 x 24, the MLP 2 x 4.
    whole = counted(dit)
    assert whole.of_layers(["transformer_blocks.0.attn1"]) == 16 * 4 * 24 * 24
    assert whole.of_layers(["transformer_blocks.0.ff"]) == 16 * 8 * 24 * 24
    attention = next(site for site in whole.anatomy().blocks[0].sites if site.branch == "attn")
    assert attention.macs == 16 * 4 * 24 * 24 + 2 * 16 * 16 * 24
    assert whole.total.all - whole.total.papers == 4 * 2 * 16 * 16 * 24


def test_a_skipped_block_is_one_of_equal_shares_of_the_whole_for_papers() -> None:
    whole = counted(sd3)  # whose last block is smaller than the others
    anatomy = whole.anatomy()
    macs = planned_cost(whole, anatomy, Plan(4, (Rule("skip", "C.C.", blocks="1-2"),)))
    assert macs.papers == pytest.approx(whole.total.papers * 2 * (4 - 2 * 2 / 3))
    assert macs.all == 2 * (4 * whole.total.all - 2 * (anatomy.blocks[1].macs + anatomy.blocks[2].macs))


def test_a_reused_branch_saves_its_own_layers() -> None:
    whole = counted(pixart)
    plan = Plan(4, (Rule("reuse", "CC..", branch="cross_attn"),))
    macs = planned_cost(whole, whole.anatomy(), plan, passes=1)
    attention = sum(whole.of_layers([f"transformer_blocks.{i}.attn2"]) for i in range(3))
    assert macs.papers == 4 * whole.total.papers - 2 * attention


def test_guidance_that_ends_early_costs_one_pass_from_there_on() -> None:
    whole = counted(dit)
    macs = planned_cost(whole, whole.anatomy(), Plan(4, collapse_guidance_from=1), passes=2)
    assert macs == Macs(5 * whole.total.all, 5 * whole.total.papers)


def test_rules_for_one_guidance_pass_save_in_that_pass_only() -> None:
    whole = counted(dit)
    plan = Plan(2, (Rule("skip", "C.", context="uncond"),))
    body = sum(block.macs for block in whole.anatomy().blocks)
    assert planned_cost(whole, whole.anatomy(), plan).all == 4 * whole.total.all - body


def test_a_schedule_is_counted_if_it_is_for_the_model() -> None:
    whole = counted(dit)
    schedule = scheduled(dit, Rule("skip", "C.C."))
    found = schedule_cost(whole, whole.anatomy(), schedule, passes=1)
    assert found.all == pytest.approx(4 * whole.total.all * schedule.macs_fraction())
    with pytest.raises(CostError, match="a DiTTransformer2DModel of 4 blocks, found a PixArtTransformer2DModel of 3"):
        schedule_cost(counted(pixart), counted(pixart).anatomy(), schedule, passes=1)


def test_a_policy_is_counted_as_its_calibration_expected() -> None:
    whole = counted(dit)
    policy = adaptive(dit, 0.1)
    with pytest.raises(CostError, match="decides at run time"):
        schedule_cost(whole, whole.anatomy(), policy, passes=1)
    foreseen = replace(policy, measured={"expected_steps": "C.C.", "macs_fraction": 0.6})
    assert schedule_cost(whole, whole.anatomy(), foreseen, passes=2).all == pytest.approx(8 * 0.6 * whole.total.all)


@pytest.mark.parametrize(
    ("name", "guidance", "passes"), [("pixart", 4.5, 2), ("pixart", 1.0, 1), ("pixart-lcm", 0.0, 1), ("dit", None, 1)]
)
def test_guidance_takes_a_second_pass(name: str, guidance: float | None, passes: int) -> None:
    assert passes_of(read_config(name), guidance) == passes


def test_a_model_whose_guidance_is_embedded_takes_one_pass() -> None:
    assert passes_of(ModelConfig("f", "FluxTransformer2DModel", {"guidance_embeds": True}, {}), 3.5) == 1
    assert passes_of(ModelConfig("f", "FluxTransformer2DModel", {"guidance_embeds": False}, {}), 3.5) == 2


def test_what_cannot_be_counted_is_told_in_a_line() -> None:
    source = config_of(dit())
    with pytest.raises(CostError, match="multiples of 8, found 1001 and 1024"):
        PassCost(read_config("pixart"), Size(1001, 1024, 120))
    with pytest.raises(CostError, match="reads text, and how many tokens is not known; give --text-tokens"):
        PassCost(read_config("pixart"), Size(1024, 1024))
    with pytest.raises(CostError, match="installed diffusers does not have"):
        PassCost(replace(source, kind="NoTransformer"), Size(8, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "blocks", "transformers", "shapes", "same"),
    [
        ("sd15", 44, 16, {0: (320, 64, 64), 3: (320, 32, 32), 11: (1280, 8, 8)}, [0, 1, 4, 7, 8, 9, 10, 11]),
        ("sdxl", 32, 70, {0: (320, 128, 128), 3: (320, 64, 64), 8: (1280, 32, 32)}, [0, 1, 4, 7, 8]),
    ],
)
def test_published_u_nets_are_surveyed_without_their_weights(
    name: str, blocks: int, transformers: int, shapes: dict[int, tuple[int, ...]], same: list[int]
) -> None:
    usual = read_config(name).usual
    whole = PassCost(read_config(name), Size(usual["height"], usual["width"], usual["text_tokens"]))
    anatomy = whole.anatomy()
    assert len(anatomy.blocks) == blocks
    assert sum(key.partition(".")[2].startswith("attn") for key in anatomy.sites) == transformers
    assert len(anatomy.links) == 3 * len(
        whole.source.config["block_out_channels"]
    )  # 2 blocks and a sampler, or conv_in
    assert {branch: anatomy.blocks[anatomy.enclosed(branch)[0]].shapes[0] for branch in shapes} == shapes
    assert sum(block.macs for block in anatomy.blocks) > 0.99 * anatomy.macs
    both = [b for b in range(len(anatomy.links)) if not anatomy.obstacle(*anatomy.enclosed(b), delta=True)]
    assert both == same  # where a delta can be taken


def test_a_schedule_for_a_whole_generation_is_the_sum_of_its_passes() -> None:
    whole = counted(dit)
    plan = Plan(2, (Rule("reuse", "C."),))
    schedule = Schedule("test", {}, whole.anatomy(), Target(), 2, plan)
    one = schedule_cost(whole, whole.anatomy(), schedule, passes=1)
    assert schedule_cost(whole, whole.anatomy(), schedule, passes=2) == one.times(2)


def test_a_copy_of_few_heads_describes_the_blocks_as_a_copy_of_few_blocks_does(monkeypatch: pytest.MonkeyPatch) -> None:
    flux = read_config("flux")
    small = {"num_attention_heads": 3, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6], "num_single_layers": 4}
    source = replace(flux, config={**flux.config, **small, "num_layers": 3, "joint_attention_dim": 32})
    of_few_heads = PassCost(source, Size(64, 64, 8)).anatomy()
    monkeypatch.setattr(counting, "WIDE_BY_HEADS", ())
    assert PassCost(source, Size(64, 64, 8)).anatomy() == of_few_heads
    lists = ["transformer_blocks"] * 3 + ["single_transformer_blocks"] * 4
    assert [block.path for block in of_few_heads.blocks] == lists
