"""What a policy would have decided on the runs of a profile."""

from collections.abc import Callable

import numpy as np

from dicache.anatomy import Anatomy
from dicache.calibrate.methods import CalibrationError
from dicache.profiler import Profile
from dicache.profiler.profiles import RATES
from dicache.schedules import AdaCachePolicy, FirstBlockPolicy, TeaCachePolicy
from dicache.schedules.policies import Policy


def decisions(policy: Policy, profile: Profile) -> np.ndarray:
    """Return which steps a policy would compute in each run, boolean, shape (runs, contexts, steps).

    Raises:
        CalibrationError: If the profile does not hold what the policy decides by.
    """
    if isinstance(policy, TeaCachePolicy):
        return simulate(policy, profile.relative_l1("input"))
    if isinstance(policy, AdaCachePolicy):
        return simulate_rates(policy, *rate_signals(policy, profile))
    if isinstance(policy, FirstBlockPolicy):
        return simulate_first_block(policy, profile.first_block_change(policy.first))[0]
    raise CalibrationError(f"{policy.name}: a profile does not hold what it decides by")


def simulate(policy: TeaCachePolicy, x: np.ndarray) -> np.ndarray:
    """Return which steps TeaCache would compute on recorded signals, boolean, shape (runs, contexts, steps).

    Args:
        policy: The rule.
        x: Relative L1 change of the modulated input, shape (runs, contexts, steps - 1), from step 1 on.
    """
    runs, contexts, changes = x.shape
    steps = changes + 1
    computed = np.zeros((runs, contexts, steps), dtype=bool)
    for run in range(runs):
        for context in range(contexts):
            memory = policy.remember()
            for step in range(steps):
                change = float(x[run, context, step - 1]) if step else None
                computed[run, context, step] = policy.decide(step, steps, change, memory)
    return computed


def called_steps(x: np.ndarray) -> np.ndarray:
    """Return at which steps the model was called, boolean, shape (steps,): another may have had some of them.

    Args:
        x: A change from step to step, shape (runs, contexts, steps - 1); NaN where a step or the one before was not.
    """
    compared: np.ndarray = np.isfinite(x).any(axis=(0, 1))
    if not compared.any():
        return np.ones(len(compared) + 1, dtype=bool)
    return np.asarray(np.append(False, compared) | np.append(compared, False))


def rate_signals(policy: AdaCachePolicy, profile: Profile) -> tuple[np.ndarray, np.ndarray | None]:
    """Return what AdaCache decides by: the changes of its decision blocks, (runs, contexts, steps, blocks, 12), by how
    many steps they are apart, and motion, (runs, contexts, steps), None where the policy has none.

    Raises:
        CalibrationError: If motion was not measured, or no step as far apart as the policy's largest rate.
    """
    changes = [profile.residual_change(block, policy.branch) for block in policy.decision_blocks]
    rate = max(rate for _, rate in policy.codebook)
    if rate > RATES and rate < profile.steps - policy.last_steps:
        raise CalibrationError(
            f"adacache: steps up to {RATES} apart were measured, but the codebook has a rate of {rate}"
        )
    motion = None
    if policy.motion is not None:
        motion = profile.between_frames(policy.decision_blocks[-1], policy.branch)
        if motion is None:
            raise CalibrationError(
                "adacache: the profile holds no motion, as the latents have no frames or the tokens of a frame cannot "
                "be told; leave motion out"
            )
    return np.stack(changes, axis=3), motion


def simulate_rates(policy: AdaCachePolicy, changes: np.ndarray, motion: np.ndarray | None) -> np.ndarray:
    """Return which steps AdaCache would compute on recorded signals, boolean, shape (runs, contexts, steps).

    Args:
        policy: The rule.
        changes: Of what each decision block adds, shape (runs, contexts, steps, blocks, lags), lag 1 first.
        motion: Of the last of them, shape (runs, contexts, steps); None where the policy leaves it out.
    """
    runs, contexts, steps = changes.shape[:3]
    computed = np.zeros((runs, contexts, steps), dtype=bool)
    for run, context in np.ndindex(runs, contexts):
        memory = policy.remember()
        for step in range(steps):
            last = memory.last
            computed[run, context, step] = policy.decide(step, steps, None, memory)
            if computed[run, context, step] and last is not None and policy.watches(step, steps):
                found = changes[run, context, step, :, step - last - 1].tolist()
                moved = None if motion is None else float(motion[run, context, step])
                policy.observe(step, steps, found, moved, memory)
    return computed


def simulate_first_block(policy: FirstBlockPolicy, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which steps FirstBlockCache would compute on recorded signals.

    Args:
        policy: The rule.
        x: Relative L1 change of what the first blocks add since each of the steps before, shape (runs, contexts,
            steps, lags), that since the step before first.

    Returns:
        Which steps are computed, boolean, shape (runs, contexts, steps); and which of them only because the last
        computed one lies farther back than there are lags, so that the change is not known.
    """
    runs, contexts, steps, lags = x.shape
    computed, unknown = np.zeros((2, runs, contexts, steps), dtype=bool)
    for run in range(runs):
        for context in range(contexts):
            memory, last = policy.remember(), 0
            for step in range(steps):
                lag = step - last
                change = float(x[run, context, step, lag - 1]) if 1 <= lag <= lags else None
                may_skip = not policy.forced(step, steps) and policy.allows(memory)
                computed[run, context, step] = policy.decide(step, steps, change, memory)
                unknown[run, context, step] = lag > lags and may_skip and np.isfinite(x[run, context, step, 0])
                if computed[run, context, step]:
                    last = step
    return computed, unknown


def residual_error(profile: Profile, computed: np.ndarray) -> float | None:
    """Return the mean relative change of the guided residual from the step that stands in to the one it stands for.

    Args:
        profile: With the products of all steps' residuals.
        computed: What is computed, boolean, shape (runs, contexts, steps).
    """
    errors = []
    for gram, passes in zip(profile.arrays["body/gram"], computed, strict=True):
        for row in passes:
            last = 0
            for step, computes in enumerate(row):
                if computes:
                    last = step
                    continue
                now, then, both = gram[step, step], gram[last, last], gram[step, last]
                errors.append(float(np.sqrt(max(now + then - 2 * both, 0.0) / now)) if now > 0 else np.nan)
    return float(np.nanmean(errors)) if np.isfinite(errors).any() else None


def macs_fraction(policy: Policy, anatomy: Anatomy, computed: float, *, beforehand: bool = False) -> float:
    """Return the share of all multiply-accumulates where a policy computes this share of the steps.

    Args:
        policy: The rule.
        anatomy: The model's.
        computed: Share of the steps.
        beforehand: Whether the decisions are known before the model runs, so that nothing of its blocks does.
    """
    first, stop = policy.skipped(anatomy)
    whole = sum(block.macs for block in anatomy.blocks[first:stop])
    return 1 - (1 - computed) * (whole if beforehand else policy.macs_saved(anatomy)) / anatomy.macs


def find_limit(name: str, steps: int, speedup: Callable[[float], float], highest: float, target: float) -> float:
    """Return a limit between 0 and `highest` with which a policy reaches a speed-up, and a little below which not.

    Args:
        name: The policy's.
        steps: That it is for.
        speedup: Its speed-up in multiply-accumulates by the limit. Where it does not fall as the limit rises, what is
            returned is the smallest.
        highest: A limit beyond which nothing more is skipped.
        target: The speed-up.

    Raises:
        CalibrationError: If no limit does.
    """
    if speedup(highest) < target:
        raise CalibrationError(
            f"{name}: a speed-up of {target:g} cannot be reached in {steps} steps; with every step skipped that may be "
            f"it is {speedup(highest):.2f}"
        )
    low, high = 0.0, highest
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if speedup(middle) >= target else (middle, high)
    return float(high)
