"""What leaving out steps does: exact where the images answer linearly, and a search that finds the best steps."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from dicache.calibrate.sensitivity import BACK, Effect, Forecasts, Sensitivity, before, line, numbers

STEPS, RUNS, PIXELS = 7, 3, 40
RANDOM = np.random.default_rng(0)
# Residuals on a smooth curve of two directions, so that two nudges of a step tell all of its answers.
TIMES = np.linspace(0, 1, STEPS)
CURVE = np.stack([np.exp(2 * TIMES), np.cos(2 * TIMES)], axis=1)  # (steps, 2)
ANSWERS = RANDOM.normal(size=(STEPS, RUNS, PIXELS, 2))  # of the images to an error of each step's residual


def change(step: int, weights: Sequence[tuple[int, float]]) -> np.ndarray:
    error = sum((weight * CURVE[source] for source, weight in weights), start=-CURVE[step])
    answer: np.ndarray = ANSWERS[step] @ error
    return answer


def measured() -> Sensitivity:
    effects = []
    for step in range(1, STEPS):
        sources = list(range(step - 1, max(step - BACK, 0) - 1, -1))
        for slope in (0.0, 0.5) if len(sources) > 1 else (0.0,):
            weights = ((sources[0], 1 + slope), *((s, 0.0) for s in sources[1:-1]))
            if len(sources) > 1:
                weights = (*weights, (sources[-1], -slope))
            effects.append(Effect(step, weights, change(step, weights)))
    return Sensitivity(effects, CURVE @ CURVE.T)


def literal(forecasts: Forecasts) -> np.ndarray:
    total: np.ndarray = sum(
        (change(step, weights) for step, weights in forecasts.items()), start=np.zeros((RUNS, PIXELS))
    )
    return total


def relative(sensitivity: Sensitivity, images: np.ndarray) -> float:
    return float((images**2 / sensitivity._sizes[:, None]).mean())


@pytest.mark.parametrize("computed", [[0, 1, 2, 4], [0, 2, 3, 5], [0, 1, 6]])
def test_the_foretold_error_is_that_of_images_that_answer_linearly(computed: list[int]) -> None:
    sensitivity = measured()
    forecasts, error = sensitivity.forecasts(computed, 2, 0.1)
    assert error == pytest.approx(relative(sensitivity, literal(forecasts)), rel=1e-4)


def test_no_other_weights_leave_a_smaller_error_where_nothing_holds_them() -> None:
    sensitivity = measured()
    forecasts, error = sensitivity.forecasts([0, 1, 3, 4], 3, 0.0)
    for step in forecasts:
        for place in range(1, len(forecasts[step])):
            for by in (-0.05, 0.05):
                moved = [list(pair) for pair in forecasts[step]]
                moved[0][1] -= by
                moved[place][1] += by
                other = {**forecasts, step: tuple((int(s), w) for s, w in moved)}
                assert relative(sensitivity, literal(other)) >= error * (1 - 1e-4)
    assert all(sum(weight for _, weight in weights) == pytest.approx(1) for weights in forecasts.values())


def test_weights_that_are_held_fast_are_those_of_a_line() -> None:
    forecasts, _ = measured().forecasts([0, 1, 3], 3, 1e9)
    assert [weight for _, weight in forecasts[2]] == pytest.approx([2.0, -1.0], abs=1e-6)
    assert [weight for _, weight in forecasts[5]] == pytest.approx([2.0, -1.0, 0.0], abs=1e-6)
    assert line([4], 6) == [1.0]
    assert before([0, 2, 3, 5], 4, 2) == [3, 2]


def test_the_best_steps_are_those_that_trying_all_finds() -> None:
    sensitivity = measured()

    def error(steps: Sequence[int]) -> float:
        return sensitivity.forecasts(steps, 2, 0.1)[1]

    every = [(0, *rest) for rest in combinations(range(1, STEPS), 3)]
    starts = [every[0], every[-1], every[len(every) // 2]]
    found = sensitivity.best_steps(starts, error)
    assert error(found[0]) == pytest.approx(min(map(error, every)), rel=1e-9)


def test_what_the_measured_outputs_do_not_span_counts_as_noise() -> None:
    sensitivity = measured()
    rough = Sensitivity(sensitivity.effects, CURVE @ CURVE.T + 0.05 * np.eye(STEPS))
    assert rough.forecasts([0, 1, 4], 2, 0.1)[1] > sensitivity.forecasts([0, 1, 4], 2, 0.1)[1]


def test_large_images_are_projected_so_that_products_stay() -> None:
    small = RANDOM.normal(size=(2, 8, 8, 3))
    assert np.array_equal(numbers(small), small.reshape(2, -1))
    large = RANDOM.normal(size=(2, 300, 300, 3))
    made, flat = numbers(large), large.reshape(2, -1)
    assert made.shape == (2, 1 << 16)
    assert made @ made.T == pytest.approx(flat @ flat.T, abs=0.01 * (flat[0] @ flat[0]))
