"""What the experiments share: a bundled model, its conditions and judges, and a command that runs them."""

import argparse
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dicache.anatomy import Anatomy
from dicache.calibrate.methods import PlanMethod, planned_schedule
from dicache.evaluate.evaluation import evaluate
from dicache.models.judges import judges_of
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions
from dicache.profiler import Profile, storage
from dicache.profiler.describing import survey_pipeline
from dicache.profiler.profiling import profile_pipeline
from dicache.schedules import Schedule, Target

BUILD = Path(__file__).parents[1] / "build" / "ablations"
RESULTS = Path(__file__).parent / "results"
RUNS = 32  # of a profile; with priors, so many conditions are averaged
GUIDANCE = {"digits": 4.0}  # other models: what is usual for them
Named = list[tuple[str, Schedule]]


class Bench:
    """One bundled model, its conditions and judges."""

    def __init__(self, model: str, images: int, rounds: int) -> None:
        self.model, self.rounds = model, rounds
        self.pipeline = load(model)
        self.conditions = default_conditions(self.pipeline, images)
        self.judges = judges_of(model, self.pipeline, self.conditions)
        self._surveys: dict[int, tuple[Anatomy, Target, int]] = {}

    def sampling(self, steps: int, guidance: float | None = None) -> Sampling:
        asked = Sampling(steps, GUIDANCE.get(self.model) if guidance is None else guidance)
        return asked.usual_for(self.model).resolved(self.pipeline)

    def profile(self, steps: int) -> Profile:
        return storage.load(self.profile_file(steps))

    def profile_file(self, steps: int) -> Path:
        """Return a profile with priors, made if it is not there."""
        file = BUILD / f"{self.model}-{steps}.h5"
        if not file.exists():
            conditions, sampling = default_conditions(self.pipeline, RUNS), self.sampling(steps)
            most = self.survey(steps)[0].segments[0][1]
            firsts = [count for count in (1, 2, 4, 8) if count < most] or None
            profile_pipeline(
                self.pipeline, self.model, file, conditions, sampling=sampling, priors=True, first_blocks=firsts
            )
        return file

    def survey(self, steps: int) -> tuple[Anatomy, Target, int]:
        if steps not in self._surveys:
            self._surveys[steps] = survey_pipeline(self.pipeline, self.sampling(steps))
        return self._surveys[steps]

    def planned(self, steps: int, name: str, settings: PlanMethod) -> tuple[str, Schedule]:
        return name, planned_schedule(settings, *self.survey(steps))

    def untimed(self, schedules: Named, sampling: Sampling) -> list[Any]:
        """Return the uncached result, then one for each schedule; without speed-ups, and without fewer steps."""
        uncached, cached, _ = evaluate(
            self.pipeline,
            schedules,
            self.conditions,
            sampling=sampling,
            judges=self.judges,
            references=BUILD / "references",
            timing_rounds=0,
            fewer_steps=False,
        )
        return [uncached, *cached]

    def results(self, schedules: Named, sampling: Sampling, *, fewer_steps: bool = True) -> list[Any]:
        uncached, cached, fewer = evaluate(
            self.pipeline,
            schedules,
            self.conditions,
            sampling=sampling,
            judges=self.judges,
            timing_rounds=self.rounds,
            references=BUILD / "references",
            fewer_steps=fewer_steps,
        )
        return [uncached, *cached, *fewer]


def run(
    about: str | None,
    experiments: Mapping[str, Callable[[Bench, int], str]],
    timed: Collection[str],
    skipped: Mapping[str, Collection[str]],
) -> None:
    """Run the experiments that the command line names, and write each as `results/EXPERIMENT-MODEL.txt`.

    Args:
        about: What they are, for `--help`.
        experiments: By name: from a bench and a number of steps to a text.
        timed: Names of those that measure speed-ups as well.
        skipped: Names of those that `all` leaves out, by model.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("experiment", choices=(*experiments, "all"))
    parser.add_argument("--model", default="digits", help="a bundled one [default: digits]")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7, help="of timing; 0 times nothing")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    every = [name for name in experiments if name not in skipped.get(options.model, ())]
    for name in every if options.experiment == "all" else (options.experiment,):
        bench = Bench(options.model, options.images, options.rounds if name in timed else 0)
        text = f"{name}: {options.model}, {options.images} images, {options.steps} steps but where stated\n\n"
        text += experiments[name](bench, options.steps)
        print(text)  # noqa: T201
        (RESULTS / f"{name}-{options.model}.txt").write_text(text + "\n")
