"""TaylorSeer's expansion as weights of the differences of successive outputs."""

import pytest

from dicache.schedules.predicting import taylor_coefficients


@pytest.mark.parametrize(
    ("computed", "step", "weights"),
    [
        ((5,), 9, ()),
        ((5, 4), 6, (1.0,)),
        ((5, 4), 7, (2.0,)),
        ((5, 3), 6, (0.5,)),  # half a difference further
        # f1 = D1, f2 = D1 - D2: D1 d + (D1 - D2) d^2 / 2.
        ((2, 1, 0), 3, (1.5, -0.5)),
        ((2, 1, 0), 4, (4.0, -2.0)),
        # f1 = D1 / 2, f2 = (D1 / 2 - D2 / 2) / 2, f3 = (f2(k) - f2(k')) / 2 = (D1 - 2 D2 + D3) / 8.
        ((6, 4, 2, 0), 8, (1 + 0.5 + 1 / 6, -0.5 - 1 / 3, 1 / 6)),
        # Of unequal intervals: f1(5) = D1 / 4, f1(1) = D2, f2(5) = (D1 / 4 - D2) / 4.
        ((5, 1, 0), 7, (0.5 + 4 / 32, -4 / 8)),
    ],
)
def test_the_weights_can_be_found_by_head(computed: tuple[int, ...], step: int, weights: tuple[float, ...]) -> None:
    assert taylor_coefficients(computed, step) == pytest.approx(weights)
