"""What of a model is to be measured, where that is not said or is said by a schedule."""

from collections.abc import Sequence

from dicache.anatomy import Anatomy
from dicache.profiler.profiles import ProfileError
from dicache.schedules import FirstBlockPolicy, Schedule


def usual_decision_block(anatomy: Anatomy) -> int:
    """Return the block that AdaCache decides by: the middle one of those whose attention can be told from the rest.

    Of a video model with lists of spatial and of temporal blocks, the middle one of the temporal ones.

    References:
        AdaCache-DiT/AdaCache, which takes block 13 of 28.
    """
    seen = [block for block in anatomy.blocks if block.middle] or list(anatomy.blocks)
    temporal = [block for block in seen if "temporal" in block.path]
    blocks = temporal or seen
    return blocks[(len(blocks) - 1) // 2].index


def steps_of_priors(priors: bool | Schedule, anatomy: Anatomy, steps: int) -> dict[str, tuple[int, ...]]:
    """Return the steps at which each site's outputs are kept whole."""
    if isinstance(priors, bool):
        return {key: tuple(range(steps)) for key in anatomy.sites} if priors else {}
    if priors.plan is None:
        raise ProfileError(
            f"--priors-for needs a schedule with a plan, found {priors.method}, which decides at run time"
        )
    if priors.anatomy.sites != anatomy.sites or priors.steps != steps:
        raise ProfileError(
            f"--priors-for: the schedule is for {priors.steps} steps of a {priors.anatomy.model} with "
            f"{len(priors.anatomy.sites)} sites, found {steps} steps of a {anatomy.model} with {len(anatomy.sites)}"
        )
    return _reused_pairs(priors)


def counts_of_first_blocks(asked: Sequence[int] | None, anatomy: Anatomy) -> tuple[int, ...]:
    most = FirstBlockPolicy.most_first(anatomy)
    if asked is None:
        return (1,) if most >= 1 else ()
    if wrong := [count for count in asked if not 1 <= count <= most]:
        raise ProfileError(
            f"--first-blocks: found {wrong[0]}; they must lie in one segment and leave a block to skip, which in this "
            f"{anatomy.model} are " + (f"1 to {most}" if most else "none")
        )
    return tuple(sorted(set(asked)))


def _reused_pairs(schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """Return, for each site, the steps that a plan reuses an output at, and those that these outputs are from."""
    assert schedule.plan is not None
    pairs: dict[str, set[int]] = {key: set() for key in schedule.anatomy.sites}
    for context in (None, *schedule.plan.contexts):
        table = schedule.plan.table(schedule.anatomy, context)
        for key, letters in table.items():
            for step, letter in enumerate(letters):
                if letter == "R":
                    pairs[key] |= {step, letters.rindex("C", 0, step)}
    return {key: tuple(sorted(steps)) for key, steps in pairs.items() if steps}
