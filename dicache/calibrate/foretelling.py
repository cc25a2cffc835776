"""What tells the weights of a plan's forecasts, and which plans are best, without running them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np

from dicache.calibrate.dp import BODY, Dp
from dicache.calibrate.forecast import Forecaster, best_choice
from dicache.calibrate.sensitivity import Forecasts, Sensitivity
from dicache.profiler import Profile
from dicache.schedules.plan import Action

RIDGE = 0.1  # with which plans are compared by what was measured


class Foretelling(Protocol):
    """Tells weights in closed form."""

    @property
    def name(self) -> str:
        """Where the weights come from, in words."""

    @property
    def trades(self) -> Sequence[float]:
        """Values of what keeps the weights from flattering themselves, that are worth a try."""

    @property
    def orders(self) -> bool:
        """Whether fewer outputs than can be had are worth a try."""

    def kinds(self, action: Action) -> Sequence[str]:
        """Return the kinds of branch that have weights of their own; of blocks that are skipped, the body."""

    def best(self, action: Action, count: int, outputs: int, trade: float) -> tuple[int, ...]:
        """Return the steps, so many, that are foretold to leave the smallest error when they are computed."""

    def errors(self, action: Action, choices: Sequence[Collection[int]], outputs: int, trade: float) -> np.ndarray:
        """Return how large an error each choice of computed steps is foretold to leave, in any unit."""

    def weights(self, kind: str, computed: Sequence[int], outputs: int, trade: float) -> Forecasts:
        """Return the weights of all other steps."""


@dataclass(frozen=True, eq=False)
class OfProfile:
    """By the profile's products and the solver's coefficients; the trade is what each step's own error counts."""

    profile: Profile
    name: ClassVar[str] = "profile and solver"
    trades: ClassVar[Sequence[float]] = (0.1, 1.0)
    orders: ClassVar[bool] = True
    _forecasters: dict[str, dict[str, Forecaster]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raise a CalibrationError where the profile or its sampler does not tell them."""
        body = Dp(steps_computed=1, predictor="forecast").forecasters(self.profile)
        branches = Dp(steps_computed=1, predictor="forecast", granularity="branch").forecasters(self.profile)
        object.__setattr__(self, "_forecasters", {"skip": body, "reuse": branches})

    def kinds(self, action: Action) -> Sequence[str]:
        return tuple(self._forecasters[action])

    def best(self, action: Action, count: int, outputs: int, trade: float) -> tuple[int, ...]:
        return best_choice(self._set(action, outputs, trade), count)

    def errors(self, action: Action, choices: Sequence[Collection[int]], outputs: int, trade: float) -> np.ndarray:
        masks = np.array([np.isin(np.arange(self.profile.steps), list(chosen)) for chosen in choices])
        errors: np.ndarray = np.sum([each.costs(masks) for each in self._set(action, outputs, trade)], axis=0)
        return errors

    def weights(self, kind: str, computed: Sequence[int], outputs: int, trade: float) -> Forecasts:
        forecaster = {**self._forecasters["skip"], **self._forecasters["reuse"]}[kind]
        return dict(replace(forecaster, outputs=outputs, own=trade).forecast(computed).weights)

    def _set(self, action: Action, outputs: int, trade: float) -> list[Forecaster]:
        return [replace(each, outputs=outputs, own=trade) for each in self._forecasters[action].values()]


@dataclass(frozen=True, eq=False)
class OfEffects:
    """By what leaving out each step alone was measured to do; the trade is how strongly the weights are held."""

    measured: Sensitivity
    outputs: int
    name: ClassVar[str] = "each step alone"
    trades: ClassVar[Sequence[float]] = (0.01, RIDGE, 1.0)
    orders: ClassVar[bool] = False
    _best: dict[int, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    def kinds(self, action: Action) -> Sequence[str]:
        return (BODY,)

    def best(self, action: Action, count: int, outputs: int, trade: float) -> tuple[int, ...]:
        if count not in self._best:
            steps = self.measured.steps
            ends = sorted({*np.round(np.linspace(0, steps - 1, count)).astype(int).tolist()})
            starts = [[place * steps // count for place in range(count)], *([ends] if len(ends) == count else [])]
            found = self.measured.best_steps(starts, lambda chosen: self._error(chosen, self.outputs, RIDGE))
            self._best[count] = tuple(found[0])
        return self._best[count]

    def errors(self, action: Action, choices: Sequence[Collection[int]], outputs: int, trade: float) -> np.ndarray:
        return np.array([self._error(sorted(chosen), outputs, trade) for chosen in choices])

    def weights(self, kind: str, computed: Sequence[int], outputs: int, trade: float) -> Forecasts:
        return self.measured.forecasts(computed, outputs, trade)[0]

    def _error(self, computed: Sequence[int], outputs: int, trade: float) -> float:
        return self.measured.forecasts(computed, outputs, trade)[1]
