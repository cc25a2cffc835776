"""diffusers' FirstBlockCacheConfig, as JSON with the class and its arguments.

References:
    huggingface/diffusers 0.42.1, `hooks/first_block_cache.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicache.formats.diffusers_files import arguments, written
from dicache.formats.files import number
from dicache.formats.format import Format, FormatError, Given, Losses, Read
from dicache.schedules import FirstBlockPolicy, Schedule

CLASS = "FirstBlockCacheConfig"
USUAL = 0.05  # threshold


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    policy = schedule.policy
    if not isinstance(policy, FirstBlockPolicy):
        raise FormatError(f"needed a schedule of `dicache calibrate first-block`, found one of {schedule.method}")
    plain = FirstBlockPolicy(policy.threshold)
    others = {name: value for name, value in vars(policy).items() if name not in ("at_threshold", "threshold")}
    for name, value in others.items():
        if value != getattr(plain, name):
            losses.beyond.append(f"{name} {value} would be {getattr(plain, name)}")
    if policy.at_threshold == "compute":
        losses.stated.append("a distance that is equal to the threshold reuses, where the schedule computes")
    return written(CLASS, {"threshold": policy.threshold})


def read(path: Path, given: Given) -> Read:
    settings = arguments(path, CLASS, ("threshold",))
    threshold = number(f"{path}: threshold", settings.get("threshold", USUAL), least=0)
    return Read("first-block", {"threshold": threshold}, policy=FirstBlockPolicy(threshold, at_threshold="reuse"))


FORMAT = Format(
    name="diffusers-first-block",
    engine="diffusers 0.42.1",
    source="huggingface/diffusers: hooks/first_block_cache.py",
    suffix=".json",
    holds="first-block schedules with one first block and no limits",
    loses="steps that are always computed, limits, last blocks",
    use=(
        "import diffusers, json; made = json.load(open('FILE'))",
        "config = getattr(diffusers, made['class'])(**made['kwargs'])",
        "pipe.transformer.enable_cache(config)",
        "On a model without enable_cache: diffusers.hooks.apply_first_block_cache(model, config), call it inside of a",
        "cache context, and reset the hooks before each generation; the first step is compared with the last image's.",
    ),
    export=export,
    read=read,
)
