"""The calibrated forecast: weights that keep the error small that skipped steps leave in the latents together."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dicache.calibrate.chains import cheapest_chains
from dicache.calibrate.gaps import gap_costs
from dicache.calibrate.methods import CalibrationError
from dicache.schedules.plan import Weights

NONE = -1  # in the place of a computed step where there are fewer of them


@dataclass(frozen=True)
class Forecast:
    """What stands in at the skipped steps of a plan, and how it is expected to err.

    Attributes:
        weights: For each skipped step, those of the last computed outputs, the last one first.
        errors: Of each step's output, relative to it, (steps,); 0 where it is computed.
        accumulated: What the errors of all steps so far add up to in the last latents, (steps,).
    """

    weights: Mapping[int, Weights]
    errors: np.ndarray
    accumulated: np.ndarray


@dataclass(frozen=True)
class Forecaster:
    """Finds the weights of forecasts in closed form, for any choice of computed steps.

    The outputs r of an uncached run are foretold with an error d = sum over m of w_m r_m - r_t, which adds
    `effects[t] d` to the error e that the steps before have left in the last latents. Cached, the outputs held are of
    latents that err already, to which the model has responded: each has an error of its own, of the squared size
    n_m = (reaction[m] |e at m|)^2, taken as independent of all else. Large weights multiply it. The weights, which add
    up to one, minimise

        |e + effects[t] d|^2 + own * max(effects[t], median effect)^2 |d|^2
            + (the same factors) * (sum of w_m^2 n_m + ridge * sum of w_m^2 but the first)

    The first term lets a step take back what those before it did, which plain least squares does not: its small errors
    all point the same way. The second keeps it from doing so at any price. All follow from the outputs' products.

    Attributes:
        gram: Products of the outputs of all steps with one another, (steps, steps).
        effects: What an error of each step's output changes in the last latents, (steps,).
        reaction: How much the output of each step changes with the latents, (steps,).
        outputs: How many of the last computed outputs are added up at most.
        own: Weight of the step's own error.
        ridge: Of weights away from holding, as a share of the mean squared size of the outputs.
    """

    gram: np.ndarray
    effects: np.ndarray
    reaction: np.ndarray
    outputs: int = 3
    own: float = 0.1
    ridge: float = 1e-5

    def forecast(self, computed: Collection[int]) -> Forecast:
        """Return the forecasts of the steps that are not computed; step 0 is."""
        mask = np.zeros((1, len(self.gram)), dtype=bool)
        mask[0, list(computed)] = True
        sources, weights, errors, total = (found[0] for found in self._solve(mask))
        return Forecast(
            {
                t: tuple((int(s), float(w)) for s, w in zip(sources[t], weights[t], strict=True) if s != NONE)
                for t in np.flatnonzero(~mask[0]).tolist()
            },
            np.sqrt(errors / np.diagonal(self.gram)),
            np.sqrt(total),
        )

    def costs(self, masks: np.ndarray) -> np.ndarray:
        """Return the squared error that each of n choices leaves in the last latents, (n,).

        Args:
            masks: Which steps are computed, (n, steps).
        """
        return self._solve(masks)[3][:, -1]

    def _solve(self, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the steps added up, (n, steps, outputs), their weights, squared errors and accumulated ones."""
        (n, steps), size, gram = masks.shape, self.outputs, self.gram
        sources = np.full((n, steps, size), NONE)
        weights, errors, total = np.zeros((n, steps, size)), np.zeros((n, steps)), np.zeros((n, steps))
        held = np.full((n, size), NONE)
        noise = np.zeros((n, size))  # of the outputs held, squared
        along = np.zeros((n, steps))  # products of the accumulated error with all outputs
        so_far = np.zeros(n)  # its square, with the noise
        for t in range(steps):
            taken, skipped = masks[:, t], np.flatnonzero(~masks[:, t])
            if len(skipped):
                last, rho, before, effect = held[skipped], noise[skipped], along[skipped], self.effects[t]
                weight = self._weights(t, last, rho, before)
                places = np.where(last == NONE, 0, last)  # their weights are 0
                change = np.einsum("nk,nks->ns", weight, gram[places]) - gram[t]  # products of d with all outputs
                size_of_d = np.einsum("nk,nk->n", weight, np.take_along_axis(change, places, 1)) - change[:, t]
                inner = np.einsum("nk,nk->n", weight, np.take_along_axis(before, places, 1)) - before[:, t]
                passed_on = (weight**2 * rho).sum(axis=1)
                errors[skipped, t] = np.maximum(size_of_d, 0) + passed_on
                so_far[skipped] += 2 * effect * inner + effect**2 * errors[skipped, t]
                so_far = np.maximum(so_far, 0)
                along[skipped] += effect * change
                sources[skipped, t], weights[skipped, t] = last, weight
            fresh = self.reaction[t] ** 2 * so_far[taken, None]
            noise[taken] = np.concatenate([fresh, noise[taken, :-1]], axis=1)
            held[taken] = np.concatenate([np.full((taken.sum(), 1), t), held[taken, :-1]], axis=1)
            total[:, t] = so_far
        return sources, weights, errors, total

    def _weights(self, step: int, held: np.ndarray, noise: np.ndarray, along: np.ndarray) -> np.ndarray:
        """Return the weights of the outputs held, (n, outputs), 0 where there are fewer.

        Args:
            step: The one to predict.
            held: Steps of the outputs held, the last one first, (n, outputs).
            noise: Their squared errors, (n, outputs).
            along: Products of the accumulated error with all outputs, (n, steps).
        """
        gram, effect = self.gram, self.effects[step]
        there = held[:, 1:] != NONE
        old, new = np.where(there, held[:, 1:], 0), held[:, :1]
        # The forecast is the last output and, added to it, weighted differences of the older ones to it.
        across = gram[old, new]
        system = gram[old[:, :, None], old[:, None, :]] - across[:, :, None] - across[:, None, :]
        system += (gram[new, new] + noise[:, :1])[:, :, None]
        system *= there[:, :, None] & there[:, None, :]
        ridge = self.ridge * np.trace(gram) / len(gram)
        system += np.eye(self.outputs - 1) * np.where(there, ridge + noise[:, 1:], 1.0)[:, None, :]
        held_error = across - gram[old, step] - gram[new, new] + gram[new, step] - noise[:, :1]
        toward = np.take_along_axis(along, old, 1) - np.take_along_axis(along, new, 1)
        scale = effect**2 + self.own * max(abs(effect), float(np.median(np.abs(self.effects)))) ** 2
        target = -(held_error + effect / scale * toward) * there
        moved = np.linalg.solve(system, target[..., None])[..., 0]
        return np.concatenate([1 - moved.sum(axis=1, keepdims=True), moved], axis=1)


def best_choice(
    forecasters: Sequence[Forecaster], count: int, *, mandatory: Collection[int] = (0,), max_gap: int | None = None
) -> tuple[int, ...]:
    """Return the computed steps, `count` of them, whose accumulated errors are small together.

    What accumulates is no sum over gaps, so that no dynamic program is exact. It starts from the evenly spread steps
    and from the chain that is exact for the weighed errors of an expansion, and moves one step after another to
    wherever that lowers the error most, until no move does.

    Args:
        forecasters: One, or one for each kind of branch; their squared errors are added up.
        count: How many steps are computed.
        mandatory: Steps that are; the first always is.
        max_gap: Most steps from a computed one to the next, or to the end; None sets no limit.

    Raises:
        CalibrationError: If so many steps cannot be chosen under these limits.
    """
    steps, needed = len(forecasters[0].gram), sorted({0, *mandatory})

    weighed = [gap_costs(f.gram, 1, "squares", f.effects**2 * np.diagonal(f.gram)) for f in forecasters]

    def sums(last: int) -> np.ndarray:
        return np.asarray(sum(cost(last) for cost in weighed))

    chains = cheapest_chains(sums, steps, 2, mandatory=needed, max_gap=max_gap)
    if count not in chains:
        raise CalibrationError(
            f"dp: {count} of {steps} steps cannot be computed; possible are {min(chains)} to {steps}"
        )
    even = np.zeros((1, steps), dtype=bool)
    even[0, [i * steps // count for i in range(count)]] = True
    starts = [np.isin(np.arange(steps), chains[count].steps)]
    starts += [row for row in even if row[needed].all() and _allowed(even, max_gap)[0]]
    found = [_improved(forecasters, start, needed, max_gap) for start in starts]
    return tuple(np.flatnonzero(min(found, key=lambda pair: pair[0])[1]).tolist())


def _improved(
    forecasters: Sequence[Forecaster], chosen: np.ndarray, needed: Sequence[int], max_gap: int | None
) -> tuple[float, np.ndarray]:
    """Return the squared error and the choice that moves of one step lead to."""
    best = sum(float(f.costs(chosen[None])[0]) for f in forecasters)
    while True:
        out, into = np.setdiff1d(np.flatnonzero(chosen), needed), np.flatnonzero(~chosen)
        moves = np.repeat(chosen[None], len(out) * len(into), axis=0)
        moves[np.arange(len(moves)), np.repeat(out, len(into))] = False
        moves[np.arange(len(moves)), np.tile(into, len(out))] = True
        moves = moves[_allowed(moves, max_gap)]
        if not len(moves):
            return best, chosen
        costs = np.sum([f.costs(moves) for f in forecasters], axis=0)
        place = int(costs.argmin())
        if costs[place] >= best * (1 - 1e-9):
            return best, chosen
        best, chosen = float(costs[place]), moves[place]


def _allowed(masks: np.ndarray, max_gap: int | None) -> np.ndarray:
    """Return which choices leave no more than `max_gap - 1` steps in a row out, (n,)."""
    if max_gap is None:
        return np.ones(len(masks), dtype=bool)
    run, longest = np.zeros(len(masks), dtype=int), np.zeros(len(masks), dtype=int)
    for column in masks.T:
        run = np.where(column, 0, run + 1)
        longest = np.maximum(longest, run)
    return longest < max_gap


def agreement(predicted: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """Return how well predicted errors agree with measured ones: the correlation of their logarithms, and the median
    ratio predicted / measured, over all places where both are above zero.

    Args:
        predicted: Such as `accumulated`, of one plan's steps or of the ends of many plans, (n,).
        measured: Such as the evaluation's latent errors, (n,).
    """
    both = (predicted > 0) & (measured > 0)
    one, two = np.log(predicted[both]), np.log(measured[both])
    return float(np.corrcoef(one, two)[0, 1]), float(np.exp(np.median(one - two)))
