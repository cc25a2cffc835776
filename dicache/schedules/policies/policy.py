"""What all policies share: steps that are always computed, what they remember, how they are written."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from dicache.anatomy.parts import Anatomy
from dicache.schedules.plan import PlanError


@dataclass
class Memory:
    """What a policy remembers of one guidance pass between its steps.

    Attributes:
        distance: What it last compared with its limit; None where it decided without.
    """

    distance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Chooses at run time, step by step, whether to skip a row of blocks and add their last delta instead.

    Attributes:
        first_steps: How many steps at the start of the schedule are always computed; a generation that begins later, as
            image-to-image does, has so many fewer of them.
        last_steps: How many steps at its end are always computed.
    """

    first_steps: int = 1
    last_steps: int = 1
    name: ClassVar[str]
    optional: ClassVar[frozenset[str]] = frozenset()  # keys that a file may leave out

    def __post_init__(self) -> None:
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in (self.first_steps, self.last_steps)):
            raise self.error(
                f"first_steps and last_steps must be whole numbers, found {self.first_steps!r} and {self.last_steps!r}"
            )
        if self.first_steps < 1 or self.last_steps < 0:
            raise self.error(
                "first_steps must be 1 or more and last_steps 0 or more, "
                f"found {self.first_steps} and {self.last_steps}"
            )

    def forced(self, step: int, steps: int) -> bool:
        """Return whether a step is computed whatever is measured."""
        return step < self.first_steps or step >= steps - self.last_steps

    @abstractmethod
    def remember(self) -> Memory:
        """Return what is remembered of a guidance pass before its first step."""

    @abstractmethod
    def decide(self, step: int, steps: int, x: float | None, memory: Any) -> bool:
        """Return whether to compute this step, and note that in the memory.

        Args:
            step: Index of the step.
            steps: Number of steps of the generation.
            x: What is measured for the decision; None if there is nothing to measure or to skip with.
            memory: Of the guidance pass, from `remember`.
        """

    @abstractmethod
    def skipped(self, anatomy: Anatomy) -> tuple[int, int]:
        """Return the blocks [start, stop) that a skip leaves out.

        Raises:
            PlanError: If this model has no such blocks.
        """

    @abstractmethod
    def macs_saved(self, anatomy: Anatomy) -> int:
        """Return the multiply-accumulates that a skipped step does not do."""

    @property
    @abstractmethod
    def limit(self) -> str:
        """What decides how much is skipped, in words: `threshold 0.1`."""

    def misfit(self, letters: str, compared: Sequence[float | None]) -> str | None:
        """Say that the limit does not fit the model, if nothing was skipped in a generation or all that may be.

        Args:
            letters: What was done at each step of one guidance pass: `C`, `.`, or `-` where it was not called.
            compared: What was compared with the limit.
        """
        free = [x for step, x in enumerate(letters) if x != "-" and not self.forced(step, len(letters))]
        skipped = free.count(".")
        if len(free) < 2 or 0 < skipped < len(free):
            return None
        seen = [x for x in compared if x is not None]
        found = f" (it was compared with {min(seen):.4g} to {max(seen):.4g})" if seen else ""
        did = "skipped every step that it may" if skipped else "never skipped a step"
        advice = "lower it, or calibrate" if skipped else "raise it or what else limits it, or calibrate"
        return f"{self.name}: {self.limit} {did}{found}; {advice} with --target-speedup for this model and sampler"

    def error(self, said: str) -> PlanError:
        return PlanError(f"{self.name}: {said}")

    def check_finite(self, names: str, numbers: tuple[Any, ...]) -> None:
        """Raise PlanError unless all are finite numbers."""
        if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
            raise self.error(f"{names} must be finite numbers, found {numbers}")

    def to_json(self) -> dict[str, Any]:
        own_first = sorted(fields(self), key=lambda field: bool(field.kw_only))
        content = {f.name: getattr(self, f.name) for f in own_first}
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in content.items()}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read what `to_json` returns.

        Raises:
            PlanError: If a key is unknown or missing, or a value is not of its kind.
        """
        keys = {"name", *(f.name for f in fields(cls))}
        if wrong := sorted((keys - cls.optional - set(content)) | (set(content) - keys)):
            raise PlanError(
                f"policy {cls.name}: unknown or missing key {wrong[0]!r}; the keys are {', '.join(sorted(keys))}"
            )
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items() if k != "name"}
        try:
            return cls(**given)
        except (TypeError, IndexError) as error:
            raise PlanError(f"policy {cls.name} cannot be read: {error}") from None
