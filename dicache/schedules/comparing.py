"""What differs between two schedules."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dicache.schedules.schedule import Schedule

Pair = tuple[Any, Any]  # of the one and of the other; None where it has nothing of the name

SECTIONS = (
    "settings",
    "made_for",
    "policy",
    "plan",
    "corrections",
    "measured",
    "anatomy",
)  # of the file, compared key by key
SHORT = 40  # characters of a value that is written out


@dataclass(frozen=True)
class Differences:
    """What differs between two schedules; empty where nothing does.

    Attributes:
        method: Both.
        steps: Both.
        macs_fraction: Both, of the passes that have no rules of their own; NaN if not known.
        sections: For each section of the file, the values that differ.
        sites: The sites whose letters differ.
        macs_by_context: The share of each guidance pass that has rules of its own in either.
        sites_by_context: The sites whose letters differ in each of these passes.
        not_compared: Why sites are not compared; empty if they are.
    """

    method: tuple[str, str]
    steps: tuple[int, int]
    macs_fraction: tuple[float, float]
    sections: Mapping[str, Mapping[str, Pair]]
    sites: Mapping[str, tuple[str, str]]
    macs_by_context: Mapping[str, tuple[float, float]]
    sites_by_context: Mapping[str, Mapping[str, tuple[str, str]]]
    not_compared: str

    @property
    def equal(self) -> bool:
        """Whether the schedules say the same."""
        return self.method[0] == self.method[1] and self.steps[0] == self.steps[1] and not any(self.sections.values())

    def to_json(self) -> dict[str, Any]:
        content = {
            "equal": self.equal,
            "method": list(self.method),
            "steps": list(self.steps),
            "macs_fraction": _known(self.macs_fraction),
            **{section: {name: list(pair) for name, pair in self.sections[section].items()} for section in SECTIONS},
            "sites": {site: list(rows) for site, rows in self.sites.items()},
        }
        if self.macs_by_context:
            content["macs_fraction_by_context"] = {c: _known(pair) for c, pair in self.macs_by_context.items()}
            content["sites_by_context"] = {
                context: {site: list(rows) for site, rows in sites.items()}
                for context, sites in self.sites_by_context.items()
            }
        return content


def compare(one: Schedule, other: Schedule) -> Differences:
    """Return what differs. Numbers differ if they are not the same number."""
    # As a file has it: the settings of a schedule that was not read from one may be tuples.
    contents = [json.loads(json.dumps(schedule.to_json())) for schedule in (one, other)]
    a, b = contents
    not_compared = ""
    if one.anatomy.sites != other.anatomy.sites:
        not_compared = "the models have other blocks or branches"
    elif not (one.foreseen and other.foreseen):
        not_compared = "it is decided at run time, and no calibration says what to expect"
    contexts = sorted({*one.contexts, *other.contexts})
    return Differences(
        method=(one.method, other.method),
        steps=(one.steps, other.steps),
        macs_fraction=(one.macs_fraction(), other.macs_fraction()),
        sections={section: _differing(a.get(section, {}), b.get(section, {})) for section in SECTIONS},
        sites={} if not_compared else _differing(one.table(), other.table()),
        macs_by_context={c: (one.macs_fraction(c), other.macs_fraction(c)) for c in contexts},
        sites_by_context={c: {} if not_compared else _differing(one.table(c), other.table(c)) for c in contexts},
        not_compared=not_compared,
    )


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Pair]:
    pairs = {key: (one.get(key), other.get(key)) for key in (*one, *(key for key in other if key not in one))}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


def in_words(pair: Pair) -> str:
    """Write two values that differ in a line; of long lists, how many of their values differ, and the first."""
    a, b = pair
    texts = (_text(a), _text(b))
    if max(map(len, texts)) <= SHORT:
        return " | ".join(texts)
    if not isinstance(a, list) or not isinstance(b, list):
        return " | ".join(_short(value) for value in pair)
    if len(a) != len(b):
        return f"{len(a)} values | {len(b)} values"
    places = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    first = " | ".join(_short(values[places[0]]) for values in (a, b))
    return f"{len(places)} of {len(a)} values differ, the first at {places[0]}: {first}"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(value: Any) -> str:
    text = _text(value)
    if len(text) <= SHORT:
        return text
    return f"{len(value)} values" if isinstance(value, (list, dict)) else f"{text[: SHORT - 3]}..."


def _known(fractions: tuple[float, float]) -> list[float | None]:
    return [None if math.isnan(fraction) else fraction for fraction in fractions]
