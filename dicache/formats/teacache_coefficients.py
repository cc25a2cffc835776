"""TeaCache's coefficients alone: a JSON list of five numbers, highest power first.

References:
    ali-vilab/TeaCache (2025-06-08): lists in its scripts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicache.formats.files import as_json, number, read_json
from dicache.formats.format import Format, Given, Losses, Read
from dicache.formats.polynomials import policy_of, read_coefficients, read_policy, settings_of
from dicache.schedules import Schedule


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    policy = policy_of(schedule, losses, "reference")
    losses.stated.append(f"the threshold, {policy.threshold:.6g}, and the steps that are always computed")
    return as_json(list(policy.coefficients))


def read(path: Path, given: Given) -> Read:
    threshold = number("threshold", given.setting("threshold", "of TeaCache"), least=0)
    policy = read_policy(read_coefficients(str(path), read_json(path)), threshold, "reference")
    return Read("teacache", settings_of(policy), policy=policy)


FORMAT = Format(
    name="teacache-coefficients",
    engine="TeaCache of 2025-06-08",
    source="ali-vilab/TeaCache: TeaCache4FLUX/teacache_flux.py",
    suffix=".json",
    holds="the polynomial of a TeaCache schedule",
    loses="threshold, steps that are always computed, the range that x is held in",
    export=export,
    read=read,
)
