"""diffusers' MagCacheConfig, as JSON with the class and its arguments.

References:
    huggingface/diffusers 0.42.1, `hooks/mag_cache.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicache.calibrate.magcache import simulate
from dicache.formats.diffusers_files import arguments, written
from dicache.formats.files import number, numbers, whole
from dicache.formats.format import Format, FormatError, Given, Losses, Read
from dicache.formats.skip_ratios import ratios, rule, whole_mask
from dicache.formats.steps import body_plan
from dicache.schedules import Schedule

CLASS = "MagCacheConfig"
DEFAULTS: Mapping[str, Any] = {
    "threshold": 0.06,
    "max_skip_steps": 3,
    "retention_ratio": 0.2,
    "num_inference_steps": 28,
    "mag_ratios": None,
    "calibrate": False,
}


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    letters = whole_mask(schedule, losses).letters
    steps = {"num_inference_steps": schedule.steps}
    return written(
        CLASS, _measured(schedule, letters) or {**rule(schedule.steps), **steps, "mag_ratios": ratios(letters)}
    )


def _measured(schedule: Schedule, letters: str) -> dict[str, Any] | None:
    """Return the arguments with the ratios of a profile, where diffusers' rule gives the plan by them."""
    if schedule.method != "magcache" or "ratios" not in schedule.measured:
        return None
    settings = schedule.settings
    made = {
        "threshold": settings["threshold"],
        "max_skip_steps": settings["max_skip"],
        "retention_ratio": settings["retention"],
        "num_inference_steps": schedule.steps,
    }
    for found in schedule.measured["ratios"].values():
        if None not in found[1:] and _letters(made := {**made, "mag_ratios": [1.0, *found[1:]]}) == letters:
            return made
    return None


def follows(what: str, settings: Mapping[str, Any]) -> str:
    """Return what the rule computes with arguments from a file.

    Raises:
        FormatError: If one of them is not of its kind.
    """
    for key in ("threshold", "retention_ratio"):
        number(f"{what}: {key}", settings[key], least=0)
    whole(f"{what}: max_skip_steps", settings["max_skip_steps"], least=0)
    if settings["retention_ratio"] > 1:
        raise FormatError(f"{what}: retention_ratio must be a share from 0 to 1, found {settings['retention_ratio']:g}")
    return _letters(settings)


def _letters(settings: Mapping[str, Any]) -> str:
    """Return what diffusers computes with some arguments: its rule begins at a step that is rounded to the nearest."""
    steps = settings["num_inference_steps"]
    begins = int(settings["retention_ratio"] * steps + 0.5)
    own = [1.0] * begins + list(settings["mag_ratios"][begins:])  # before that step nothing is added up
    return simulate(own, settings["threshold"], settings["max_skip_steps"], (begins - 0.5) / steps)


def read(path: Path, given: Given) -> Read:
    settings = {**DEFAULTS, **arguments(path, CLASS, DEFAULTS)}
    if settings["mag_ratios"] is None or settings["calibrate"]:
        raise FormatError(f"{path}: needed mag_ratios, and no calibrate; a calibration of diffusers prints them")
    steps = whole(f"{path}: num_inference_steps", settings["num_inference_steps"], least=1)
    found = numbers(f"{path}: mag_ratios", settings["mag_ratios"])
    if not steps == len(found) == given.steps:
        raise FormatError(
            f"{path} is for {steps} steps with {len(found)} ratios, and {given.steps} are asked for; those of another "
            "number of steps were not measured: import with --steps of its own"
        )
    del settings["calibrate"]
    return Read("magcache", settings, plan=body_plan(follows(str(path), settings), given))


FORMAT = Format(
    name="diffusers-magcache",
    engine="diffusers 0.42.1",
    source="huggingface/diffusers: hooks/mag_cache.py",
    suffix=".json",
    holds="masks of whole steps of all blocks, held",
    loses="branches; guidance passes share one mask",
    use=(
        "import diffusers, json; made = json.load(open('FILE'))",
        "config = getattr(diffusers, made['class'])(**made['kwargs'])",
        "diffusers.hooks.apply_mag_cache(pipe.transformer, config)",
        "It counts its steps by itself: after a generation that was interrupted, reset or apply the hooks again.",
    ),
    export=export,
    read=read,
)
