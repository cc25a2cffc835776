"""TeaCache's rule as other projects have it: five coefficients and a threshold, and no range that x is held in."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dicache.formats.files import numbers
from dicache.formats.format import FormatError, Losses
from dicache.schedules import Schedule, TeaCachePolicy
from dicache.schedules.policies import Negative

DEGREE = 4
ANY_CHANGE = (0.0, 1e6)  # a range that holds back no change of the input


def policy_of(schedule: Schedule, losses: Losses, negative: Negative) -> TeaCachePolicy:
    """Return the policy of a TeaCache schedule with five coefficients, and note what its rule loses.

    Args:
        schedule: Of TeaCache, deciding at run time.
        losses: To add to.
        negative: What the project makes of a negative value: `reference` takes it as it is, `abs` its magnitude.

    Raises:
        FormatError: If it is another schedule.
    """
    policy = schedule.policy
    if not isinstance(policy, TeaCachePolicy):
        instead = (
            "it has a plan; export it to a format of masks, such as vllm-omni, lightx2v or cache-dit"
            if schedule.policy is None
            else f"found one of {schedule.method}"
        )
        raise FormatError(f"needed a TeaCache schedule that decides at run time: {instead}")
    coefficients = (0.0,) * (DEGREE + 1 - len(policy.coefficients)) + policy.coefficients
    if len(coefficients) > DEGREE + 1:
        raise FormatError(
            f"the polynomial is of degree {len(policy.coefficients) - 1}, needed {DEGREE} or less; calibrate with "
            f"--degree {DEGREE}"
        )
    low, high = policy.input_range
    if policy.negative != "reference" and (low, high) != ANY_CHANGE:
        around = np.linspace(low / 2, 2 * high, 1000)
        below = around[np.polyval(coefficients, around) < 0]
        far = f"; at x of {below.min():.3g} to {below.max():.3g} it is negative" if len(below) else ""
        losses.stated.append(
            f"x is held in [{low:.3g}, {high:.3g}] here, where p was fitted, and taken as it is there{far}"
        )
    if policy.negative != negative and (np.polyval(coefficients, np.linspace(low, high, 1000)) < 0).any():
        does = {"clamp": "adds nothing", "abs": "adds its magnitude", "reference": "lowers the sum"}
        losses.beyond.append(
            f"the polynomial is negative at some x of its range, which {does[policy.negative]} here and "
            f"{does[negative]} there"
        )
    return TeaCachePolicy(**{**vars(policy), "coefficients": coefficients})


def read_coefficients(what: str, content: Any) -> tuple[float, ...]:
    """Return five coefficients, highest power first.

    Raises:
        FormatError: If there are others than five.
    """
    found = numbers(what, content)
    if len(found) != DEGREE + 1:
        raise FormatError(f"{what} must be {DEGREE + 1} numbers, highest power first, found {len(found)}")
    return tuple(found)


def read_policy(
    coefficients: tuple[float, ...],
    threshold: float,
    negative: Negative,
    *,
    first_steps: int = 1,
    last_steps: int = 1,
) -> TeaCachePolicy:
    """Return the policy of five coefficients whose range is not known: x is taken as it is."""
    return TeaCachePolicy(threshold, coefficients, ANY_CHANGE, negative, first_steps=first_steps, last_steps=last_steps)


def settings_of(policy: TeaCachePolicy) -> Mapping[str, Any]:
    """Return the settings of a schedule that was read."""
    return {"threshold": policy.threshold, "negative": policy.negative}
