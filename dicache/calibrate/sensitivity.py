"""What skipping steps does to the finished images: measured step by step, and foretold for any choice of steps."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from dicache.anatomy import Anatomy
from dicache.calibrate.keeping import Kept
from dicache.calibrate.methods import CalibrationError
from dicache.evaluate.rerunning import Beginning, Reruns
from dicache.profiler import Profile
from dicache.schedules import Plan, Rule, Schedule, Target
from dicache.schedules.plan import Weights
from dicache.schedules.predicting import taylor_coefficients

BACK = 3  # how many steps back a line is drawn from: it and its slope span nearly all outputs that lie between
NUDGE = 0.25  # of the line's slope, to see what that does
NUMBERS = 1 << 16  # of an image or video that are compared; larger ones are projected to as many
FLOOR = 1e-4  # of what the weight that does most does: weights that do next to nothing stay
TINY = 1e-9  # of the mean square, that keeps equations solvable

Forecasts = dict[int, Weights]  # for each step that is not computed, the weights of those it is made of


@dataclass(frozen=True)
class Effect:
    """What one step that is not computed does to the finished images.

    Attributes:
        step: Which.
        weights: Of the outputs that it is made of.
        change: Of the images, (runs, numbers).
    """

    step: int
    weights: Weights
    change: np.ndarray

    def apart(self, steps: int) -> np.ndarray:
        """Return by how much it differs from the step's own output, as a sum over the outputs of all steps."""
        difference: np.ndarray = -np.eye(steps)[self.step]
        for source, weight in self.weights:
            difference[source] += weight
        return difference


@dataclass(frozen=True)
class Sensitivity:
    """How the finished images change when steps are not computed.

    Attributes:
        effects: Of single steps.
        gram: Products of all steps' body residuals with one another, a mean over runs, (steps, steps).

    What several steps do together is taken for the sum of what each does alone, and what an output does that was not
    measured for the weighted sum of those that were, by least squares over the residuals; what these leave is taken for
    noise, of the size that the measured outputs had for their length.
    """

    effects: Sequence[Effect]
    gram: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.gram)

    @cached_property
    def _pairs(self) -> dict[tuple[int, int], int]:
        pairs = ((step, source) for step in range(1, self.steps) for source in range(step))
        return {pair: place for place, pair in enumerate(pairs)}

    @cached_property
    def _sizes(self) -> np.ndarray:
        """Mean square of each image's change where one step is left out, a mean over steps."""
        sizes = np.mean([(effect.change**2).mean(axis=1) for effect in self.effects], axis=0)
        floored: np.ndarray = np.maximum(sizes, max(TINY * sizes.max(), 1e-300))
        return floored

    @cached_property
    def _products(self) -> np.ndarray:
        """Products of the effects of all pairs of a step and its source with one another: (pairs, pairs)."""
        weights = np.sqrt(1 / self._sizes)[:, None]  # no image counts more for having changed more
        count = self.effects[0].change.size
        changes = np.stack([(effect.change * weights).ravel() for effect in self.effects])
        measured = changes @ changes.T  # of the effects that were measured, of which all others are sums
        parts = np.zeros((len(self._pairs), len(self.effects)))
        noise = np.zeros((len(self._pairs), len(self._pairs)))
        for step in range(1, self.steps):
            given = [place for place, effect in enumerate(self.effects) if effect.step == step]
            known = np.stack([self.effects[place].apart(self.steps) for place in given])  # (given, steps)
            apart = np.eye(self.steps)[:step] - np.eye(self.steps)[step]  # of each output before, (sources, steps)
            square = known @ self.gram @ known.T
            square += TINY * np.trace(square) * np.eye(len(given))
            shares = np.linalg.solve(square, known @ self.gram @ apart.T).T  # (sources, given)
            places = slice(self._pairs[step, 0], self._pairs[step, 0] + step)
            parts[places, given] = shares
            rest = apart - shares @ known
            gain = np.trace(measured[np.ix_(given, given)]) / count / max(float(np.trace(square)), 1e-300)
            noise[places, places] = gain * (rest @ self.gram @ rest.T)
        products: np.ndarray = parts @ measured @ parts.T / count + noise
        return products

    def forecasts(self, computed: Sequence[int], outputs: int, ridge: float) -> tuple[Forecasts, float]:
        """Return the weights that leave the smallest change of the images, and how large it is expected to be.

        Args:
            computed: Steps, rising, the first of them 0.
            outputs: Most outputs that a step is made of.
            ridge: How strongly the weights are held near those of a line through the last two outputs, as a share of
                what each weight does; it keeps weights small that do the same as others together.

        Returns:
            The weights; the mean square of the images' change, relative to that of a step left out alone.
        """
        pairs: list[int] = []
        start: list[float] = []
        moves: list[tuple[int, int]] = []  # a weight that grows, and that of the newest output, which shrinks
        where: list[tuple[int, list[int]]] = []
        for step in sorted(set(range(self.steps)) - set(computed)):
            sources = before(computed, step, outputs)
            first = len(pairs)
            pairs += [self._pairs[step, source] for source in sources]
            start += line(sources, step)
            moves += [(first + place, first) for place in range(1, len(sources))]
            where.append((step, sources))
        products = self._products[np.ix_(pairs, pairs)]
        weights = np.array(start)
        if moves:
            grow, shrink = np.array(moves).T
            change = products[grow] - products[shrink]  # (moves, pairs)
            square = change[:, grow] - change[:, shrink]
            held = square + np.diag(ridge * np.diag(square) + FLOOR * np.diag(square).max() + 1e-300)
            found = np.linalg.solve(held, -change @ weights)
            np.add.at(weights, grow, found)
            np.add.at(weights, shrink, -found)
        forecasts: Forecasts = {}
        given = iter(weights.tolist())
        for step, sources in where:
            forecasts[step] = tuple((source, next(given)) for source in sources)
        return forecasts, float(weights @ products @ weights)

    def best_steps(self, starts: Iterable[Sequence[int]], error: Callable[[Sequence[int]], float]) -> list[list[int]]:
        """Return, for each start, the steps that no exchange of one for another improves, the best first.

        Args:
            starts: Steps that are computed.
            error: Of steps.
        """
        found: dict[tuple[int, ...], float] = {}
        for start in starts:
            here, best = tuple(start), error(start)
            while True:
                others = [
                    tuple(sorted({*here, new} - {old}))
                    for old in here[1:]
                    for new in range(1, self.steps)
                    if new not in here
                ]
                tried = [(error(steps), steps) for steps in others]
                if not tried or min(tried)[0] >= best:
                    break
                best, here = min(tried)
            found[here] = best
        return [list(steps) for steps in sorted(found, key=lambda steps: found[steps])]


def before(computed: Iterable[int], step: int, outputs: int) -> list[int]:
    """Return the last steps computed before a step, the last one first."""
    return sorted((one for one in computed if one < step), reverse=True)[:outputs]


def line(sources: Sequence[int], step: int) -> list[float]:
    """Return the weights of a line through the last two outputs, at a step; the others have none."""
    return [weight for _, weight in expansion(sources[:2], step)] + [0.0] * (len(sources) - 2)


def expansion(sources: Sequence[int], step: int) -> Weights:
    """Return the weights of the outputs in TaylorSeer's expansion."""
    weights = [1.0, *[0.0] * (len(sources) - 1)]
    for place, coefficient in enumerate(taylor_coefficients(sources, step) if len(sources) > 1 else ()):
        weights[place] += coefficient
        weights[place + 1] -= coefficient
    return tuple(zip(sources, weights, strict=True))


def mean_gram(profile: Profile) -> np.ndarray:
    """Return the products of all steps' guided body residuals with one another, a mean over runs of equal weight.

    Raises:
        CalibrationError: If the profile does not have them at every step.
    """
    grams = profile.arrays["body/gram"]
    known = grams[np.isfinite(grams).all(axis=(1, 2))]
    if not len(known):
        raise CalibrationError(
            "auto: the profile has no products of the body's residuals of all steps: what the sampler was given is no "
            "weighted sum of the guidance passes at some step. Profile without what changes it"
        )
    sizes = np.trace(known, axis1=1, axis2=2)[:, None, None]
    mean: np.ndarray = (known / sizes).mean(axis=0)
    return mean


def measure(
    runs: Reruns,
    anatomy: Anatomy,
    target: Target,
    gram: np.ndarray,
    told: Callable[[], object],
    kept: Kept,
    *,
    nudged: bool = True,
) -> Sensitivity:
    """Leave out each step alone, and see what that does.

    Args:
        runs: On which it is tried.
        anatomy: The model's.
        target: What the schedules are for.
        gram: Products of all steps' guided body residuals with one another, (steps, steps).
        told: Called after each replay.
        kept: Where the effects are kept.
        nudged: Whether each step is left out a second time, with a steeper line in its place.

    Raises:
        CalibrationError: If what comes out is not finite.
    """
    steps = len(gram)
    effects: list[Effect] = []
    for step in range(1, steps):
        sources = range(step - 1, max(step - BACK, 0) - 1, -1)
        slope = 1 / (sources[0] - sources[-1]) if len(sources) > 1 else 0.0
        for more in (0.0, NUDGE) if slope and nudged else (0.0,):
            given = {**dict.fromkeys(sources, 0.0), sources[0]: 1 + slope + more}
            given[sources[-1]] -= slope + more
            weights = tuple(given.items())
            letters = "".join("." if place == step else "C" for place in range(steps))
            plan = Plan(steps, (Rule("skip", letters, predictor="forecast", weights={step: weights}),))
            schedule = Schedule("auto", {}, anatomy, target, steps, plan)
            known = Beginning(runs.uncached, range(sources[-1]))
            change = kept.get(
                f"{step}-{more:g}",
                runs,
                lambda: numbers(runs(schedule, known).images) - numbers(runs.uncached.images),  # noqa: B023 # called at once
            )
            if not np.isfinite(change).all():
                raise CalibrationError(f"the images are not finite where step {step} is not computed")
            effects.append(Effect(step, weights, change))
            told()
    return Sensitivity(effects, gram)


def numbers(images: np.ndarray) -> np.ndarray:
    """Return the numbers of each image, in float64; of large ones, a seeded random projection that keeps products.

    Args:
        images: Shape (n, ...).
    """
    rows: np.ndarray = images.reshape(len(images), -1).astype(np.float64)
    size = rows.shape[1]
    if size <= NUMBERS:
        return rows
    places, signs = _projection(size)
    return np.stack([np.bincount(places, row * signs, minlength=NUMBERS) for row in rows])


@lru_cache(maxsize=1)
def _projection(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the one place that each number is added to, and the random sign that it has there."""
    random = np.random.default_rng(0)
    return random.integers(NUMBERS, size=size, dtype=np.int32), random.choice(np.array([-1, 1], np.int8), size=size)
