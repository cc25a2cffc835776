"""What a survey finds in real architectures and in toys with one peculiarity each."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dicache.anatomy import AnatomyError, Site, survey
from dicache.anatomy.inputs import Inputs
from tests.tiny import Build, anatomy_of, arguments, dit, every_model, flux, pixart, predict, sd3, sd35
from tests.toys import (
    Chain,
    ClosedBlock,
    DualBlock,
    FusedBlock,
    GridBlock,
    InlineBlock,
    LonelyBlock,
    ParallelBlock,
    PlainBlock,
    SharedBlock,
    toy_inputs,
)


@pytest.mark.parametrize(("build", "blocks"), [(dit, 4), (pixart, 3)])
def test_blocks_are_found_in_execution_order_with_their_stream_and_one_segment(build: Build, blocks: int) -> None:
    anatomy = anatomy_of(build)
    assert anatomy.model == type(build()).__name__
    assert [block.module for block in anatomy.blocks] == [f"transformer_blocks.{i}" for i in range(blocks)]
    assert [block.index for block in anatomy.blocks] == list(range(blocks))
    assert {block.kind for block in anatomy.blocks} == {"BasicTransformerBlock"}
    assert {block.returns for block in anatomy.blocks} == {"hidden_states"}
    assert anatomy.segments == ((0, blocks),)
    assert anatomy.latents == (4, 8, 8)


def test_dit_has_an_attention_and_an_mlp_behind_one_norm_each() -> None:
    for block in anatomy_of(dit).blocks:
        assert [(site.branch, site.module) for site in block.sites] == [("attn", "attn1"), ("mlp", "ff")]
        assert block.norms == {"norm1.norm": ("attn",), "norm3": ("mlp",)}


def test_pixart_has_a_cross_attention_without_a_norm_of_its_own() -> None:
    for block in anatomy_of(pixart).blocks:
        assert [(site.branch, site.module) for site in block.sites] == [
            ("attn", "attn1"),
            ("cross_attn", "attn2"),
            ("mlp", "ff"),
        ]
        assert block.norms == {"norm1": ("attn",), "norm2": ("mlp",)}


@pytest.mark.parametrize("build", [sd3, sd35])
def test_the_last_block_of_sd3_makes_no_text(build: Build) -> None:
    anatomy = anatomy_of(build)
    both = ("encoder_hidden_states", "hidden_states")
    assert [block.returns for block in anatomy.blocks] == [both, both, (None, "hidden_states")]
    assert anatomy.segments == ((0, 3),)
    last = anatomy.blocks[-1]
    assert [(site.branch, site.module) for site in last.sites] == [("joint_attn", "attn"), ("mlp", "ff")]
    assert last.norms == {"norm1.norm": ("joint_attn",), "norm1_context.norm": ("joint_attn",), "norm2": ("mlp",)}


def test_sd3_has_an_mlp_for_each_stream() -> None:
    for block in anatomy_of(sd3).blocks[:-1]:
        assert [(site.branch, site.module) for site in block.sites] == [
            ("joint_attn", "attn"),
            ("mlp", "ff"),
            ("mlp.context", "ff_context"),
        ]
        assert block.norms == {
            "norm1.norm": ("joint_attn",),
            "norm1_context.norm": ("joint_attn",),
            "norm2": ("mlp",),
            "norm2_context": ("mlp.context",),
        }


def test_sd35_has_a_second_attention_behind_the_norm_of_the_first() -> None:
    for block in anatomy_of(sd35).blocks[:-1]:
        assert [(site.branch, site.module) for site in block.sites] == [
            ("joint_attn", "attn"),
            ("attn", "attn2"),
            ("mlp", "ff"),
            ("mlp.context", "ff_context"),
        ]
        assert block.norms["norm1.norm"] == ("joint_attn", "attn")


def test_flux_has_two_segments_and_one_branch_in_its_single_blocks() -> None:
    anatomy = anatomy_of(flux)
    assert anatomy.segments == ((0, 3), (3, 5))
    assert {block.returns for block in anatomy.blocks} == {("encoder_hidden_states", "hidden_states")}
    for block in anatomy.blocks[:3]:
        assert [site.branch for site in block.sites] == ["joint_attn", "mlp", "mlp.context"]
    for block in anatomy.blocks[3:]:
        [site] = block.sites
        assert (site.branch, site.module, site.inner) == ("fused", "proj_out", ("proj_mlp", "act_mlp", "attn"))
        assert block.norms == {"norm.norm": ("fused",)}


def test_a_single_block_of_flux_on_its_own_continues_its_streams_in_their_order() -> None:
    assert survey(flux(single_layers=1)).blocks[-1].returns == ("encoder_hidden_states", "hidden_states")


def test_macs_of_flux_are_those_counted_by_hand() -> None:
    # Batch 2, 8 tokens of text and 16 of image in a row, width 24. Three projections and two products, to 96 and out.
    attention = 3 * 2 * 24 * 24 * 24 + 2 * 2 * 24 * 24 * 24
    mlp_in, out = 2 * 24 * 24 * 96, 2 * 24 * (24 + 96) * 24
    for block in anatomy_of(flux).blocks[3:]:
        assert block.sites[0].macs == attention + mlp_in + out
        assert block.macs == block.sites[0].macs + 2 * 24 * 3 * 24  # and three vectors of modulation


def test_macs_of_dit_are_those_counted_by_hand() -> None:
    # Batch 2, 16 tokens, width 24. Attention: four projections and two products of 16 x 16; MLP: to 96 and back.
    attention = 4 * 2 * 16 * 24 * 24 + 2 * 2 * 16 * 16 * 24
    mlp = 2 * 2 * 16 * 24 * 96
    # Timestep 256 -> 24 -> 24, and six vectors of modulation.
    modulation = 2 * (256 * 24 + 24 * 24 + 24 * 6 * 24)
    # Patches of 2 x 2 x 4; the timestep once more, for two vectors; patches of 2 x 2 x 8.
    ends = 2 * 16 * 16 * 24 + 2 * (256 * 24 + 24 * 24 + 24 * 48) + 2 * 16 * 24 * 32

    anatomy = anatomy_of(dit)
    assert {block.sites for block in anatomy.blocks} == {(Site("attn", "attn1", attention), Site("mlp", "ff", mlp))}
    assert {block.macs for block in anatomy.blocks} == {attention + mlp + modulation}
    assert anatomy.macs == 4 * (attention + mlp + modulation) + ends


def test_macs_of_pixart_are_those_counted_by_hand() -> None:
    attention = 4 * 2 * 16 * 24 * 24 + 2 * 2 * 16 * 16 * 24
    # Queries and outputs of 16 tokens, keys and values of 8 of text, two products of 16 x 8.
    cross = 2 * 2 * 16 * 24 * 24 + 2 * 2 * 8 * 24 * 24 + 2 * 2 * 16 * 8 * 24
    mlp = 2 * 2 * 16 * 24 * 96
    for block in anatomy_of(pixart).blocks:
        assert [site.macs for site in block.sites] == [attention, cross, mlp]
        assert block.macs == attention + cross + mlp  # modulated by a table, without a product


@every_model
def test_a_survey_leaves_the_model_and_the_random_numbers_as_they_were(build: Build) -> None:
    model = build()
    given = arguments(model)
    keys = {path: set(part.__dict__) for path, part in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    want = predict(model, given)

    survey(model)

    assert {path: set(part.__dict__) for path, part in model.named_modules()} == keys
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(predict(model, given), want)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_survey_that_fails_leaves_the_model_as_it_was() -> None:
    model = dit()
    keys = {path: set(part.__dict__) for path, part in model.named_modules()}

    def fail(*_: object) -> None:
        raise RuntimeError("broken block")

    hook = model.get_submodule("transformer_blocks.2.ff").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken block"):
        survey(model)
    hook.remove()
    assert {path: set(part.__dict__) for path, part in model.named_modules()} == keys


@every_model
def test_a_second_survey_finds_the_same(build: Build) -> None:
    model = build()
    inputs = Inputs((), arguments(model))
    assert survey(model, inputs) == survey(model, inputs) == anatomy_of(build)


def test_a_matrix_between_two_blocks_ends_a_segment() -> None:
    assert survey(Chain(), toy_inputs()).segments == ((0, 3),)
    assert survey(Chain(between=1), toy_inputs()).segments == ((0, 1), (1, 3))


def test_a_block_whose_output_a_later_block_takes_ends_its_segment() -> None:
    assert survey(Chain(long_skip=True), toy_inputs()).segments == ((0, 1), (1, 3))


def test_what_something_else_reads_of_a_block_ends_its_segment() -> None:
    class Reading(Chain):
        def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            x, seen = hidden_states, []
            for block in self.blocks:
                x = block(x)
                seen.append(self.adapter(x))
            out: Tensor = x + seen[0]
            return out

    anatomy = survey(Reading(), toy_inputs())
    assert anatomy.segments == ((0, 1), (1, 3))


def test_a_block_that_sees_only_text_is_not_among_the_main_blocks() -> None:
    with_text = survey(Chain(refines=1), toy_inputs())
    without = survey(Chain(), toy_inputs())
    assert [block.module for block in with_text.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert with_text.blocks == without.blocks
    assert with_text.macs > without.macs  # its work still is the model's


def test_a_refiner_that_is_called_for_several_texts_is_not_among_the_main_blocks() -> None:
    once, twice = survey(Chain(refines=1), toy_inputs()), survey(Chain(refines=2), toy_inputs())
    assert twice.blocks == once.blocks


def test_a_block_that_refines_text_first_and_then_sees_the_latents_is_no_refiner() -> None:
    class Shared(Chain):
        def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            for block in self.blocks:
                encoder_hidden_states = block(encoder_hidden_states)
            return super().forward(hidden_states, timestep, encoder_hidden_states)

    with pytest.raises(AnatomyError, match=r"Shared calls blocks\.0 more than once"):
        survey(Shared(), toy_inputs())


def test_a_model_that_leaves_blocks_out_at_some_timesteps_is_refused() -> None:
    class Hasty(Chain):
        def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            for block in self.blocks[: 3 if timestep[0] > 400 else 2]:
                hidden_states = block(hidden_states)
            return hidden_states

    with pytest.raises(AnatomyError, match="Hasty calls other blocks with other latents or at another timestep"):
        survey(Hasty(), toy_inputs())


def test_two_streams_are_told_by_the_tensors_that_go_from_block_to_block() -> None:
    anatomy = survey(Chain(DualBlock), toy_inputs())
    for block in anatomy.blocks:
        assert block.returns == ("encoder_hidden_states", "hidden_states")
        assert [(site.branch, site.module) for site in block.sites] == [
            ("joint_attn", "attn"),
            ("mlp.context", "ff_context"),
            ("mlp", "ff"),
        ]
    assert anatomy.segments == ((0, 3),)


def test_a_norm_of_two_branches_feeds_both_and_one_on_the_way_out_feeds_none() -> None:
    for block in survey(Chain(ParallelBlock), toy_inputs()).blocks:
        assert block.norms == {"norm": ("attn", "mlp")}


def test_a_norm_whose_output_is_laid_out_as_a_picture_is_found_like_any_other() -> None:
    for block in survey(Chain(GridBlock), toy_inputs()).blocks:
        assert block.norms == {"norm1": ("attn",), "norm2": ("mlp",)}


def test_a_model_without_blocks_is_refused() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(
            self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
        ) -> torch.Tensor:
            for layer in self.layers:
                hidden_states = layer(hidden_states)
            return hidden_states

    with pytest.raises(AnatomyError, match=r"Mixer has no list of modules .* found no transformer blocks"):
        survey(Mixer().eval(), toy_inputs())


def test_a_block_that_is_called_twice_is_refused() -> None:
    with pytest.raises(AnatomyError, match=r"Chain calls blocks\.0 more than once"):
        survey(Chain(repeats=2), toy_inputs())


def test_the_size_surveyed_with_changes_the_macs_and_nothing_else() -> None:
    model = Chain(PlainBlock)
    two, four = survey(model, toy_inputs(batch=2)), survey(model, toy_inputs(batch=4))
    assert four.macs == 2 * two.macs
    assert [replace(block, macs=0, sites=()) for block in four.blocks] == [
        replace(block, macs=0, sites=()) for block in two.blocks
    ]
    assert four.sites == two.sites


def test_attention_and_mlp_that_leave_through_one_matrix_are_one_branch() -> None:
    for block in survey(Chain(FusedBlock), toy_inputs()).blocks:
        assert [(site.branch, site.module, site.inner) for site in block.sites] == [
            ("fused", "out", ("attn", "up", "act"))
        ]
        assert block.norms == {"norm": ("fused",)}


def test_matrices_that_the_block_applies_itself_are_told_by_what_they_feed() -> None:
    for block in survey(Chain(InlineBlock), toy_inputs()).blocks:
        assert [(site.branch, site.module, site.inner) for site in block.sites] == [
            ("attn", "attn_out", ("attn",)),
            ("mlp", "down", ("gate", "up")),
        ]
        assert block.norms == {"norm1": ("attn",), "norm2": ("mlp",)}


def test_a_matrix_through_which_the_stream_itself_leaves_is_no_branch() -> None:
    for block in survey(Chain(ClosedBlock), toy_inputs()).blocks:
        assert [(site.branch, site.module, site.inner) for site in block.sites] == [
            ("attn", "attn", ()),
            ("mlp", "ff", ()),
        ]


def test_an_attention_with_nothing_beside_it_is_fused() -> None:
    for block in survey(Chain(LonelyBlock), toy_inputs()).blocks:
        assert [(site.branch, site.module, site.inner) for site in block.sites] == [("fused", "attn", ())]


def test_an_inner_module_that_is_called_twice_has_a_turn_for_each_call() -> None:
    class Twice(FusedBlock):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            x = self.norm(hidden_states)
            made = torch.cat([self.attn(x), self.act(self.up(x)) + self.up(2 * x)], dim=2)
            return encoder_hidden_states + 0, hidden_states + self.out(made)

    [site] = survey(Chain(Twice), toy_inputs()).blocks[0].sites
    assert (site.branch, site.module, set(site.inner)) == ("fused", "out", {"attn", "act", "up#1/2", "up#2/2"})


def test_calls_of_one_module_are_named_by_the_stream_whose_tokens_they_make() -> None:
    anatomy = survey(Chain(SharedBlock), toy_inputs())
    assert [(site.branch, site.module) for site in anatomy.blocks[0].sites] == [
        ("joint_attn", "attn"),
        ("mlp", "ff#1/2"),
        ("mlp.context", "ff#2/2"),
    ]
    tokens, products = 5, 2 * 2 * 8 * 16  # of a token: batch, matrices, width, width inside
    assert [site.macs for site in anatomy.blocks[0].sites[1:]] == [tokens * products, 3 * products]


def test_an_output_that_continues_none_of_the_arguments_is_refused() -> None:
    class Telling(PlainBlock):
        def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Any:
            return super().forward(hidden_states, skip), hidden_states.mean()

    class Listener(Chain):
        def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            x = hidden_states + timestep[:, None, None] / 1000
            for block in self.blocks:
                x = block(x)[0]
            return x

    with pytest.raises(AnatomyError, match=r"output 1 of Telling is a tensor of shape \(\), .* none has that shape"):
        survey(Listener(Telling), toy_inputs())


def test_streams_that_only_their_size_could_tell_apart_are_refused_when_it_is_one() -> None:
    class Lone(Chain):
        def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            x = hidden_states + timestep[:, None, None] / 1000
            out: Tensor = self.blocks[0](x, encoder_hidden_states)[1]
            return out

    inputs = toy_inputs()
    assert survey(Lone(DualBlock), inputs).blocks[0].returns == ("encoder_hidden_states", "hidden_states")
    alike = Inputs(inputs.args, {**inputs.kwargs, "encoder_hidden_states": inputs.args[0] + 1})
    with pytest.raises(AnatomyError, match=r"\['hidden_states', 'encoder_hidden_states'\] all have that shape"):
        survey(Lone(DualBlock), alike)
