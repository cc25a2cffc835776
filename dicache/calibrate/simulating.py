"""What a policy would have decided on the runs of a profile."""

from collections.abc import Callable

import numpy as np

from dicache.anatomy import Anatomy
from dicache.calibrate.methods import CalibrationError
from dicache.calibrate.rescale import rescaled
from dicache.profiler import Profile
from dicache.profiler.profiles import RATES
from dicache.schedules import AdaCachePolicy, FirstBlockPolicy, TeaCachePolicy
from dicache.schedules.policies import Policy
from dicache.schedules.policies.adacache import Motion


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
    steps = x.shape[2] + 1
    added = rescaled(policy, x)
    computed = np.ones((*x.shape[:2], steps), dtype=bool)
    accumulated = np.zeros(x.shape[:2])
    for step in range(1, steps):
        if policy.forced(step, steps):
            accumulated[:] = 0
            continue
        accumulated += added[..., step - 1]
        computed[..., step] = ~((-np.inf < accumulated) & (accumulated < policy.threshold))  # so that a NaN computes
        accumulated[computed[..., step]] = 0
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
    passes, (steps, blocks) = changes.shape[:2], changes.shape[2:4]
    computed = np.zeros((*passes, steps), dtype=bool)
    last, rate = np.full(passes, -1), np.ones(passes, dtype=int)  # -1 for none
    before = np.ones(passes)  # M of the step that was computed last
    counts = policy.motion if motion is not None else None
    moved = None if counts is None or motion is None else _moved(counts, motion)
    for step in range(steps):
        due = policy.forced(step, steps) | (last < 0) | (step >= last + rate)
        gap = np.where(last < 0, 1, step - last)
        seen = due & (last >= 0)
        computed[..., step] = due
        if policy.watches(step, steps) and seen.any():
            lag = np.where(seen, step - last - 1, 0)[..., None, None]  # (runs, contexts, 1, 1)
            found = np.take_along_axis(changes[:, :, step], lag, axis=-1)[..., 0]  # (runs, contexts, blocks)
            distance = sum(found[..., block] for block in range(blocks)) / blocks / gap
            if counts is not None and moved is not None:
                now = moved[..., step]
                distance = distance * (now + np.abs(counts.gradient * (now - before) / gap))
                before = np.where(seen, now, before)
            unknown = seen & np.isnan(distance)
            *entries, (_, slowest) = policy.codebook
            chosen = np.full(passes, slowest)
            for limit, each in reversed(entries):
                chosen[distance < limit] = each
            rate = np.where(seen, np.where(unknown, 1, chosen), rate)
            before = np.where(unknown, 1.0, before)
        last = np.where(due, step, last)
    return computed


def _moved(settings: Motion, motion: np.ndarray) -> np.ndarray:
    """Return M of each step, (runs, contexts, steps)."""
    steps = motion.shape[-1]
    active = np.array([settings.active(step, steps) for step in range(steps)])
    powers = [(value / settings.scale) ** settings.power for value in motion.ravel().tolist()]  # as at run time
    return np.where(active, np.reshape(powers, motion.shape), 1.0)


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
    passes, (steps, lags) = x.shape[:2], x.shape[2:]
    computed, unknown = np.zeros((2, *passes, steps), dtype=bool)
    last, in_a_row, in_all = np.zeros((3, *passes), dtype=int)
    most_in_a_row = steps if policy.max_continuous is None else policy.max_continuous
    most_in_all = steps if policy.max_cached is None else policy.max_cached
    for step in range(steps):
        lag = step - last
        known = (lag >= 1) & (lag <= lags)
        place = np.where(known, lag - 1, 0)[..., None]
        change = np.take_along_axis(x[:, :, step], place, axis=-1)[..., 0]
        may_skip = (in_a_row < most_in_a_row) & (in_all < most_in_all)
        if policy.forced(step, steps) or policy.threshold <= 0:
            may_skip[:] = False
        below = change <= policy.threshold if policy.at_threshold == "reuse" else change < policy.threshold
        skipped = may_skip & known & below
        unknown[..., step] = (lag > lags) & may_skip & np.isfinite(x[:, :, step, 0])
        computed[..., step] = ~skipped
        in_a_row = np.where(skipped, in_a_row + 1, 0)
        in_all += skipped
        last = np.where(skipped, last, step)
    return computed, unknown


def residual_error(profile: Profile, computed: np.ndarray) -> float | None:
    """Return the mean relative change of the guided residual from the step that stands in to the one it stands for.

    Args:
        profile: With the products of all steps' residuals.
        computed: What is computed, boolean, shape (runs, contexts, steps).
    """
    grams, steps = profile.arrays["body/gram"], np.arange(computed.shape[-1])
    sizes = np.diagonal(grams, axis1=1, axis2=2)  # (runs, steps)
    last = np.maximum.accumulate(np.where(computed, steps, 0), axis=-1)  # (runs, contexts, steps)
    runs = np.arange(len(grams))[:, None, None]
    now, then, both = sizes[:, None], sizes[runs, last], grams[runs, steps, last]
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = np.sqrt(np.maximum(now + then - 2 * both, 0.0) / now)
    errors = np.where(now > 0, errors, np.nan)[~computed]
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
