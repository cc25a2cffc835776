from dataclasses import replace

import numpy as np
import pytest

from dicache.figures.convergence import branch_convergence, cost_of_holding
from dicache.figures.palette import BLUE, ORANGE
from dicache.profiler import Profile, ProfileError
from tests.figures.synthetic import profile

STEPS = 4


def made(grams: np.ndarray) -> Profile:
    """One run of two blocks; from step to step all outputs keep their size and have a cosine of 0.5."""
    known = profile(np.ones((1, 1, STEPS, 2)), similarity=np.full((1, 1, STEPS, 2, 2, 1), 0.5))
    return replace(known, arrays={**known.arrays, "body/branches": grams})


def test_what_never_changes_costs_nothing_to_hold() -> None:
    assert cost_of_holding(np.full((1, 3, 3), 4.0)).tolist() == [[0, 0]]


def test_the_cost_of_holding_is_the_mean_over_the_steps_that_are_left() -> None:
    values = np.array([1.0, 2.0, 4.0])  # held from step 1 on: |2 - 1| / 2 and |4 - 1| / 4
    assert cost_of_holding(np.outer(values, values)[None]) == pytest.approx(np.array([[(0.5 + 0.75) / 2, 0.5]]))


def test_each_kind_of_branch_is_a_line_in_its_own_colour() -> None:
    stepwise, onwards = branch_convergence(made(np.full((1, 2, STEPS, STEPS), 4.0))).axes
    attn, mlp = stepwise.lines
    assert (attn.get_label(), attn.get_color(), mlp.get_label(), mlp.get_color()) == ("attn", BLUE, "mlp", ORANGE)
    assert attn.get_ydata() == pytest.approx(np.ones(3))  # |x - y|^2 = 2 - 2 * 0.5 of |x|^2
    assert onwards.lines[0].get_ydata() == pytest.approx(np.zeros(3))
    assert np.asarray(attn.get_xdata()).tolist() == [1, 2, 3]


def test_guidance_that_is_no_weighted_sum_is_refused() -> None:
    with pytest.raises(ProfileError, match="is no weighted sum of its passes"):
        branch_convergence(made(np.full((1, 2, STEPS, STEPS), np.nan)))
