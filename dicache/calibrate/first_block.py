"""FirstBlockCache and DBCache: find the threshold on the change of what the first blocks add."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from dicache.anatomy import Anatomy
from dicache.calibrate.methods import Axis, Between, CalibrationError, letters_of, method
from dicache.calibrate.simulating import called_steps, find_limit, macs_fraction, simulate_first_block
from dicache.calibrate.spaces import AimedSpace, PlanSpace
from dicache.profiler import Profile
from dicache.schedules import FirstBlockPolicy, PlanError, Schedule, Target
from dicache.schedules.policies import AtThreshold

USUAL_SPEEDUP, USUAL_THRESHOLD = 1.8, 0.08  # that a search begins with
THRESHOLDS = Between(0.005, 1.0, log=True)  # that a search tries where no profile tells; 0.08 is cache-dit's
LONGEST_WARM_UP = 8  # that a search tries, cache-dit's usual
MOST_LAST = 2  # blocks at the end that a search tries to run always


@method("first-block")
@dataclass(frozen=True)
class FirstBlock:
    """Run the first blocks, and skip those behind them while the first add what they did at the last computed step.

    Attributes:
        threshold: Of the relative L1 distance; None finds it for `target_speedup`.
        target_speedup: How many times fewer multiply-accumulates, on the average of the profile's own runs.
        first: How many blocks at the start always run; 1 is FirstBlockCache.
        last: How many blocks at the end always run.
        max_continuous: How many steps at most are skipped in a row; None sets no limit.
        max_cached: How many steps at most are skipped in a generation; None sets no limit.
        warm_up: How many steps at the start are always computed.
        last_steps: How many steps at the end are.
        at_threshold: Whether a distance equal to the threshold is to `compute` or to `reuse`; see the policy.

    References:
        FirstBlockCache of ParaAttention and of diffusers; DBCache of cache-dit.
    """

    threshold: float | None = None
    target_speedup: float | None = None
    first: int = 1
    last: int = 0
    max_continuous: int | None = None
    max_cached: int | None = None
    warm_up: int = 1
    last_steps: int = 0
    at_threshold: AtThreshold = "compute"

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.target_speedup is None):
            raise CalibrationError(
                "first-block: give either a threshold (such as 0.1) or a target speed-up (such as 1.8)"
            )
        if self.target_speedup is not None and not 1 <= self.target_speedup < np.inf:
            raise CalibrationError(
                f"first-block: the target speed-up must be a number of 1 or more, found {self.target_speedup}"
            )
        try:
            self._policy()
        except PlanError as error:
            raise CalibrationError(str(error)) from None

    def schedule(self, anatomy: Anatomy, target: Target, steps: int) -> Schedule:
        """Return the schedule for a model that was not measured.

        Raises:
            CalibrationError: If there is no threshold, or the model has no such first and last blocks.
        """
        if self.threshold is None:
            raise CalibrationError("first-block: a target speed-up takes a profile to find the threshold on")
        return self._schedule(self._policy(), anatomy, target, steps, {})

    def calibrate(self, profile: Profile) -> Schedule:
        """Return the schedule that a profile gives, and what to expect of it.

        Raises:
            CalibrationError: If the model has no such first and last blocks, every run of the profile failed, or the
                target speed-up cannot be reached.
            ProfileError: If the profile does not hold the changes of these first blocks.
        """
        policy = _fitting(self._policy(), profile.anatomy)
        x = profile.first_block_change(self.first)  # (runs, contexts, steps, lags)
        if not len(x):
            raise CalibrationError("first-block: the profile has no run that did not fail; profile again")
        if self.target_speedup is not None:
            policy = replace(policy, threshold=_find_threshold(policy, x, profile.anatomy, self.target_speedup))
        computed, unknown = simulate_first_block(policy, x)  # (runs, contexts, steps)
        often, called = computed.mean(axis=(0, 1)), called_steps(x[:, :, 1:, 0])
        measured = {
            **profile.origin,
            "threshold": policy.threshold,
            "computed_steps": round(float(often[called].sum()), 2),
            "expected_steps": letters_of(often >= 0.5),
            "macs_fraction": round(macs_fraction(policy, profile.anatomy, float(often[called].mean())), 4),
            "lags": x.shape[-1],
            "beyond_lags": round(float(unknown.sum(axis=-1).mean()), 2),
        }
        return self._schedule(policy, profile.anatomy, profile.provenance.target, profile.steps, measured)

    def _policy(self) -> FirstBlockPolicy:
        return FirstBlockPolicy(
            self.threshold or 0.0,
            self.first,
            self.last,
            self.max_continuous,
            self.max_cached,
            self.at_threshold,
            first_steps=self.warm_up,
            last_steps=self.last_steps,
        )

    def _schedule(
        self, policy: FirstBlockPolicy, anatomy: Anatomy, target: Target, steps: int, measured: Mapping[str, Any]
    ) -> Schedule:
        policy = _fitting(policy, anatomy)
        return Schedule("first-block", asdict(self), anatomy, target, steps, policy=policy, measured=measured)


def _fitting(policy: FirstBlockPolicy, anatomy: Anatomy) -> FirstBlockPolicy:
    """Return the policy if the model has blocks that it can skip.

    Raises:
        CalibrationError: If it has not.
    """
    try:
        policy.skipped(anatomy)
    except PlanError as error:
        raise CalibrationError(str(error)) from None
    return policy


def _find_threshold(policy: FirstBlockPolicy, x: np.ndarray, anatomy: Anatomy, target_speedup: float) -> float:
    """Return a threshold with which the simulated rule reaches a speed-up in multiply-accumulates."""
    called = called_steps(x[:, :, 1:, 0])
    highest = float(np.max(x, where=np.isfinite(x), initial=0.0)) * 1.001 + 1e-9  # above every change

    def speedup(threshold: float) -> float:
        tried = replace(policy, threshold=threshold)
        return 1 / macs_fraction(tried, anatomy, float(simulate_first_block(tried, x)[0][..., called].mean()))

    return find_limit(policy.name, x.shape[2], speedup, highest, target_speedup)


@dataclass(frozen=True)
class FirstBlockSpace(AimedSpace):
    """How much to skip, which first and last blocks always run, and for how long everything is computed at first."""

    def free(self) -> Mapping[str, Axis]:
        return {
            "macs": self.shares(),
            "first": self.profile.provenance.first_blocks,
            **_more(self.profile.anatomy, self.steps, max(self.profile.provenance.first_blocks, default=1)),
        }

    @property
    def least(self) -> float:
        always = self.settings.warm_up + self.settings.last_steps
        settings = replace(self.settings, threshold=np.finfo(float).max, target_speedup=None)
        return macs_fraction(settings._policy(), self.profile.anatomy, always / self.steps)  # all others skipped


@dataclass(frozen=True)
class FirstBlockPlainSpace(PlanSpace):
    """The same without a profile: the threshold itself is drawn."""

    def free(self) -> Mapping[str, Axis]:
        return {"threshold": THRESHOLDS, **_more(self.anatomy, self.steps, self.settings.first)}

    def plain(self, max_macs: float | None) -> Mapping[str, Any]:
        """Return the settings as they are: what a threshold saves is not known beforehand."""
        return super().plain(None)

    def made(self, settings: FirstBlock) -> Schedule:
        return settings.schedule(self.anatomy, self.target, self.steps)


def _more(anatomy: Anatomy, steps: int, first: int) -> Mapping[str, Axis]:
    return {
        "last": range(max(1, min(MOST_LAST, len(anatomy.blocks) - first - 1) + 1)),
        "warm_up": range(1, max(2, min(LONGEST_WARM_UP, steps // 2) + 1)),
    }
