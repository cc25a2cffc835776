"""Predictors as numbers: with which weights the last computed outputs foretell one that is not computed."""

from collections.abc import Sequence
from itertools import pairwise
from math import factorial

import numpy as np


def taylor_coefficients(computed: Sequence[int], step: int) -> tuple[float, ...]:
    """Return what TaylorSeer's expansion weighs the differences of successive computed outputs with.

    With outputs F_0 (the last), F_1, ... of the computed steps k_0 > k_1 > ..., the prediction is
    `F_0 + sum over m of c_m (F_(m-1) - F_m)`. In this form an order of 0 is the last output bit for bit, and what is
    added is small, so that it costs little precision. The published rule divides the differences of successive
    derivatives by the distance of the newer two steps, f_(j+1)(k) = (f_j(k) - f_j(k')) / (k - k'), and takes them as
    derivatives. It is exact on lines; of a curve it keeps an error of the first order in the distance.

    Args:
        computed: The steps k_0, k_1, ..., the last one first: one more than the order of the expansion.
        step: The one to predict, later than all of them.

    Returns:
        c_1 to c_n, n = len(computed) - 1.

    References:
        TaylorSeer, arXiv 2503.06923, equations 2 and 3.
    """
    order = len(computed) - 1
    distances = [newer - older for newer, older in pairwise(computed)]
    # Row m: the derivative at step k_m, of the order that is in turn, as a sum of the differences.
    derivative = np.eye(order) / np.array(distances)[:, None] if order else np.zeros((0, 0))
    total = np.zeros(order)
    for j in range(1, order + 1):
        total += derivative[0] * (step - computed[0]) ** j / factorial(j)
        derivative = (derivative[:-1] - derivative[1:]) / np.array(distances[: order - j])[:, None]
    return tuple(total.tolist())


def as_differences(weights: Sequence[float]) -> tuple[tuple[float, ...], float]:
    """Return c_1 to c_n and s, with which `s F_0 + sum over m of c_m (F_(m-1) - F_m)` is the sum of w_m F_m.

    Args:
        weights: w_0 to w_n, of the last output first.
    """
    return tuple(-sum(weights[m:]) for m in range(1, len(weights))), sum(weights)
