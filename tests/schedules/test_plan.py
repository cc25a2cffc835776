"""Rules and plans: what they mean, what they refuse, and how they are written."""

import json
from typing import Any

import pytest

from dicache.anatomy import Anatomy, Block, Site
from dicache.schedules import Plan, PlanError, Rule
from tests.toys import written

TWO = written(2)
FOUR = written(4)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"action": "drop", "steps": "C."}, "unknown action 'drop'; a rule's action is reuse or skip"),
        (
            {"action": "reuse", "steps": "C.", "predictor": "guess"},
            "unknown predictor 'guess'; known: hold, taylor, feature",
        ),
        ({"action": "reuse", "steps": "C.", "predictor": "feature"}, "feature stands in for blocks that are skipped"),
        ({"action": "skip", "steps": "C.", "predictor": "taylor", "order": 5}, "must be 0 to 4, found 5"),
        ({"action": "skip", "steps": "C.", "order": 1}, "must be 0 with hold, found 1"),
        ({"action": "reuse", "steps": "CRC"}, "unknown letter 'R' in steps 'CRC'; write C to compute, . to reuse"),
        ({"action": "reuse", "steps": ".C"}, "the first step must be computed, nothing is kept before it"),
        ({"action": "reuse", "steps": "C.", "branch": "router"}, r"unknown branch 'router'; write \* or one of attn"),
        ({"action": "skip", "steps": "C.", "branch": "mlp"}, r"skip takes whole blocks, so its branch must be \*"),
        ({"action": "skip", "steps": "C.", "blocks": "3-1"}, "'3-1' is not a range of blocks"),
        ({"action": "skip", "steps": "C.", "blocks": "first"}, "'first' is not a range of blocks"),
    ],
)
def test_a_rule_that_means_nothing_is_refused_and_says_what_may_be_written(rule: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Rule(**rule)


def test_a_plan_needs_a_step_and_rules_of_its_length() -> None:
    with pytest.raises(PlanError, match=r"at least one step, .* found 0"):
        Plan(0)
    with pytest.raises(PlanError, match=r"3 letters for a plan of 4 steps: 'C\.C'"):
        Plan(4, (Rule("reuse", "C.C"),))


def test_a_plan_without_rules_computes_everything() -> None:
    assert Plan(3).table(TWO) == {"0.attn": "CCC", "0.mlp": "CCC", "1.attn": "CCC", "1.mlp": "CCC"}
    assert Plan(3).computed_steps == (0, 1, 2)


def test_rules_are_applied_together_each_to_its_blocks_and_branch() -> None:
    plan = Plan(4, (Rule("reuse", "C.C.", branch="mlp"), Rule("reuse", "CC..", blocks="1", branch="attn")))
    assert plan.table(TWO) == {"0.attn": "CCCC", "0.mlp": "CRCR", "1.attn": "CCRR", "1.mlp": "CRCR"}
    assert plan.computed_steps == (0,)


def test_a_dot_leaves_out_the_branches_that_have_a_name() -> None:
    sites = tuple(Site(branch, branch.replace(".", "_")) for branch in ("attn", "mlp", "mlp.context"))
    anatomy = Anatomy("Toy", (Block(0, "blocks", 0, "DualBlock", "hidden_states", sites),), ((0, 1),))

    def reused(branch: str) -> list[str]:
        table = Plan(2, (Rule("reuse", "C.", branch=branch),)).table(anatomy)
        return [key for key, row in table.items() if row == "CR"]

    assert reused("mlp") == ["0.mlp", "0.mlp.context"]
    assert reused("mlp.") == ["0.mlp"]
    assert reused("mlp.context") == ["0.mlp.context"]


def test_a_skipped_block_runs_none_of_its_sites_whatever_else_is_said_and_in_whatever_order() -> None:
    skip, reuse = Rule("skip", "CC.C", blocks="1-2"), Rule("reuse", "C...", branch="attn")
    want = {
        **{f"{block}.attn": "CRRR" for block in (0, 3)},
        **{f"{block}.attn": "CRSR" for block in (1, 2)},
        **{f"{block}.mlp": "CCCC" for block in (0, 3)},
        **{f"{block}.mlp": "CCSC" for block in (1, 2)},
    }
    assert Plan(4, (skip, reuse)).table(FOUR) == Plan(4, (reuse, skip)).table(FOUR) == want


def test_a_rule_for_one_guidance_pass_leaves_the_others_alone() -> None:
    plan = Plan(2, (Rule("reuse", "C.", context="uncond"),))
    assert set(plan.table(TWO, "uncond").values()) == {"CR"}
    assert set(plan.table(TWO, "cond").values()) == {"CC"}
    assert set(plan.table(TWO).values()) == {"CC"}


def test_a_rule_for_a_kind_of_branch_covers_the_named_ones_and_not_the_reverse() -> None:
    kind, named = Rule("reuse", "C.", branch="mlp"), Rule("reuse", "C.", branch="mlp.context")
    assert [kind.covers(branch) for branch in ("mlp", "mlp.context", "attn")] == [True, True, False]
    assert [named.covers(branch) for branch in ("mlp", "mlp.context", "attn")] == [False, True, False]


def test_a_rule_for_more_blocks_than_the_model_has_is_refused() -> None:
    with pytest.raises(PlanError, match="a rule is for blocks 1-2, but Toy has the blocks 0-1"):
        Plan(2, (Rule("skip", "C.", blocks="1-2"),)).table(TWO)


def test_a_rule_for_a_branch_that_the_model_lacks_is_refused_also_if_it_is_for_another_pass() -> None:
    for context in ("*", "uncond"):
        with pytest.raises(PlanError, match="a rule is for branch cross_attn, but Toy has attn, mlp"):
            Plan(2, (Rule("reuse", "C.", branch="cross_attn", context=context),)).table(TWO)


def test_two_ranges_that_overlap_may_not_be_skipped_at_one_step() -> None:
    with pytest.raises(PlanError, match="two rules skip block 1 at step 2: 0-1 and 1-3"):
        Plan(3, (Rule("skip", "C..", blocks="0-1"), Rule("skip", "CC.", blocks="1-3"))).table(FOUR)


def test_two_ranges_that_overlap_may_be_skipped_at_different_steps() -> None:
    plan = Plan(3, (Rule("skip", "C.C", blocks="0-1"), Rule("skip", "CC.", blocks="1-3")))
    assert plan.table(FOUR)["1.attn"] == "CSS"


def test_two_rules_that_have_different_predictors_for_one_thing_are_refused() -> None:
    taylor = {"predictor": "taylor", "order": 1}
    with pytest.raises(PlanError, match=r"predict 0\.mlp at step 2: hold and taylor of order 1"):
        Plan(3, (Rule("reuse", "C.."), Rule("reuse", "CC.", branch="mlp", **taylor))).table(TWO)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"predict blocks \* at step 1: hold and taylor of order 1"):
        Plan(2, (Rule("skip", "C."), Rule("skip", "C.", **taylor))).table(TWO)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="blocks 0-1 are replaced by their delta and by their feature map"):
        Plan(3, (Rule("skip", "C.C"), Rule("skip", "CC.", predictor="feature"))).table(TWO)


def test_an_expansion_of_order_zero_is_no_other_predictor_than_hold() -> None:
    plan = Plan(2, (Rule("reuse", "C."), Rule("reuse", "C.", predictor="taylor", order=0)))
    assert set(plan.table(TWO).values()) == {"CR"}


def test_only_an_expansion_is_written_with_its_order() -> None:
    assert "order" not in Rule("reuse", "C.").to_json()
    assert Rule("reuse", "C.", predictor="taylor", order=2).to_json()["order"] == 2


EXPANDED = Rule("skip", "C.C.", "0-2", predictor="taylor", order=2)


@pytest.mark.parametrize(
    "rules", [(), (EXPANDED,), (Rule("skip", "C.C.", "1-2"), Rule("reuse", "CC..", "3", "mlp", "cond"))]
)
def test_a_plan_survives_being_written_as_json_and_read(rules: tuple[Rule, ...]) -> None:
    plan = Plan(4, rules)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_collapse_of_guidance_survives_being_written_and_is_left_out_where_there_is_none() -> None:
    plan = Plan(4, (EXPANDED,), 2)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.to_json()["collapse_guidance_from"] == 2
    assert plan.computed_steps == (0,)  # of the two that the rule leaves, one has both passes
    assert "collapse_guidance_from" not in Plan(4, (EXPANDED,)).to_json()


@pytest.mark.parametrize("step", [-1, 0, 4, 9])
def test_guidance_collapses_at_a_step_after_the_first(step: int) -> None:
    with pytest.raises(PlanError, match=f"can collapse from step 1 to the last, 3, found {step}"):
        Plan(4, (), step)


def test_guidance_cannot_collapse_where_its_passes_are_treated_differently() -> None:
    with pytest.raises(PlanError, match="where a pass has rules of its own, found some for uncond"):
        Plan(4, (Rule("skip", "C.C.", context="uncond"),), 2)


def test_a_rule_may_leave_out_what_is_usual() -> None:
    read = Plan.from_json({"steps": 2, "rules": [{"action": "reuse", "steps": "C."}]})
    assert read == Plan(2, (Rule("reuse", "C.", blocks="*", branch="*", context="*", predictor="hold"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"found \[\], needed an object"),
        ({"steps": 2}, "unknown or missing key 'rules'"),
        ({"steps": 2, "rules": [], "colour": 1}, "unknown or missing key 'colour'"),
        ({"steps": "2", "rules": []}, "steps must be of type int, found '2'"),
        ({"steps": True, "rules": []}, "steps must be of type int, found True"),
        ({"steps": 2.0, "rules": []}, r"steps must be of type int, found 2\.0"),
        ({"steps": 2, "rules": [], "collapse_guidance_from": 2}, "from step 1 to the last, 1, found 2"),
        ({"steps": 2, "rules": [], "collapse_guidance_from": None}, "collapse_guidance_from must be of type int"),
        ({"steps": 2, "rules": {}}, r"rules must be of type list, found \{\}"),
        ({"steps": 2, "rules": ["C."]}, r"found 'C\.', needed an object"),
        ({"steps": 2, "rules": [{"steps": "C."}]}, "unknown or missing key 'action'"),
        ({"steps": 2, "rules": [{"action": "reuse", "steps": "C.", "where": "*"}]}, "unknown or missing key 'where'"),
        ({"steps": 2, "rules": [{"action": "reuse", "steps": "C.", "order": "1"}]}, "order must be of type int"),
        ({"steps": 2, "rules": [{"action": "reuse", "steps": "C.", "order": True}]}, "order must be of type int"),
        ({"steps": 2, "rules": [{"action": "reuse", "steps": "C.", "blocks": 1}]}, "blocks must be of type str"),
        ({"steps": 3, "rules": [{"action": "reuse", "steps": "C."}]}, "2 letters for a plan of 3 steps"),
    ],
)
def test_a_plan_that_is_not_written_as_one_is_refused(content: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(content)
