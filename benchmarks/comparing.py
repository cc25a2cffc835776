"""What every method and every peer makes of the same runs of a bundled model; rows that are done are kept."""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

from benchmarks import peers
from benchmarks.bench import BUILD, RUNS, Bench
from benchmarks.peers import Peer, Settings
from benchmarks.tuning import Method, Trial, methods, thinned
from dicache.calibrate.auto import Auto, AutoSearch, Granularity
from dicache.calibrate.judging import Goal
from dicache.calibrate.methods import CalibrationError
from dicache.evaluate.evaluation import reference_run, replay
from dicache.evaluate.quality import psnr
from dicache.evaluate.timing import interleaved, speedup
from dicache.models.judges import judges_of
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions, sample, takes_classes
from dicache.runtime import apply
from dicache.schedules import PlanError, Schedule

KEPT = BUILD.parent / "pareto"
TUNING_IMAGES, TUNING_SEED, SEED = 8, 500_000, 1_000_000  # far from a profile's, which count from 0
BATCH = 8
AUTO_RUNS, AUTO_BUDGET = 16, 600.0
Runs = tuple[list[str], list[int]]  # prompts or classes, and seeds


def split(pipeline: Any, images: int) -> tuple[Runs, Runs]:
    """Return the runs that settings are tuned on, and those that are judged: no prompt, or no seed, in both.

    The first prompts are left to the profile.
    """
    if takes_classes(pipeline):
        tuning, judged = (default_conditions(pipeline, count) for count in (TUNING_IMAGES, images))
    else:
        prompts = list(dict.fromkeys(default_conditions(pipeline, 10_000)))[RUNS:]
        tuning, rest = prompts[:TUNING_IMAGES], prompts[TUNING_IMAGES:]
        judged = [rest[i % len(rest)] for i in range(images)]
    return (tuning, [TUNING_SEED + i for i in range(len(tuning))]), (judged, [SEED + i for i in range(images)])


class Comparison:
    """One model, its runs, and the rows that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.bench = Bench(options.model, 1, 0)
        self.steps, self.budgets = options.steps, sorted(options.budgets, reverse=True)
        self.trials, self.rounds = options.trials, options.rounds
        self.sampling = self.bench.sampling(self.steps)
        self.tuning, self.judged = split(self.bench.pipeline, options.images)
        self.dpm = load(options.model, scheduler="dpm")
        self.judges = judges_of(options.model, self.bench.pipeline, self.judged[0])
        self.first = self.judged[0][: options.first], self.judged[1][: options.first]
        self.references = {id(runs): self._reference(runs) for runs in (self.tuning, self.judged)}
        self.references[id(self.first)] = self.references[id(self.judged)][: options.first]
        measured = hashlib.sha256(self.bench.profile_file(self.steps).read_bytes()).hexdigest()
        identity = (options.model, asdict(self.sampling), torch.__version__, diffusers.__version__, measured)
        self.identity = [*map(str, identity), *peers.PINNED]
        self.folder = KEPT / f"peers.{os.getpid()}"  # of this process alone: another one may compare at the same time

    def _reference(self, runs: Runs) -> np.ndarray:
        return reference_run(self.bench.pipeline, *runs, self.sampling, BUILD / "references").images

    def file(self, kind: str, name: str, settings: Any, runs: Runs) -> Path:
        """Return where a row is kept."""
        content = json.dumps([self.identity, kind, name, settings, runs], sort_keys=True, default=str)
        return KEPT / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.json"

    def row(self, file: Path, runs: Runs, make: Callable[[], tuple[np.ndarray, float]]) -> dict[str, Any]:
        """Return a row, made if it is not kept: PSNR of each image, share of the MACs, what judges say, or an error."""
        if file.exists():
            kept: dict[str, Any] = json.loads(file.read_text())
            return kept
        try:
            images, fraction = make()
        except (CalibrationError, PlanError) as error:
            return self.keep(file, {"error": str(error)})
        return self.keep(file, self.told(images, fraction, runs))

    def told(self, images: np.ndarray, fraction: float, runs: Runs) -> dict[str, Any]:
        if not np.isfinite(images).all():
            return {"error": "the images are not finite"}
        told: dict[str, Any] = {"macs_fraction": fraction, "psnr": psnr(images, self.references[id(runs)]).tolist()}
        if runs is self.judged:
            with torch.no_grad():  # which other threads are not in
                told |= {name: judge(images) for name, judge in self.judges.items()}
        return told

    @staticmethod
    def keep(file: Path, row: dict[str, Any]) -> dict[str, Any]:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(row))
        os.replace(part, file)
        return row

    def replayed(self, schedule: Schedule, runs: Runs) -> tuple[np.ndarray, float]:
        made = replay(self.bench.pipeline, schedule.method, schedule, *runs, self.sampling, progress=False)
        return made.trajectory.images, made.macs_fraction

    def fewer(self, name: str, pipeline: Any, count: int, runs: Runs) -> dict[str, Any]:
        """Return the row of so many steps of a pipeline, which may be one of another solver."""

        def make() -> tuple[np.ndarray, float]:
            sampling = replace(self.sampling, steps=count)
            starts = range(0, len(runs[0]), BATCH)
            parts = [(runs[0][start : start + BATCH], runs[1][start : start + BATCH]) for start in starts]
            return np.concatenate([sample(pipeline, *part, sampling) for part in parts]), count / self.steps

        return self.row(self.file("steps", name, count, runs), runs, make)

    def extra(self, name: str, schedule: Schedule, runs: Runs) -> dict[str, Any]:
        """Return the row of a schedule from a file."""
        file = self.file("extra", name, schedule.to_json(), runs)
        return self.row(file, runs, lambda: self.replayed(schedule, runs))

    def auto(self, budget: float, granularity: Granularity = "any") -> Schedule:
        """Return what `dicache calibrate auto` finds on the prompts that everything is tuned on, with more seeds."""
        prompts, seeds = self.tuning
        conditions = [prompts[i % len(prompts)] for i in range(AUTO_RUNS)]
        file = self.file("auto", granularity, [budget, AUTO_BUDGET], (conditions, seeds))
        if not file.exists():
            profile = self.bench.profile(self.steps)
            several = [seeds[0] + i for i in range(AUTO_RUNS)]
            settings = Auto(Goal(budget), budget=AUTO_BUDGET, granularity=granularity)
            kept = KEPT / f"auto-{self.bench.model}-{self.steps}"
            search = AutoSearch(profile, self.bench.pipeline, conditions, several, self.sampling, settings, kept)
            search().schedule.save(file)
        return Schedule.load(file)

    @cached_property
    def methods(self) -> list[Method]:
        return methods(self.bench, self.steps, self.budgets)

    def ours(self, method: Method, settings: Settings, runs: Runs) -> dict[str, Any]:
        def make() -> tuple[np.ndarray, float]:
            return self.replayed(method.schedule(settings), runs)

        return self.row(self.file("ours", method.name, settings, runs), runs, make)

    def of_peers(self, wanted: Sequence[tuple[Peer, Settings]], runs: Runs) -> list[dict[str, Any]]:
        """Return a row for each peer and settings; those that are not kept are run in one go."""
        files = [self.file("peer", peer.name, settings, runs) for peer, settings in wanted]
        folder = self.folder
        jobs = [
            {
                "key": str(file),
                "peer": peer.kind,
                "settings": settings,
                "conditions": runs[0],
                "seeds": runs[1],
                "batch": 1 if peer.adaptive else BATCH,
                "most": max(self.budgets) if runs is self.tuning else np.inf,
                "file": str(folder / f"{file.stem}.npy"),
            }
            for (peer, settings), file in zip(wanted, files, strict=True)
            if not file.exists()
        ]
        if jobs:
            for answer in tqdm(self._answers(jobs=jobs), total=len(jobs), desc="peers", leave=False):
                told = answer
                images = folder / f"{Path(answer['key']).stem}.npy"
                if "error" not in answer:
                    told = self.told(np.load(images), answer["macs_fraction"], runs)
                images.unlink(missing_ok=True)
                self.keep(Path(answer["key"]), {key: value for key, value in told.items() if key != "key"})
        return [json.loads(file.read_text()) for file in files]

    def _answers(self, jobs: Sequence[Any] = (), timed: Sequence[Any] = ()) -> Iterator[dict[str, Any]]:
        request = {
            "model": self.bench.model,
            "sampling": asdict(self.sampling),
            "calibration": {"conditions": self.tuning[0], "seeds": self.tuning[1]},
            "jobs": list(jobs),
            "timed": list(timed),
            "rounds": self.rounds,
        }
        return peers.answers(request, self.folder)

    def tuned_methods(self) -> list[tuple[Method, list[Trial], str]]:
        """Return each method with its trials, and why there is none where all were refused."""
        found = []
        for method in tqdm(self.methods, desc="methods", leave=False):
            tried = thinned(method.grid, self.trials)
            rows = [self.ours(method, settings, self.tuning) for settings in tried]
            found.append((method, *trials_of(tried, rows)))
        return found

    def tuned_peers(self) -> list[tuple[Peer, list[Trial], str]]:
        every = [(peer, thinned(peer.grid, self.trials)) for peer in peers.peers(self.steps)]
        rows = iter(self.of_peers([(peer, settings) for peer, tried in every for settings in tried], self.tuning))
        return [(peer, *trials_of(tried, [next(rows) for _ in tried])) for peer, tried in every]

    def timed(self, variants: Mapping[str, tuple[Any, Sampling, Schedule | None]]) -> dict[str, float]:
        """Return speed-ups of this process's rows: the median over interleaved rounds of single images."""
        condition, seed = self.judged[0][:1], self.judged[1][:1]

        def ready(pipeline: Any, sampling: Sampling, schedule: Schedule | None) -> Any:
            @contextmanager
            def variant() -> Iterator[Callable[[], object]]:
                if schedule is None:
                    yield lambda: sample(pipeline, condition, seed, sampling)
                else:
                    with apply(pipeline, schedule):
                        yield lambda: sample(pipeline, condition, seed, sampling)

            return variant

        every = {"uncached": (self.bench.pipeline, self.sampling, None), **variants}
        seconds = interleaved({name: ready(*each) for name, each in every.items()}, self.rounds)
        return {name: speedup(seconds["uncached"], each) for name, each in seconds.items()}

    def timed_peers(self, jobs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return speed-ups of the peers, over the uncached run in their process."""
        found: dict[str, float] = {}
        for answer in self._answers(timed=jobs) if jobs else ():
            found |= answer["speedups"]
        return found


def trials_of(tried: Sequence[Settings], rows: Sequence[Mapping[str, Any]]) -> tuple[list[Trial], str]:
    """Return the trials that came to something, and the first error if none did."""
    pairs = zip(tried, rows, strict=True)
    trials = [
        Trial(settings, float(np.mean(row["psnr"])), row["macs_fraction"])
        for settings, row in pairs
        if "error" not in row
    ]
    return trials, "" if trials else str(rows[0]["error"] if rows else "nothing to try on this model")
