"""What a search tries next: every point of a small space, or what Optuna's sampler draws from a large one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from dicache.anatomy.fingerprint import digest
from dicache.calibrate.judging import ROUNDING, Goal
from dicache.calibrate.methods import Axis, Between, CalibrationError, Space
from dicache.calibrate.studies import DIRECTIONS, distribution
from dicache.schedules import Schedule

LISTED = 1000  # points of a space that are looked at one by one to see how many differ


class NeedlessError(Exception):
    """A point that needs no run.

    Attributes:
        noted: What is kept of it.
    """

    def __init__(self, **noted: Any) -> None:
        super().__init__()
        self.noted = noted


@dataclass(frozen=True)
class Point:
    """Settings to try.

    Attributes:
        parameters: What they are.
        schedule: What they give.
        executes: A name for what that executes, the same for all points that execute the same.
    """

    parameters: Mapping[str, Any]
    schedule: Schedule
    executes: str


@dataclass(frozen=True)
class Drawing:
    """What may be tried.

    Attributes:
        space: What is varied.
        goal: What is sought.
        trials: How many are to be run in all.
        seed: Of the sampler.
    """

    space: Space
    goal: Goal
    trials: int
    seed: int = 0
    distributions: dict[str, BaseDistribution] = field(init=False)

    def __post_init__(self) -> None:
        axes = self.space.axes
        if not axes:
            raise CalibrationError("all settings are given, so there is nothing to search; leave one out")
        object.__setattr__(self, "distributions", {name: distribution(name, axis) for name, axis in axes.items()})

    def point(self, parameters: Mapping[str, Any]) -> Point:
        """Return what some parameters give.

        Raises:
            NeedlessError: If they do not go together, or their plan alone shows that it computes too much.
        """
        try:
            schedule = self.space.schedule(parameters)
        except CalibrationError as error:
            raise NeedlessError(refused=str(error)) from None
        content = schedule.to_json()
        executes = {key: content[key] for key in ("plan", "policy", "corrections") if content.get(key)}
        share = planned_share(schedule)
        if self.goal.max_macs is not None and share > self.goal.max_macs + ROUNDING:
            raise NeedlessError(macs_fraction=share, executes=digest(executes))
        return Point(dict(parameters), schedule, digest(executes))

    @cached_property
    def plain(self) -> dict[str, Any] | None:
        """What calibrating without a search gives, if it can be tried."""
        try:
            plain = dict(self.space.plain(self.goal.max_macs))
        except CalibrationError:
            return None
        return plain if all(_holds(self.space.axes[name], value) for name, value in plain.items()) else None

    @cached_property
    def listed(self) -> tuple[Point, ...] | None:
        """All points that differ, the plain one first; None if there are too many of them to be run one by one."""
        axes = self.space.axes
        finite = {name: tuple(axis) for name, axis in axes.items() if not isinstance(axis, Between)}
        if len(finite) < len(axes) or math.prod(map(len, finite.values())) > LISTED:
            return None
        first = [] if self.plain is None else [self.plain]
        found: dict[str, Point] = {}
        for parameters in (*first, *(dict(zip(finite, values, strict=True)) for values in product(*finite.values()))):
            try:
                point = self.point(parameters)
            except NeedlessError:
                continue
            found.setdefault(point.executes, point)
        return tuple(found.values()) if len(found) <= self.trials else None

    @property
    def points(self) -> int:
        """Of a space that is listed, how many there are."""
        return math.prod(len(axis) for axis in self.space.axes.values() if not isinstance(axis, Between))

    def draw(self, finished: Sequence[FrozenTrial], running: Sequence[FrozenTrial], in_vain: int) -> dict[str, Any]:
        """Return what Optuna's sampler draws, given what is known.

        The draw is made in a study in memory, and seeded by how many there were: it depends on the trials alone, so
        that a search which was killed and resumed draws what an undisturbed one does.

        Args:
            finished: Trials, of which those with a PSNR that is only expected count as if it were measured.
            running: Trials of other workers.
            in_vain: How many of the last draws needed no run. What TPE draws twice it may draw for ever in a small
                space; at random the rest is come upon.
        """
        seed = (self.seed * 1_000_003 + len(finished) + len(running)) % 2**32
        kind = optuna.samplers.RandomSampler if in_vain else optuna.samplers.TPESampler
        study = optuna.create_study(directions=DIRECTIONS, sampler=kind(seed=seed))
        study.add_trials(self._known(finished, running))
        return dict(study.ask(self.distributions).params)

    def _known(self, finished: Sequence[FrozenTrial], running: Sequence[FrozenTrial]) -> Iterator[FrozenTrial]:
        for trial in (*finished, *running):
            expected = trial.user_attrs.get("expected_psnr")
            if expected is None:
                yield trial
                continue
            yield create_trial(
                state=TrialState.COMPLETE,
                values=[trial.user_attrs["macs_fraction"], expected],
                params=trial.params,
                distributions=trial.distributions,
                constraints=trial.constraints,
            )


def planned_share(schedule: Schedule) -> float:
    """Return the least share of the MACs that a plan computes as far as it alone tells; else not a number."""
    if schedule.plan is None or schedule.contexts:
        return math.nan
    return min(schedule.macs_fraction(guided=guided) for guided in (True, False))


def _holds(axis: Axis, value: Any) -> bool:
    return axis.low <= value <= axis.high if isinstance(axis, Between) else value in axis
