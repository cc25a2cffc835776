"""The settings of cache-dit's DBCache, which several projects take: as a mask of steps, or decided at run time.

References:
    vipshop/cache-dit 1.5.3, `caching/cache_contexts`: `cache_config.py` (the fields), `cache_context.py` (the warm-up
    is cut to the ones that a mask begins with), `cache_manager.py` (`can_cache`: the order in which they are asked).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dicache.formats.files import check_keys, mask, number, short, whole
from dicache.formats.format import FormatError, Given, Losses, Read
from dicache.formats.scm_presets import PRESETS, preset
from dicache.formats.steps import StepMask, body_plan, step_mask
from dicache.schedules import FirstBlockPolicy, Schedule
from dicache.schedules.plan import COMPUTE

ALWAYS_SIMILAR = 1.0  # from this threshold on cache-dit takes all steps as similar, without measuring
FIRST_DERIVATIVE = 3  # the first step at which its Taylor expansions take differences
DEFAULTS: Mapping[str, Any] = {
    "Fn_compute_blocks": 8,
    "Bn_compute_blocks": 0,
    "residual_diff_threshold": 0.08,
    "max_warmup_steps": 8,
    "max_cached_steps": -1,
    "max_continuous_cached_steps": -1,
    "num_inference_steps": None,
    "steps_computation_mask": None,
    "steps_computation_policy": "dynamic",
    "enable_taylorseer": False,
    "taylorseer_order": 1,
}
AS_USUAL: Mapping[str, Any] = {  # what has no counterpart here, and is read where it changes nothing
    "cache_type": "DBCache",
    "max_accumulated_residual_diff_threshold": None,
    "warmup_interval": 1,
    "force_refresh_step_hint": None,
    "force_refresh_step_policy": "once",
    "enable_encoder_taylorseer": False,
    "taylorseer_cache_type": "residual",
    "enable_dmd": False,
    "enable_foca": False,
}
OF_PASSES = ("enable_separate_cfg", "cfg_compute_first", "cfg_diff_compute_separate")  # dicache sees by itself


def settings_of(schedule: Schedule, losses: Losses, one_stack: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings that say a schedule.

    Args:
        schedule: Which.
        losses: To add to.
        one_stack: Models whose lists of blocks the project takes as one; of others each has a first block of its own.

    Raises:
        FormatError: If none do.
    """
    lists = list(dict.fromkeys(block.path for block in schedule.anatomy.blocks))
    if schedule.anatomy.model in one_stack:
        lists = lists[:1]
    if schedule.policy is not None:
        return _dynamic(schedule, lists, losses)
    found = step_mask(schedule, losses, highest_order=4)
    settings = {
        **_blocks(schedule, found, lists, losses),
        "max_warmup_steps": 0,
        "num_inference_steps": schedule.steps,
        "steps_computation_mask": found.numbers,
        "steps_computation_policy": "static",
    }
    if found.order:
        _note_taylor(found, losses)
        settings |= {"enable_taylorseer": True, "taylorseer_order": found.order}
    return settings


def _blocks(schedule: Schedule, found: StepMask, lists: Sequence[str], losses: Losses) -> dict[str, int]:
    """Return how many blocks run at every step."""
    blocks = schedule.anatomy.blocks
    if len(lists) > 1:
        if not found.covers(schedule.anatomy):
            losses.beyond.append(f"the blocks that are skipped cannot be chosen in {len(lists)} lists of blocks")
        losses.stated.append(
            f"the first block of each of {', '.join(lists)} runs at every step, where the plan skips it: less is "
            "saved, and the picture is nearer to the uncached one"
        )
        return {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0}
    if found.first == 0:
        losses.stated.append(
            f"the first block runs at every step, so that a skipped one costs 1/{len(blocks)} of the blocks, and the "
            "picture is nearer to the uncached one"
        )
    return {"Fn_compute_blocks": max(found.first, 1), "Bn_compute_blocks": len(blocks) - found.stop}


def _note_taylor(found: StepMask, losses: Losses) -> None:
    """Note the steps that are foretold from fewer outputs than in the plan."""
    lower: list[int] = []
    ours = theirs = -1
    for step, letter in enumerate(found.letters):
        if letter == COMPUTE:
            ours = min(found.order, ours + 1)
            theirs = min(found.order, theirs + 1) if step >= FIRST_DERIVATIVE else 0
        elif theirs < ours:
            lower.append(step)
    if lower:
        losses.beyond.append(
            f"cache-dit takes no differences before step {FIRST_DERIVATIVE}, so that step "
            f"{', '.join(map(str, lower))} would be foretold with a lower order than {found.order}"
        )


def _dynamic(schedule: Schedule, lists: Sequence[str], losses: Losses) -> dict[str, Any]:
    policy = schedule.policy
    if not isinstance(policy, FirstBlockPolicy):
        raise FormatError(
            f"this schedule decides by {schedule.method}, which cache-dit does not have; make a plan of it first "
            "(`dicache schedules freeze`)"
        )
    if policy.threshold >= ALWAYS_SIMILAR:
        raise FormatError(
            f"cache-dit takes every step as similar from a threshold of 1 on, without measuring; found "
            f"{policy.threshold:g}"
        )
    if len(lists) > 1:
        losses.beyond.append(f"each of {', '.join(lists)} would decide by itself, by the first block of its own")
    if policy.at_threshold == "reuse":
        losses.stated.append("a distance that is equal to the threshold computes, where the schedule reuses")
    settings: dict[str, Any] = {
        "Fn_compute_blocks": policy.first,
        "Bn_compute_blocks": policy.last,
        "residual_diff_threshold": policy.threshold,
        "max_warmup_steps": policy.first_steps,
        "max_cached_steps": -1 if policy.max_cached is None else policy.max_cached,
        "max_continuous_cached_steps": -1 if policy.max_continuous is None else policy.max_continuous,
        "num_inference_steps": schedule.steps,
    }
    if policy.last_steps:
        free = schedule.steps - policy.first_steps - policy.last_steps
        mask = [1] * policy.first_steps + [0] * free + [1] * policy.last_steps
        settings |= {"steps_computation_mask": mask, "steps_computation_policy": "dynamic"}
    return settings


def read_settings(what: str, content: Any, given: Given, defaults: Mapping[str, Any] = DEFAULTS) -> Read:
    """Return the schedule that settings of DBCache say; those that are left out have their defaults.

    Args:
        what: The file, for messages.
        content: The settings.
        given: What they do not say.
        defaults: Of the project.

    Raises:
        FormatError: If a key is unknown, which cache-dit itself passes over in silence, or has no counterpart here.
    """
    found = check_keys(what, content, [*DEFAULTS, *AS_USUAL, *OF_PASSES])
    for key, usual in AS_USUAL.items():
        if key in found and found[key] not in (usual, None):
            raise FormatError(f"{what}: dicache has no counterpart of {key}: {short(found[key])}")
    settings = {**defaults, **{key: value for key, value in found.items() if key in DEFAULTS and value is not None}}
    if settings["num_inference_steps"] not in (None, given.steps):
        raise FormatError(
            f"{what} is for {settings['num_inference_steps']} steps, but {given.steps} are asked for; import with "
            "--steps of its own"
        )
    first = whole(f"{what}: Fn_compute_blocks", settings["Fn_compute_blocks"], least=1)
    last = whole(f"{what}: Bn_compute_blocks", settings["Bn_compute_blocks"], least=0)
    count = len(given.anatomy.blocks)
    if first + last >= count:
        raise FormatError(
            f"{what}: computes the first {first} and the last {last} blocks always (Fn_compute_blocks is "
            f"{DEFAULTS['Fn_compute_blocks']} where it is left out), and this {given.anatomy.model} has {count}"
        )
    told = {key: value for key, value in settings.items() if value is not None}
    steps = settings["steps_computation_mask"]
    order = settings["taylorseer_order"] if settings["enable_taylorseer"] else 0
    if isinstance(steps, str):
        if steps not in PRESETS:
            raise FormatError(f"{what}: unknown preset {steps!r}; known: {', '.join(PRESETS)}")
        steps = preset(steps, given.steps)
    if steps is not None and settings["steps_computation_policy"] == "static":
        plan = body_plan(
            mask(f"{what}: steps_computation_mask", steps, given.steps),
            given,
            first=first,
            stop=count - last,
            order=order,
        )
        return Read("cache-dit", told, plan=plan)
    if order:
        raise FormatError(f"{what}: dicache has no Taylor expansion in what decides at run time; needed a static mask")
    first_steps = max(1, whole(f"{what}: max_warmup_steps", settings["max_warmup_steps"], least=0))
    last_steps = 0
    if steps is not None:
        first_steps, last_steps = _ends(what, mask(f"{what}: steps_computation_mask", steps, given.steps))
    threshold = number(f"{what}: residual_diff_threshold", settings["residual_diff_threshold"])
    if threshold >= ALWAYS_SIMILAR:
        raise FormatError(
            f"{what}: cache-dit takes every step as similar from a threshold of 1 on; write a static mask"
        )
    policy = FirstBlockPolicy(
        threshold=max(threshold, 0.0),
        first=first,
        last=last,
        max_continuous=_limit(what, settings, "max_continuous_cached_steps"),
        max_cached=_limit(what, settings, "max_cached_steps"),
        first_steps=first_steps,
        last_steps=last_steps,
    )
    return Read("first-block", told, policy=policy)


def _limit(what: str, settings: Mapping[str, Any], key: str) -> int | None:
    value = whole(f"{what}: {key}", settings[key], least=-1)
    return None if value < 0 else value


def _ends(what: str, letters: str) -> tuple[int, int]:
    """Return how many steps at the start and at the end a mask computes, if no others."""
    middle = letters.strip(COMPUTE)
    if COMPUTE in middle:
        raise FormatError(
            f"{what}: a mask whose other steps decide at run time may compute steps at the start and at the end only, "
            f"found {letters}"
        )
    first = len(letters) - len(letters.lstrip(COMPUTE))
    return first, len(letters) - first - len(middle)
