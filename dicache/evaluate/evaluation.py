"""Judge schedules by what they make, against the uncached run of the same seeds and against fewer steps."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dicache.anatomy import StepClock
from dicache.evaluate.quality import Mean, mean_with_interval, paired_difference, psnr, ssim
from dicache.evaluate.references import Trajectory, key_of, latent_error, read, write
from dicache.evaluate.timing import Variant as Timed
from dicache.evaluate.timing import interleaved, speedup
from dicache.models.launching import ALONE, Workers
from dicache.models.sampling import Sampling, sample
from dicache.runtime import Cache, apply
from dicache.schedules import Schedule, ScheduleError

Judge = Callable[[np.ndarray], float]  # images -> one number, such as the share that shows what was asked for
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]  # images and references -> a value each
UNCACHED = "uncached"


@dataclass(frozen=True)
class Result:
    """What one variant made of the same conditions and seeds.

    Attributes:
        name: Of the schedule, or `uncached`, or `25 steps`.
        steps: Inference steps.
        computed_steps: Mean over images of the steps at which everything was computed.
        macs_fraction: Multiply-accumulates as a share of the uncached run's.
        speedup: Uncached wall time / this one's, the median of interleaved rounds, each of another image; None if it
            was not timed.
        psnr: In dB against the uncached images; identical images count as 120.
        ssim: Structural similarity with them.
        psnr_gain: PSNR minus that of fewer steps at the nearest cost, image by image of the same seed; None where
            that was not run.
        latent_error: |z - z'| / |z'| of the latents after each step against the uncached run, mean over images;
            empty for another number of steps.
        distances: From the uncached images by other measures, by name.
        judged: What the judges say, by name.
        computed_each: The steps at which everything was computed, image by image; empty where all have the same.
        psnr_each: The PSNR of each image, for `paired_difference` with another result of the same conditions and seeds.
        images: What was made, (n, h, w, 3).
    """

    name: str
    steps: int
    computed_steps: float
    macs_fraction: float
    speedup: float | None
    psnr: Mean
    ssim: Mean
    psnr_gain: Mean | None = None
    latent_error: tuple[float, ...] = ()
    distances: Mapping[str, Mean] = field(default_factory=dict)
    judged: Mapping[str, float] = field(default_factory=dict)
    computed_each: tuple[float, ...] = ()
    psnr_each: tuple[float, ...] = field(default=(), repr=False)
    images: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "schedule": self.name,
            "runs": len(self.images),
            "steps": self.steps,
            "computed_steps": self.computed_steps,
            "macs_fraction": self.macs_fraction,
            "speedup": self.speedup,
            "psnr": self.psnr.to_json(),
            "ssim": self.ssim.to_json(),
            "psnr_gain": None if self.psnr_gain is None else self.psnr_gain.to_json(),
            "psnr_each": [round(value, 4) for value in self.psnr_each],
            "latent_error": list(self.latent_error),
            **{name: value.to_json() for name, value in self.distances.items()},
            **self.judged,
        }


@dataclass(frozen=True)
class Replayed:
    """What a pipeline made of some conditions and seeds with a schedule.

    Attributes:
        trajectory: The images and the latents on the way to them.
        macs_fraction: Multiply-accumulates as a share of the uncached run's.
        computed_each: The steps at which everything was computed, image by image.
        steps_each: Image by image, for each guidance pass a letter a step: C all computed, `.` not all.
    """

    trajectory: Trajectory
    macs_fraction: float
    computed_each: tuple[float, ...]
    steps_each: tuple[Mapping[str, str], ...]

    @property
    def computed_steps(self) -> float:
        return float(np.mean(self.computed_each))


@dataclass(frozen=True)
class _Variant:
    """A way to make the images: with a schedule, or with another number of steps."""

    name: str
    sampling: Sampling
    schedule: Schedule | None = None
    batch: int = 8

    def attached(self, pipeline: Any) -> AbstractContextManager[Cache | None]:
        return nullcontext() if self.schedule is None else apply(pipeline, self.schedule)


def evaluate(
    pipeline: Any,
    schedules: Sequence[tuple[str, Schedule]],
    conditions: Sequence[str],
    *,
    sampling: Sampling | None = None,
    seed: int = 1000,
    fewer_steps: bool = True,
    judges: Mapping[str, Judge] | None = None,
    distances: Mapping[str, Distance] | None = None,
    timing_rounds: int = 5,
    references: Path | None = None,
    progress: bool = True,
    workers: Workers = ALONE,
) -> tuple[Result, list[Result], list[Result]]:
    """Run the pipeline uncached, with each schedule, and with fewer steps at each schedule's cost.

    Adaptive schedules see one image at a time, as a user's single image would; the others do not depend on the batch.

    Args:
        pipeline: A diffusers pipeline.
        schedules: Names and schedules.
        conditions: Prompts or classes, one an image.
        sampling: How to call the pipeline.
        seed: Of the first image; the next ones count up. Far from the profile's, so that nothing is judged on
            what it was calibrated with.
        fewer_steps: Whether to run the baseline that any cache has to beat.
        judges: Name -> a function of all images.
        distances: Name -> a function of all images and the uncached ones, that gives a value each.
        timing_rounds: Rounds of single images to time; 0 times nothing.
        references: Folder in which uncached runs are kept from one evaluation to the next; None keeps none.
        progress: Whether to show a bar on standard error.
        workers: Processes that call this alike and share the images; the first of them times, when all are made.

    Returns:
        The uncached result, those of the schedules in their order, and those of fewer steps.

    Raises:
        ScheduleError: If a schedule does not fit the pipeline as it is called, or two have one name.
        RanksError: If another worker has died.
    """
    names = [name for name, _ in schedules]
    if taken := [name for name in names if names.count(name) > 1 or is_reserved(name)]:
        raise ScheduleError(
            f"results are told apart by name, and {taken[0]!r} is that of several, or of a run without a schedule; "
            "give each schedule a name of its own"
        )
    sampling = (sampling or Sampling()).resolved(pipeline)
    progress = progress and workers.rank == 0
    assert sampling.steps is not None
    judges = judges or {}
    seeds = [seed + i for i in range(len(conditions))]
    uncached = _Variant(UNCACHED, sampling)
    reference = reference_run(pipeline, conditions, seeds, sampling, references, progress, workers)

    cached: list[tuple[_Variant, Replayed]] = []
    for name, schedule in schedules:
        variant = _with_schedule(name, sampling, schedule)
        cached.append((variant, replay(pipeline, name, schedule, conditions, seeds, sampling, progress, workers)))

    fewer: dict[int, tuple[_Variant, Trajectory]] = {}
    alike = [max(1, round(made.macs_fraction * sampling.steps)) for _, made in cached]
    for count in sorted(set(alike), reverse=True) if fewer_steps else ():
        if count < sampling.steps:
            variant = _Variant(f"{count} steps", replace(sampling, steps=count))
            fewer[count] = variant, _images(pipeline, variant, conditions, seeds, progress, workers)[0]

    variants = [uncached, *(row[0] for row in cached), *(row[0] for row in fewer.values())]
    times = timing_rounds and workers.rank == 0
    seconds = _time(pipeline, variants, conditions, seeds, timing_rounds, progress) if times else {}
    workers.wait()  # so that nobody works beside what is timed

    def result(
        variant: _Variant,
        made: Trajectory,
        computed: float,
        fraction: float,
        count: int = 0,
        each: tuple[float, ...] = (),
    ) -> Result:
        images = made.images
        decibels = psnr(images, reference.images)
        rival = psnr(fewer[count][1].images, reference.images) if count in fewer else None
        same_steps = made.latents.shape == reference.latents.shape
        timed = seconds.get(variant.name)
        return Result(
            name=variant.name,
            steps=variant.sampling.steps or 0,
            computed_steps=computed,
            macs_fraction=fraction,
            speedup=speedup(seconds[UNCACHED], timed) if timed else None,
            psnr=mean_with_interval(decibels, prompts=conditions),
            ssim=mean_with_interval(ssim(images, reference.images), prompts=conditions),
            psnr_gain=None if rival is None else paired_difference(decibels, rival, conditions),
            latent_error=tuple(latent_error(made.latents, reference.latents).tolist()) if same_steps else (),
            distances={
                name: mean_with_interval(distance(images, reference.images), prompts=conditions)
                for name, distance in (distances or {}).items()
            },
            judged={name: judge(images) for name, judge in judges.items()},
            computed_each=each,
            psnr_each=tuple(decibels.tolist()),
            images=images,
        )

    steps = sampling.steps
    return (
        result(uncached, reference, steps, 1.0),
        [
            result(
                variant,
                made.trajectory,
                made.computed_steps,
                made.macs_fraction,
                count,
                made.computed_each if variant.batch == 1 else (),
            )
            for (variant, made), count in zip(cached, alike, strict=True)
        ],
        [result(variant, made, count, count / steps) for count, (variant, made) in fewer.items()],
    )


def is_reserved(name: str) -> bool:
    """Whether a name is that of a result without a schedule: `uncached`, or `25 steps`."""
    return name == UNCACHED or re.fullmatch(r"\d+ steps", name) is not None


def reference_run(
    pipeline: Any,
    conditions: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    references: Path | None = None,
    progress: bool = True,
    workers: Workers = ALONE,
) -> Trajectory:
    """Return the uncached run, from the folder of references if it is kept there; else it is made, and kept there.

    Args:
        pipeline: A diffusers pipeline.
        conditions: Prompts or classes, one an image.
        seeds: One for each condition.
        sampling: How to call the pipeline, resolved.
        references: The folder; None keeps none.
        progress: Whether to show a bar on standard error.
        workers: Processes that share the images; the first of them looks into the folder, and writes.
    """
    keeps = references is not None and workers.rank == 0
    key = key_of(pipeline, conditions, seeds, sampling) if keeps else ""
    kept = workers.first(read(references, key) if references and keeps else None)
    if kept is not None:
        return kept
    made, _ = _images(pipeline, _Variant(UNCACHED, sampling), conditions, seeds, progress, workers)
    if references and keeps:
        write(references, key, made)
    return made


def replay(
    pipeline: Any,
    name: str,
    schedule: Schedule,
    conditions: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    progress: bool = True,
    workers: Workers = ALONE,
) -> Replayed:
    """Run the pipeline with a schedule and count what it computes.

    Raises:
        ScheduleError: If the schedule does not fit the pipeline as it is called.
    """
    variant = _with_schedule(name, sampling, schedule)
    made, stats = _images(pipeline, variant, conditions, seeds, progress, workers)
    shares, steps = zip(*stats, strict=True)
    computed = tuple(float(np.mean([row.count("C") for row in passes.values()])) for passes in steps)
    return Replayed(made, float(np.mean(shares)), computed, steps)


def _with_schedule(name: str, sampling: Sampling, schedule: Schedule) -> _Variant:
    return _Variant(name, sampling, schedule, batch=1 if schedule.adaptive else 8)


def _images(
    pipeline: Any,
    variant: _Variant,
    conditions: Sequence[str],
    seeds: Sequence[int],
    progress: bool,
    workers: Workers = ALONE,
) -> tuple[Trajectory, list[tuple[float, Mapping[str, str]]]]:
    """Return what was made, and of each image the share of multiply-accumulates and what each pass computed."""
    made: list[tuple[np.ndarray, np.ndarray, tuple[float, Mapping[str, str]]]] = []  # image by image
    steps: list[np.ndarray] = []
    own = workers.share(len(conditions))

    def keep() -> None:
        steps.append(clock.latents.detach().to("cpu", torch.float16).numpy())

    bar = tqdm(total=len(own), desc=variant.name, unit="image", disable=not progress, leave=False)
    with bar, variant.attached(pipeline) as cache:
        clock = StepClock(pipeline.scheduler, lambda _: steps.clear(), keep)
        try:
            for start in range(0, len(own), variant.batch):
                batch = own[start : start + variant.batch]
                before = (cache.stats.macs, cache.stats.calls) if cache else (0.0, 0)
                images = sample(pipeline, [conditions[i] for i in batch], [seeds[i] for i in batch], variant.sampling)
                # DiTPipeline hands its sampler the latents twice over, once for each half of the guidance batch.
                latents = np.stack(steps, axis=1)[: len(images)]
                share = (cache.stats.macs - before[0]) / (cache.stats.calls - before[1]) if cache else 1.0
                stats = share, dict(cache.stats.steps) if cache else {}
                made += [(image, path, stats) for image, path in zip(images, latents, strict=True)]
                bar.update(len(batch))
        finally:
            clock.detach()
    every_image, every_path, every_stats = zip(*workers.gather(made, len(conditions)), strict=True)
    return Trajectory(np.stack(every_image), np.stack(every_path)), list(every_stats)


def _time(
    pipeline: Any,
    variants: Sequence[_Variant],
    conditions: Sequence[str],
    seeds: Sequence[int],
    rounds: int,
    progress: bool,
) -> dict[str, list[float]]:
    """Return the seconds of each variant in each round; a round is one condition and seed, as what an adaptive schedule
    skips depends on them."""
    bar = tqdm(total=(rounds + 1) * len(variants), desc="timing", disable=not progress, leave=False)

    def ready(variant: _Variant) -> Timed:
        images = cycle(zip(conditions, seeds, strict=True))

        @contextmanager
        def attached() -> Iterator[Callable[[], object]]:
            condition, seed = next(images)
            with variant.attached(pipeline):
                yield lambda: sample(pipeline, [condition], [seed], variant.sampling)
            bar.update()

        return attached

    with bar:
        return interleaved({variant.name: ready(variant) for variant in variants}, rounds)
