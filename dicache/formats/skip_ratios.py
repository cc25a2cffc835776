"""Any mask of steps as ratios for MagCache's rule.

MagCache skips while the product of the ratios since the last computed step stays near 1. Ratios of 1 where a plan
skips and of 2 where it computes make the rule follow the plan, in every implementation: a 1 adds no error, a 2 adds 1,
which is above the threshold and starts anew. The first step computes by its own ratio, so that nothing that an earlier
generation has left is used.

References:
    MagCache, arXiv 2506.09045, algorithm 1.
"""

from typing import Any

from dicache.formats.format import Losses
from dicache.formats.steps import StepMask, step_mask
from dicache.schedules import Schedule
from dicache.schedules.plan import COMPUTE

KEEP, RENEW = 1.0, 2.0
THRESHOLD = 0.5  # between the errors that they give


def ratios(letters: str) -> list[float]:
    """Return a ratio a step."""
    return [RENEW if letter == COMPUTE else KEEP for letter in letters]


def rule(steps: int) -> dict[str, Any]:
    """Return the other settings that make the rule follow the ratios alone."""
    return {"threshold": THRESHOLD, "max_skip_steps": steps, "retention_ratio": 0.0}


def whole_mask(schedule: Schedule, losses: Losses) -> StepMask:
    """Return the mask of a plan whose steps leave out all blocks; note where others would be."""
    found = step_mask(schedule, losses)
    if not found.covers(schedule.anatomy):
        losses.beyond.append(
            f"all blocks would be skipped, where the plan skips {found.first} to {found.stop - 1} of them"
        )
    return found
