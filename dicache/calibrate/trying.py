"""What is tried in the search for the best schedule, on which runs, and what it cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dicache.calibrate.keeping import Kept
from dicache.calibrate.refining import Candidate
from dicache.evaluate.references import key_of
from dicache.evaluate.rerunning import Reruns
from dicache.models.sampling import Sampling


@dataclass(frozen=True)
class Tried:
    """One line of the report.

    Attributes:
        name: Of what was tried.
        psnr: Mean over the runs in dB; None where it could not be made.
        macs_fraction: Share of the multiply-accumulates.
        spent: On all so far, in uncached images.
        steps: A letter a step, where it has a plan: C all computed, `.` not all.
        note: What was done, or why it could not be made.
    """

    name: str
    psnr: float | None
    macs_fraction: float | None
    spent: float
    steps: str = ""
    note: str = ""


@dataclass
class Trying:
    """The runs that schedules are tried on, all of them or the first few, and the report of what was tried.

    Args:
        pipeline: A diffusers pipeline.
        conditions: Prompts or classes, one an image.
        seeds: One for each.
        sampling: How the pipeline is called.
        budget: What may be computed, as a number of uncached images.
        kept: Folder of what was measured; None keeps nothing.
        progress: Whether to show a bar on standard error.

    Attributes:
        report: All that was tried, in order.
        best: Of what was tried on all runs, by what is expected on others.
        beside: What was computed that is not part of the budget, in uncached images.
    """

    pipeline: Any
    conditions: Sequence[str]
    seeds: Sequence[int]
    sampling: Sampling
    budget: float
    kept: Path | None = None
    progress: bool = True
    report: list[Tried] = field(default_factory=list)
    best: Candidate | None = None
    beside: float = 0.0

    def __post_init__(self) -> None:
        self.bar = tqdm(desc="auto", unit="replay", disable=not self.progress)
        self._some: dict[int, Reruns] = {}

    @property
    def runs(self) -> Reruns:
        """All runs."""
        return self.first(len(self.conditions))

    def first(self, count: int) -> Reruns:
        """Return the first of the runs, all if there are no more."""
        count = min(count, len(self.conditions))
        if count not in self._some:
            self._some[count] = Reruns(self.pipeline, self.conditions[:count], self.seeds[:count], self.sampling)
        return self._some[count]

    @property
    def spent(self) -> float:
        """What was computed, in uncached images."""
        return sum(some.spent for some in self._some.values()) + self.beside

    @property
    def left(self) -> float:
        """What is left of the budget."""
        return self.budget - (self.spent - self.beside)

    def told(self, candidate: Candidate, note: str) -> None:
        """Report a candidate that was tried on all runs."""
        self.bar.update()
        steps = "" if candidate.schedule.plan is None else candidate.schedule.expected_steps
        share = candidate.macs_fraction
        self.report.append(Tried(candidate.name, candidate.decibels, share, self.spent, steps, note))
        if self.best is None or candidate.expected > self.best.expected:
            self.best = candidate
        self.bar.set_postfix_str(f"best {self.best.decibels:.1f} dB: {self.best.name}")

    def noted(self, name: str, note: str, macs_fraction: float | None = None) -> None:
        """Report what was not tried on all runs, and why."""
        self.report.append(Tried(name, None, macs_fraction, self.spent, note=note.removeprefix(f"{name}: ")))

    def keeping(self, name: str, runs: int) -> Kept:
        """Return where what some of the runs gave is kept, under all that decides their images."""
        if self.kept is None:
            return Kept()
        key = key_of(self.pipeline, self.conditions[:runs], self.seeds[:runs], self.sampling)
        return Kept(self.kept / f"{name}-{key[:16]}")
