"""Plain masks: a JSON list of 0 and 1, a number a step, 1 computed; or the same digits as text.

References:
    The masks of cache-dit's SCM and LeMiCa (unicomai/lemica); 0-based, the noisiest step first.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicache.formats.files import mask, read_text
from dicache.formats.format import Format, FormatError, Given, Losses, Read
from dicache.formats.steps import body_plan, step_mask
from dicache.schedules import Plan, Rule, Schedule
from dicache.schedules.plan import ACT


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    found = step_mask(schedule, losses)
    losses.stated.append("which blocks the mask is for")
    return json.dumps(found.numbers) + "\n"


def read(path: Path, given: Given) -> Read:
    text = read_text(path)
    digits = [int(letter) for letter in text if letter in "01"]
    if rest := sorted(set(text) - set("01[], \t\r\n")):
        raise FormatError(f"{path} must hold 0 and 1 only, as a list or as digits, found {rest[0]!r}")
    letters = mask(str(path), digits, given.steps)
    hold = given.settings.get("hold") or "blocks"
    if hold == "blocks":
        return Read("mask", {"hold": hold}, plan=body_plan(letters, given))
    rules = (Rule("reuse", letters),) if ACT in letters else ()
    return Read("mask", {"hold": hold}, plan=Plan(given.steps, rules))


FORMAT = Format(
    name="mask",
    engine="-",
    source="a list of 0 and 1, 1 computed, the noisiest step first",
    suffix=".json",
    holds="masks of whole steps",
    loses="which blocks; what stands in",
    export=export,
    read=read,
)
