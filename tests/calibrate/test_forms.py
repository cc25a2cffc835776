"""Forms of plans, and weights that are moved together."""

import pytest

from dicache.calibrate.forms import Form, forms_of, together
from dicache.schedules import Plan, Rule, Target
from tests.toys import written

ATTN, MLP = ({1: ((0, 1.0),), 3: ((2, 1.0 + by), (0, -by))} for by in (0.2, 0.6))


def forecast(letters: str, branch: str, weights: object) -> Rule:
    return Rule("reuse", letters, branch=branch, predictor="forecast", weights=weights)  # type: ignore[arg-type]


def test_rules_with_weights_of_their_own_are_moved_together() -> None:
    middle, with_mean = together(Plan(4, (forecast("C.C.", "attn", ATTN), forecast("C.C.", "mlp", MLP))))
    assert dict(middle[3, 0]) == pytest.approx({2: 1.4, 0: -0.4})
    assert [dict(rule.weights[3])[2] for rule in with_mean(middle).rules] == pytest.approx([1.2, 1.6])
    moved = with_mean({**middle, (3, 0): ((2, 1.5), (0, -0.5))})
    assert [dict(rule.weights[3])[2] for rule in moved.rules] == pytest.approx([1.3, 1.7])


def test_rules_that_compute_other_steps_are_moved_apart() -> None:
    more = {3: ((2, 2.0), (1, -1.0))}
    plan = Plan(4, (forecast("C.C.", "attn", ATTN), forecast("CCC.", "mlp", more)))
    middle, with_mean = together(plan)
    assert sorted(middle) == [(1, 0), (3, 0), (3, 1)]
    assert with_mean(middle) == plan
    attn, mlp = with_mean({**middle, (3, 1): ((2, 2.5), (1, -1.5))}).rules
    assert (attn, dict(mlp.weights[3])) == (plan.rules[0], {2: 2.5, 1: -1.5})


def test_a_form_computes_as_many_steps_as_a_share_allows() -> None:
    anatomy = written(6)
    body, *_, last_two = forms_of(anatomy)
    assert (body, last_two.blocks) == (Form("forecast of the body", "skip"), "0-3")
    assert (body.block_range(anatomy), last_two.block_range(anatomy)) == ((0, 5), (0, 3))
    # Of 800 MACs a step, 200 lie outside of the blocks, and 100 are each block's: (0.6 * 8000 - 2000) / 600 is above 4.
    counts = [form.most_computed(anatomy, Target("Toy"), 10, 0.6) for form in (body, last_two)]
    assert counts == [4, 2]
    assert last_two.most_computed(anatomy, Target("Toy"), 10, 0.5) is None
