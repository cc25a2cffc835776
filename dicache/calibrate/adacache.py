"""AdaCache: fit the codebook that says for how long everything is held, and what motion counts."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from dicache.calibrate.methods import Axis, CalibrationError, letters_of, method
from dicache.calibrate.simulating import (
    called_steps,
    find_limit,
    macs_fraction,
    rate_signals,
    residual_error,
    simulate_rates,
)
from dicache.calibrate.spaces import AimedSpace
from dicache.profiler import Profile
from dicache.schedules import AdaCachePolicy, Motion, Schedule
from dicache.schedules.policies.adacache import Codebook, Residual

Preset = Literal["slow", "fast", "long"]
MotionFrom = Literal["profile", "published", "none"]

# Of the released code for Open-Sora: two for 30 steps, one for 100.
PRESETS: dict[str, Codebook] = {
    "slow": ((0.08, 3), (0.16, 2), (0.24, 1), (0.32, 1), (0.40, 1), (1.00, 1)),
    "fast": ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.00, 1)),
    "long": ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.00, 3)),
}
USUAL_SPEEDUP = 1.8
SPREAD = 4.0  # between a profile's first and ninth decile of motion, the fitted M grows by this
WIDEST = 1e6  # factor by which limits are scaled up or down at most
BEYOND = 1.0001  # the smallest factor puts a limit upon a distance; a little more, and rounding decides nothing


@method("adacache")
@dataclass(frozen=True)
class AdaCache:
    """Hold all blocks' outputs for as many steps as a codebook says for how much a decision block's changed.

    The published codebooks are for one model and sampler. To reach a target, all limits of a codebook are multiplied by
    one factor, found by playing the rule through on the profile's runs; where no codebook is given, each published one
    is scaled, and that is taken whose stand-ins err least. (Limits at quantiles of the profile's own distances err more
    at equal cost, on the bundled models.)

    Attributes:
        codebook: Pairs of a limit and a rate; see the policy. Empty takes the preset, or the best of all.
        preset: Name of a published codebook.
        target_speedup: How many times fewer multiply-accumulates, on the average of the profile's own runs. None takes
            the codebook as it is.
        decision_blocks: What is measured; empty takes all that the profile has.
        branch: What of them.
        motion: MoReg's constants, on videos: fitted to the `profile`, such that M is 1 at its median and grows fourfold
            from its first to its ninth decile, to the 8th power at most; those `published` for Open-Sora; or `none`.

    References:
        AdaCache, arXiv 2411.02397; AdaCache-DiT/AdaCache.
    """

    codebook: Codebook = ()
    preset: Preset | None = None
    target_speedup: float | None = None
    decision_blocks: tuple[int, ...] = ()
    branch: Residual = "attn"
    motion: MotionFrom = "profile"

    def __post_init__(self) -> None:
        if self.codebook and self.preset is not None:
            raise CalibrationError("adacache: give either a codebook or a preset")
        if self.preset is not None and self.preset not in PRESETS:
            raise CalibrationError(f"adacache: the presets are {', '.join(PRESETS)}, found {self.preset!r}")
        if not self.codebook and self.preset is None and self.target_speedup is None:
            raise CalibrationError("adacache: give a codebook, a preset or a target speed-up (such as 1.8)")
        if self.target_speedup is not None and not (math.isfinite(self.target_speedup) and self.target_speedup >= 1):
            raise CalibrationError(f"adacache: the target speed-up must be 1 or more, found {self.target_speedup}")
        if self.motion not in get_args(MotionFrom):
            raise CalibrationError(
                f"adacache: motion is from one of {', '.join(get_args(MotionFrom))}, found {self.motion!r}"
            )

    def calibrate(self, profile: Profile) -> Schedule:
        """Return the schedule that this profile gives.

        Raises:
            CalibrationError: If the profile has no run that did not fail, or the target cannot be reached.
            ProfileError: If it does not hold what is decided by.
            PlanError: If the codebook is wrong.
        """
        blocks = self.decision_blocks or profile.provenance.decision_blocks
        if not blocks:
            raise CalibrationError("adacache: the profile does not say what a block adds to the stream; profile again")
        named = {name: PRESETS[name] for name in ([self.preset] if self.preset else PRESETS)}
        if self.codebook:
            named = {"": self.codebook}
        plain = AdaCachePolicy(((1.0, 1),), tuple(sorted(blocks)), self.branch)
        changes, _ = rate_signals(plain, profile)
        if not len(changes):
            raise CalibrationError("adacache: the profile has no run that did not fail; profile again")
        motion = profile.between_frames(plain.decision_blocks[-1], self.branch)
        frames = motion is not None
        settings = None if motion is None else self._fitted_motion(motion)
        found: dict[str, tuple[AdaCachePolicy, np.ndarray, float]] = {}
        for name, codebook in named.items():
            policy = replace(plain, codebook=codebook, motion=settings)
            signals = rate_signals(policy, profile)
            if self.target_speedup is not None:
                try:
                    policy = _scaled(policy, profile, signals, self.target_speedup)
                except CalibrationError as said:
                    failed = said
                    continue
            computed = simulate_rates(policy, *signals)  # (runs, contexts, steps)
            error = residual_error(profile, computed)
            found[name] = policy, computed, math.inf if error is None else error
        if not found:
            raise failed
        best = min(found, key=lambda name: found[name][2])
        policy, computed, error = found[best]
        called = _called(profile)
        often, counts = computed.mean(axis=(0, 1)), computed[..., called].sum(axis=-1)
        return Schedule(
            method="adacache",
            settings={**asdict(self), "preset": best or None},
            anatomy=profile.anatomy,
            target=profile.provenance.target,
            steps=profile.steps,
            policy=policy,
            measured={
                **profile.origin,
                "computed_steps": round(float(counts.mean()), 2),
                "fewest_steps": int(counts.min()),
                "most_steps": int(counts.max()),
                "expected_steps": letters_of(often >= 0.5),
                "macs_fraction": round(macs_fraction(policy, profile.anatomy, float(often[called].mean())), 4),
                "residual_error": round(error, 5) if math.isfinite(error) else None,
                "frames": frames,
            },
        )

    def _fitted_motion(self, moved: np.ndarray) -> Motion | None:
        """Return MoReg's constants for the motion of a profile's runs, (runs, contexts, steps)."""
        published = Motion()
        if self.motion != "profile":
            return published if self.motion == "published" else None
        active = [step for step in range(moved.shape[-1]) if published.active(step, moved.shape[-1])]
        low, middle, high = np.nanpercentile(moved[..., active], [10, 50, 90])
        if not 0 < low < high:
            raise CalibrationError(
                f"adacache: motion cannot be fitted, as it is {low:.3g} to {high:.3g} in all runs; profile more of "
                "them, or take --published-motion or --no-motion"
            )
        power = min(published.power, math.log(SPREAD) / math.log(high / low))
        return replace(published, scale=float(f"{middle:.5g}"), power=round(power, 3))


def _scaled(
    policy: AdaCachePolicy, profile: Profile, signals: tuple[np.ndarray, np.ndarray | None], target_speedup: float
) -> AdaCachePolicy:
    """Return a policy with all limits of its codebook scaled by the smallest factor that reaches a speed-up.

    Raises:
        CalibrationError: If none does.
    """

    called = _called(profile)

    def at(place: float, beyond: float = 1.0) -> AdaCachePolicy:
        factor = WIDEST ** (2 * place - 1) * beyond
        return replace(policy, codebook=tuple((limit * factor, rate) for limit, rate in policy.codebook))

    def speedup(place: float) -> float:
        computed = simulate_rates(at(place), *signals)
        return 1 / macs_fraction(policy, profile.anatomy, float(computed[..., called].mean()))

    return at(find_limit(policy.name, profile.steps, speedup, 1.0, target_speedup), BEYOND)


def _called(profile: Profile) -> np.ndarray:
    return called_steps(profile.relative_l1("output"))


@dataclass(frozen=True)
class AdaCacheSpace(AimedSpace):
    """How much to skip, the codebook whose limits are scaled for that, what is measured, and whether motion counts."""

    usual_speedup = USUAL_SPEEDUP

    def free(self) -> Mapping[str, Axis]:
        blocks = self.settings.decision_blocks or self.profile.provenance.decision_blocks
        split = all(self.profile.anatomy.blocks[block].middle for block in blocks)
        frames = bool(blocks) and self.profile.between_frames(blocks[-1], "block") is not None
        axes: dict[str, Axis] = {"macs": self.shares(), "preset": tuple(PRESETS)}
        if split:
            axes["branch"] = get_args(Residual)
        if frames:
            axes["motion"] = get_args(MotionFrom)
        return axes if not self.settings.codebook else {key: axis for key, axis in axes.items() if key != "preset"}

    def usual(self) -> Mapping[str, Any]:
        return {**super().usual(), "preset": self.settings.preset or next(iter(PRESETS))}

    def with_parameters(self, parameters: Mapping[str, Any]) -> Any:
        others = {name: value for name, value in parameters.items() if name != "macs"}
        aimed = {"target_speedup": 1 / parameters["macs"]} if "macs" in parameters else {}
        return replace(self.settings, **others, **aimed)
