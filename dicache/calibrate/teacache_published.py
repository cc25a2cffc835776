"""TeaCache's published polynomials: what they are of, where they are from, and what was quoted for them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dicache.calibrate.methods import CalibrationError
from dicache.schedules import TeaCachePolicy
from dicache.schedules.policies import Negative

Signal = Literal["modulated", "time", "time-projected"]
FILE = Path(__file__).with_suffix(".json")
SIGNALS: Mapping[Signal, str] = {  # as a profile calls them
    "modulated": "input",
    "time": "time",
    "time-projected": "time_projected",
}
IN_WORDS: Mapping[Signal, str] = {
    "modulated": "modulated input",
    "time": "time embedding",
    "time-projected": "projected time embedding",
}
LARGEST = 1.0  # relative change at which a polynomial that still rises has passed every threshold quoted for it


@dataclass(frozen=True)
class Quoted:
    """What was reported of one threshold.

    Attributes:
        threshold: Unitless.
        speedup: How many times faster; None where only a name was given to it.
        told: In the source's words or times.
    """

    threshold: float
    speedup: float | None = None
    told: str = ""

    def __str__(self) -> str:
        speedup = "" if self.speedup is None else f" {self.speedup:g}x"
        return f"{self.threshold:g}{speedup}" + (f" ({self.told})" if self.told else "")


@dataclass(frozen=True)
class Published:
    """A published polynomial.

    Attributes:
        name: As `--published` takes it.
        model: That it was fitted to, or is used for.
        source: Where it is from.
        signal: Whose relative change x is.
        coefficients: Highest power first.
        input_range: Smallest and largest x it was fitted on; None where that was not published.
        steps: That the thresholds were quoted at; None likewise.
        first_steps: At the start that are always computed there.
        last_steps: At the end.
        quoted: Thresholds.
        transformers: Classes of diffusers that are this model's.
        package_model: What `--model` calls the model, if it has a name for it.
        note: What else to know.
    """

    name: str
    model: str
    source: str
    signal: Signal
    coefficients: tuple[float, ...]
    input_range: tuple[float, float] | None
    steps: int | None
    first_steps: int
    last_steps: int
    quoted: tuple[Quoted, ...] = ()
    transformers: tuple[str, ...] = ()
    package_model: str | None = None
    note: str = ""

    @property
    def held_range(self) -> tuple[float, float]:
        """Where x is held when nobody says where: in the range of the fit, or else where p makes sense."""
        return self.input_range or sensible_range(self.coefficients)

    def policy(
        self,
        threshold: float,
        negative: Negative = "clamp",
    ) -> TeaCachePolicy:
        """Return the policy, with the steps that are always computed where it was published."""
        return TeaCachePolicy(
            threshold,
            self.coefficients,
            self.held_range,
            negative,
            first_steps=self.first_steps,
            last_steps=self.last_steps,
        )

    def to_json(self) -> dict[str, Any]:
        """Return what a schedule says of it."""
        content = {
            "name": self.name,
            "model": self.model,
            "source": self.source,
            "signal": IN_WORDS[self.signal],
            "fitted_range": None if self.input_range is None else list(self.input_range),
            "quoted": [str(each) for each in self.quoted],
            "quoted_for": {
                "negative": "reference",
                "steps": self.steps,
                "first_steps": self.first_steps,
                "last_steps": self.last_steps,
            },
        }
        return content | ({"note": self.note} if self.note else {})


@cache
def all_published() -> Mapping[str, Published]:
    """Return every polynomial in the package by its name."""
    return {name: _read(name, entry) for name, entry in json.loads(FILE.read_text(encoding="utf-8")).items()}


def published(name: str) -> Published:
    """Return one polynomial.

    Raises:
        CalibrationError: If there is none of this name.
    """
    known = all_published()
    if name not in known:
        raise CalibrationError(f"teacache: nothing is published as {name!r}; known are {', '.join(known)}")
    return known[name]


def published_for(transformer: str) -> list[Published]:
    """Return the polynomials for a class of diffusers."""
    return [entry for entry in all_published().values() if transformer in entry.transformers]


def quoted_in_words(told: Mapping[str, Any]) -> str:
    """Return which speed-ups were quoted for which threshold, of what `Published.to_json` says."""
    if not told["quoted"]:
        return f"No threshold was quoted for {told['name']}."
    at = told["quoted_for"]
    steps = "an unstated number of steps" if at["steps"] is None else f"{at['steps']} steps"
    return (
        f"Quoted for {told['name']} as published (--negative {at['negative']}, {steps}): {'; '.join(told['quoted'])}."
    )


def sensible_range(coefficients: tuple[float, ...]) -> tuple[float, float]:
    """Return where x is held when the range of a polynomial's fit is not known.

    It begins at the smallest x at which p is not negative. It ends at a relative change of 1; where p becomes negative
    before, it ends at the last peak before that, as larger changes of the input must not foretell smaller ones of the
    output, let alone none. It is no fitted range: within it p may still fall, and is not known to foretell anything.

    Args:
        coefficients: Highest power first.

    Raises:
        CalibrationError: If p is negative everywhere.
    """
    edges = [0.0, *_real(np.roots(coefficients)), LARGEST]
    positive = [bool(np.polyval(coefficients, (low + high) / 2) > 0) for low, high in pairwise(edges)]
    if True not in positive:
        raise CalibrationError(f"teacache: the polynomial is nowhere positive between 0 and {LARGEST:g}")
    start = positive.index(True)
    stop = positive.index(False, start) if False in positive[start:] else len(positive)
    low, high = edges[start], edges[stop]
    if high < LARGEST:
        slope, bend = np.polyder(coefficients), np.polyder(coefficients, 2)
        peaks = [x for x in _real(np.roots(slope)) if low < x < high and np.polyval(bend, x) < 0]
        high = peaks[-1] if peaks else high
    return low, high


def _real(roots: np.ndarray) -> list[float]:
    """Return the real ones between 0 and the largest x, in order."""
    real = roots[np.abs(roots.imag) < 1e-9].real
    return sorted({float(x) for x in real if 0 < x < LARGEST})


def _read(name: str, entry: Mapping[str, Any]) -> Published:
    known = dict(entry)
    given = known.pop("input_range")
    return Published(
        name=name,
        coefficients=tuple(known.pop("coefficients")),
        input_range=None if given is None else (given[0], given[1]),
        quoted=tuple(Quoted(**each) for each in known.pop("quoted", ())),
        transformers=tuple(known.pop("transformers", ())),
        **known,
    )
