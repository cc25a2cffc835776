"""What the steps of a gap err together, where an expansion of the last computed outputs stands in for them."""

from itertools import pairwise, product
from typing import Literal

import numpy as np

from dicache.calibrate.chains import GapCosts
from dicache.schedules.predicting import taylor_coefficients

Aggregate = Literal["squares", "norms"]


def gap_costs(
    gram: np.ndarray, order: int, aggregate: Aggregate = "norms", weights: np.ndarray | None = None
) -> GapCosts:
    """Return what the steps of a gap err together, if a Taylor expansion predicts them from the last computed ones.

    A prediction is a weighted sum of computed outputs, so its squared error is a quadratic form of the products. It is
    relative to the squared size of the output that it stands for.

    Args:
        gram: Products of the outputs of all steps with one another, (steps, steps), finite, positive on the diagonal.
        order: Of the expansion, 0 for holding; lower where fewer than `order + 1` steps were computed.
        aggregate: Whether the squares are added up, or their roots.
        weights: Of each step's squared error, (steps,); 1 where none are given.
    """
    steps = len(gram)
    scale = (np.ones(steps) if weights is None else weights) / np.diagonal(gram)
    expansions = [_expansions(reached, steps) for reached in range(1, order + 1)]

    def costs(last: int) -> np.ndarray:
        error = _squared_errors(gram, expansions, last) * scale[last + 1 :]
        total = np.cumsum(error if aggregate == "squares" else np.sqrt(error), axis=-1)
        return np.concatenate((np.zeros((*total.shape[:-1], 1)), total), axis=-1)

    return costs


def _expansions(order: int, steps: int) -> np.ndarray:
    """Return the coefficients of the differences in a Taylor expansion, as polynomials in the distance.

    They depend on distances alone, and vanish at the last computed step: as many steps behind it as the order say all.

    Returns:
        For each distance between successive computed steps, the newest first, each from 1 to steps - 1, of the powers 1
        to `order` of the distance, the coefficients: (distances, ..., powers, order).
    """
    table = np.zeros((steps,) * order + (order, order))
    ahead = np.arange(1, order + 1)
    powers = np.linalg.inv(ahead[:, None] ** ahead.astype(float))
    for distances in product(range(1, steps), repeat=order):
        if sum(distances) < steps:
            computed = [-sum(distances[:m]) for m in range(order + 1)]
            table[distances] = powers @ [taylor_coefficients(computed, int(step)) for step in ahead]
    return table


def _squared_errors(gram: np.ndarray, expansions: list[np.ndarray], last: int) -> np.ndarray:
    """Return the squared errors of all steps behind a computed one, for all choices of the ones computed before it.

    Returns:
        (older + 1, ..., steps - last - 1), the oldest first; 0 where no such steps can be.
    """
    order, steps = len(expansions), len(gram)
    later = np.arange(last + 1, steps)
    size = gram[later, later]
    if order == 0:
        return np.asarray(np.maximum(gram[last, last] - 2 * gram[last, later] + size, 0))
    errors = np.zeros((last + 1,) * order + (len(later),))
    errors[0] = _squared_errors(gram, expansions[:-1], last)
    if last < order:  # fewer are before it
        return errors
    grids = np.ogrid[(slice(0, last),) * order]  # the older steps, the oldest first
    computed = [np.array(last), *reversed(grids)]  # the last first
    distances = [newer - older for newer, older in pairwise(computed)]
    rising = np.logical_and.reduce(np.broadcast_arrays(*(d > 0 for d in distances)))
    found = expansions[-1][tuple(np.maximum(d, 0) for d in distances)]  # (older, ..., powers, order)
    ahead = (later - last)[:, None] ** np.arange(1.0, order + 1)  # (later, powers)
    c = np.moveaxis(ahead @ found, -1, 0)  # (order, older, ..., later)
    weights = [1 + c[0], *(c[m] - c[m - 1] for m in range(1, order)), -c[order - 1]]
    total = np.broadcast_to(size, c.shape[1:]).copy()
    for i, one in enumerate(computed):
        total += weights[i] * (weights[i] * gram[one, one][..., None] - 2 * gram[one[..., None], later])
        for j, two in enumerate(computed[:i]):
            total += 2 * weights[i] * weights[j] * gram[one, two][..., None]
    errors[(slice(1, None),) * order] = np.where(rising[..., None], np.maximum(total, 0), 0)
    return errors
