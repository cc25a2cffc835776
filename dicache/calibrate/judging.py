"""What schedules make of real runs of a model, and what is sought of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dicache.anatomy import Anatomy
from dicache.anatomy.fingerprint import config_of, digest, dtype_of, fingerprint
from dicache.calibrate.methods import CalibrationError, letters_of
from dicache.evaluate.evaluation import reference_run, replay
from dicache.evaluate.quality import psnr
from dicache.evaluate.references import key_of, read
from dicache.models.sampling import Sampling
from dicache.runtime.apply import denoiser
from dicache.schedules import Plan, Rule, Schedule, Target

ROUNDING = 1e-9  # a share of the MACs that is meant to be met exactly, is


@dataclass(frozen=True)
class Score:
    """What a schedule made of the runs that it was tried on.

    Attributes:
        psnr: Mean over the images in dB, against the uncached ones.
        macs_fraction: Multiply-accumulates as a share of the uncached run's, the mean over the images.
        each: The PSNR of each image in dB, in the order of the runs; empty where it is not known.
    """

    psnr: float
    macs_fraction: float
    each: tuple[float, ...] = ()

    def joined(self, other: "Score") -> "Score":
        """Return the score on the runs of both; each must know its images."""
        n, m = len(self.each), len(other.each)
        each = (*self.each, *other.each)
        macs = (n * self.macs_fraction + m * other.macs_fraction) / (n + m)
        return Score(float(np.mean(each)), macs, each)


class Judge(Protocol):
    """Tells what a schedule makes of some runs."""

    def __len__(self) -> int:
        """Return how many runs there are."""

    def __call__(self, schedule: Schedule, which: slice = ...) -> Score:
        """Return what a schedule makes of some of the runs, image by image."""


@dataclass(frozen=True)
class Goal:
    """The best images for a share of the multiply-accumulates, or the fewest of these for images that are good enough.

    Attributes:
        max_macs: Share of the uncached run's multiply-accumulates that is not exceeded; the PSNR is maximised.
        min_psnr: In dB, that is not gone below; the multiply-accumulates are minimised.
    """

    max_macs: float | None = None
    min_psnr: float | None = None

    def __post_init__(self) -> None:
        if (self.max_macs is None) == (self.min_psnr is None):
            raise CalibrationError("a search has one goal: a share of the MACs, or a PSNR")
        if self.max_macs is not None and not 0 < self.max_macs <= 1:
            raise CalibrationError(f"the share of the MACs must be above 0 and at most 1, found {self.max_macs}")
        if self.min_psnr is not None and not math.isfinite(self.min_psnr):
            raise CalibrationError(f"the PSNR must be a number of dB, found {self.min_psnr}")

    def violation(self, score: Score) -> float:
        """By how much the limit is broken; at most 0 where it is kept."""
        if self.max_macs is not None:
            return score.macs_fraction - self.max_macs - ROUNDING
        assert self.min_psnr is not None
        return self.min_psnr - score.psnr

    def rank(self, score: Score) -> tuple[float, float]:
        """The larger, the better."""
        psnr, saved = score.psnr, -score.macs_fraction
        return (saved, psnr) if self.max_macs is None else (psnr, saved)

    def __str__(self) -> str:
        return f"{self.min_psnr:g} dB or more" if self.max_macs is None else f"at most {self.max_macs:.3f} of the MACs"


@dataclass
class RealRuns:
    """Runs of a pipeline that schedules are tried on, and what they are without one.

    Attributes:
        pipeline: A diffusers pipeline.
        conditions: Prompts or classes, one an image.
        seeds: One for each condition.
        sampling: How the pipeline is called, resolved.
        reference: What it makes of them uncached, as images.
        spent: What was computed so far, as a number of uncached images: each image that was made counts as much as the
            share of the multiply-accumulates that it took, an uncached one as 1, one read from disk as 0.
    """

    pipeline: Any
    conditions: Sequence[str]
    seeds: Sequence[int]
    sampling: Sampling
    reference: np.ndarray = field(repr=False)
    spent: float = 0.0

    @classmethod
    def of(
        cls,
        pipeline: Any,
        conditions: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        references: Path | None = None,
        progress: bool = True,
    ) -> "RealRuns":
        """Make the uncached images, or read them from the folder of references."""
        sampling = sampling.resolved(pipeline)
        kept = read(references, key_of(pipeline, conditions, seeds, sampling)) if references else None
        if kept is not None:
            return cls(pipeline, conditions, seeds, sampling, kept.images)
        made = reference_run(pipeline, conditions, seeds, sampling, references, progress)
        return cls(pipeline, conditions, seeds, sampling, made.images, spent=len(conditions))

    def __len__(self) -> int:
        return len(self.conditions)

    def __call__(self, schedule: Schedule, which: slice = slice(None)) -> Score:
        """Return what a schedule makes of the runs, or of some of them.

        Raises:
            ScheduleError: If the schedule does not fit the pipeline as it is called.
        """
        conditions, seeds = self.conditions[which], self.seeds[which]
        made = replay(self.pipeline, "trial", schedule, conditions, seeds, self.sampling, progress=False)
        self.spent += len(conditions) * made.macs_fraction
        each = psnr(made.trajectory.images, self.reference[which])
        return Score(float(each.mean()), made.macs_fraction, tuple(each.tolist()))

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that a score depends on, but for rounding."""
        model, scheduler = denoiser(self.pipeline), self.pipeline.scheduler
        return {
            "model": type(model).__name__,
            "weights": fingerprint(model),
            "dtype": dtype_of(model),
            "scheduler": type(scheduler).__name__,
            "scheduler_config": digest(config_of(scheduler)),
            **asdict(self.sampling),
            "runs": len(self.conditions),
            "conditions": digest(list(self.conditions)),
            "seeds": list(self.seeds),
        }


def evenly_spaced(anatomy: Anatomy, target: Target, steps: int, macs_fraction: float) -> Schedule:
    """Return the schedule that skips the body at all but evenly spaced steps, at about this cost: what to beat."""
    body = sum(block.macs for block in anatomy.blocks)

    def plan(count: int) -> Plan:
        computed = np.round(np.linspace(0, steps - 1, count)).astype(int)
        letters = letters_of(step in computed for step in range(steps))
        return Plan(steps, (Rule("skip", letters),) if "." in letters else ())

    counts = range(1, steps + 1)
    nearest = min(counts, key=lambda n: abs(1 - (1 - n / steps) * body / max(anatomy.macs, 1) - macs_fraction))
    return Schedule("mask", {"steps_computed": nearest}, anatomy, target, steps, plan=plan(nearest))
