"""The best schedule for a budget: every method's, and plans of its own whose forecasts are fitted to real runs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dicache.calibrate.dp import Dp, Granularity
from dicache.calibrate.forms import Form, even, expansions_of, forms_of, together
from dicache.calibrate.judging import Goal, Score
from dicache.calibrate.keeping import Kept
from dicache.calibrate.methods import CalibrationError
from dicache.calibrate.refining import Candidate, refined, tried
from dicache.calibrate.sensitivity import BACK, Forecasts, Sensitivity, mean_gram, measure
from dicache.calibrate.singles import singles_of
from dicache.evaluate.references import key_of
from dicache.evaluate.rerunning import Reruns
from dicache.models.sampling import Sampling
from dicache.profiler import Profile
from dicache.runtime import CacheError
from dicache.schedules import Plan, PlanError, Schedule, ScheduleError
from dicache.schedules.plan import Action
from dicache.schedules.rows import distinct_rows

RIDGES = (0.01, 0.1, 1.0)  # of the weights that the sensitivity gives: how much it is to be believed
RIDGE = 0.1  # with which plans are compared
GRANULARITIES: tuple[Granularity, ...] = ("body", "branch")  # as the first two forms are
FEWEST_ROWS = 4  # computed and kept, computed and not kept, held, and the first of a kind
MEASURING = 0.35  # share of the budget for what each step alone does
ROUNDS = 2  # of refining, where a quality is asked for
GLANCE, FAR_BEHIND, KEPT = 2, 6.0, 3  # runs that show who is behind, by how many dB, and how many are tried even so
FEWEST = 4  # runs to refine on: with fewer, weights fit what is by chance


@dataclass(frozen=True)
class Auto:
    """Settings.

    Attributes:
        goal: What is sought.
        max_rows: Most rows of a plan that do different things: graphs of a compiled replay.
        budget: What may be computed, as a number of uncached images; what is begun is finished.
        outputs: Most computed outputs that a forecast is made of.
    """

    goal: Goal
    max_rows: int = 6
    budget: float = 300.0
    outputs: int = 3

    def __post_init__(self) -> None:
        if self.max_rows < FEWEST_ROWS:
            raise CalibrationError(f"auto: --max-rows must be {FEWEST_ROWS} or more, found {self.max_rows}")
        if not self.budget > 0:
            raise CalibrationError(f"auto: the budget must be above 0 images, found {self.budget:g}")


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


@dataclass(frozen=True)
class Best:
    """What was found.

    Attributes:
        schedule: With the report in `measured`.
        psnr: On the runs of the search, in dB.
        single: The best of the single methods, if one could be made.
        single_psnr: Its PSNR.
        report: All that was tried, in order.
        spent: Uncached images' worth of computing.
    """

    schedule: Schedule
    psnr: float
    single: tuple[str, Schedule] | None
    single_psnr: float
    report: Sequence[Tried]
    spent: float


@dataclass
class AutoSearch:
    """One search for one goal.

    Args:
        profile: Of the model, the sampler and the number of steps.
        pipeline: A diffusers pipeline.
        conditions: Prompts or classes to try schedules on, one an image; none of them judges the result.
        seeds: One for each.
        sampling: How the pipeline is called.
        settings: What is sought.
        kept: Folder of what was measured, so that a search that was broken off goes on; None keeps nothing.
        progress: Whether to show a bar on standard error.
    """

    profile: Profile
    pipeline: Any
    conditions: Sequence[str]
    seeds: Sequence[int]
    sampling: Sampling
    settings: Auto
    kept: Path | None = None
    progress: bool = True
    report: list[Tried] = field(default_factory=list)
    _some: dict[int, Reruns] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.anatomy, self.target = self.profile.anatomy, self.profile.provenance.target
        self.steps = self.profile.steps
        self.gram = mean_gram(self.profile)
        self.forms = forms_of(self.anatomy)
        self.bar = tqdm(desc="auto", unit="replay", disable=not self.progress)
        self.best: Candidate | None = None

    @property
    def spent(self) -> float:
        return self.runs.spent + sum(some.spent for some in self._some.values())

    def __call__(self) -> Best:
        """Search.

        Raises:
            CalibrationError: If nothing keeps to the goal, or on Ctrl-C.
        """
        try:
            with self.bar:
                return self._search()
        except KeyboardInterrupt:
            told = f"what was measured is kept in {self.kept}; the same command goes on with it" if self.kept else ""
            raise CalibrationError(f"auto: interrupted; {told or 'nothing is kept'}") from None

    def _search(self) -> Best:
        self.runs = Reruns(self.pipeline, self.conditions, self.seeds, self.sampling)
        measured = self._measured()
        if self.settings.goal.max_macs is not None:
            found, single = self._for_share(measured, self.settings.goal.max_macs)
        else:
            found, single = self._for_quality(measured)
        goal = self.settings.goal
        if not found:
            raise CalibrationError(f"auto: nothing was found with {goal}; ask for less")
        best = max(found, key=lambda c: goal.rank(Score(c.expected, c.macs_fraction)))
        told = {
            "goal": {name: value for name, value in vars(goal).items() if value is not None},
            "psnr": round(best.decibels, 3),
            "expected_psnr": round(best.expected, 3),
            "macs_fraction": round(best.macs_fraction, 4),
            "spent_images": round(self.spent, 1),
            "runs": len(self.runs),
            "seeds": list(self.seeds),
            "rows": None if best.schedule.plan is None else distinct_rows(best.schedule.plan, self.anatomy),
            "tried": [asdict(line) for line in self.report],
        }
        made = best.schedule
        settings = {**asdict(self.settings), "form": best.name, "from": made.method}
        schedule = replace(made, method="auto", settings=settings, measured={**made.measured, "auto": told})
        return Best(
            schedule,
            best.decibels,
            None if single is None else (single.name, single.schedule),
            float("nan") if single is None else single.decibels,
            tuple(self.report),
            self.spent,
        )

    # What each step does

    def _measured(self) -> Sensitivity:
        replays = 2 * self.steps
        each = (0.5 * self.steps + BACK) / self.steps  # what comes before a step is known
        count = int(np.clip(MEASURING * self.settings.budget / (replays * each), 2, len(self.runs)))
        few = self._fewer(count)
        self.bar.total = replays
        measured = measure(few, self.anatomy, self.target, self.gram, self.bar.update, self._kept("effects", count))
        self.report.append(Tried("each step alone", None, None, self.spent, note=f"{replays} replays of {count} runs"))
        return measured

    # A share of the multiply-accumulates is given

    def _for_share(self, measured: Sensitivity, share: float) -> tuple[list[Candidate], Candidate | None]:
        planned: list[Candidate] = []
        ridges: Sequence[float] = RIDGES
        for form in self.forms:
            made = list(self._planned(measured, form, share, ridges))
            planned += made
            if made and len(ridges) > 1:  # what is best for the first form is taken for the others
                ridges = (RIDGES[int(np.argmax([candidate.decibels for candidate in made]))],)
        planned += self._from_profile(share)
        singles = [c for c in self._singles(share) if c.macs_fraction <= share + 1e-9]
        single = max(singles, key=lambda c: c.decibels, default=None)
        best: dict[Action, Candidate] = {}
        for candidate in planned:
            action = self._form(candidate).action
            best[action] = max(best.get(action, candidate), candidate, key=lambda c: c.expected)
        chosen = sorted(best.values(), key=lambda c: -c.expected)
        finished: list[Candidate] = []
        for place, candidate in enumerate(chosen):  # each once, then the best again
            if (better := self._refined(candidate, 1 / (len(chosen) + 1 - place))) is not None:
                finished.append(better)
        again = max([*chosen, *finished], key=lambda c: c.expected, default=None)
        if again is not None and (better := self._refined(again, 1.0)) is not None:
            finished.append(better)
        return [*planned, *singles, *finished], single

    def _planned(self, measured: Sensitivity, form: Form, share: float, ridges: Sequence[float]) -> Iterator[Candidate]:
        """Try the steps and weights that are foretold to be best, where that fits the budget."""
        count = form.most_computed(self.anatomy, self.target, self.steps, share)
        if count is None:
            self.report.append(Tried(form.name, None, None, self.spent, note="even skipping all steps computes more"))
            return
        if count == self.steps:
            return
        computed = self._steps(measured, count)
        for ridge in ridges:
            yield self._try(form, computed, self._weights(measured, form, computed, ridge), f"weights held {ridge:g}")
        if form.action == "reuse":  # what was measured is of the body
            for steps in (computed, even(count, self.steps)):
                expansions = self._within_rows(form, steps, lambda outputs: expansions_of(steps, self.steps, outputs))  # noqa: B023 # called at once
                yield self._try(form, steps, expansions, "weights of Taylor expansions")

    def _from_profile(self, share: float) -> Iterator[Candidate]:
        """Try the steps and weights that the profile and the solver alone foretell to be best."""
        for form, granularity in zip(self.forms, GRANULARITIES, strict=False):
            for order in range(self.settings.outputs - 1, 0, -1):
                settings = Dp(max_macs=share, predictor="forecast", order=order, granularity=granularity)
                try:
                    found = settings.calibrate(self.profile).plan
                except CalibrationError as error:
                    self.report.append(Tried(form.name, None, None, self.spent, note=str(error)))
                    break
                assert found is not None
                if not found.rules or distinct_rows(found, self.anatomy) > self.settings.max_rows:
                    continue
                forecasts, plan_of = together(found)
                make = partial(self._of_plan, plan_of)
                candidate = tried(self.runs, form.name, make(forecasts), forecasts, make)
                self._told(candidate, "weights of the profile and the solver")
                yield candidate
                break

    def _of_plan(self, plan_of: Callable[[Forecasts], Plan], forecasts: Forecasts) -> Schedule:
        return Schedule("auto", {}, self.anatomy, self.target, self.steps, plan_of(forecasts))

    def _try(self, form: Form, computed: Sequence[int], forecasts: Forecasts, note: str) -> Candidate:
        make = partial(self._schedule, form, tuple(computed))
        candidate = tried(self.runs, form.name, make(forecasts), forecasts, make)
        self._told(candidate, note)
        return candidate

    def _refined(self, candidate: Candidate, part: float) -> Candidate | None:
        """Improve the weights on as many runs as a part of what is left of the budget allows."""
        moves = sum(len(weights) - 1 for weights in (candidate.forecasts or {}).values())
        share = candidate.macs_fraction
        each = moves * (0.5 * share + BACK / self.steps) + 3 * share  # of a run: what is before a nudge is known
        count = min(len(self.runs), int(part * (self.settings.budget - self.spent) / each))
        if count < min(FEWEST, len(self.runs)) or not moves:
            return None
        self.bar.total = self.bar.n + moves
        better = self._refined_on(candidate, count)
        return better if better is not None and better.expected > candidate.expected else None

    def _refined_on(self, candidate: Candidate, count: int) -> Candidate | None:
        assert candidate.make is not None
        kept = self._kept("nudges", count)
        if count == len(self.runs):
            better = refined(self.runs, candidate, self.bar.update, kept)
        else:
            few = self._fewer(count)
            base = tried(few, candidate.name, candidate.schedule, candidate.forecasts, candidate.make)
            found = refined(few, base, self.bar.update, kept)
            if found is base:
                return None
            better = tried(self.runs, found.name, found.schedule, found.forecasts, found.make)
            fitted = found.optimism * count / len(self.runs)  # the other runs were not fitted to
            better = replace(better, optimism=candidate.optimism + fitted)
        if better is candidate:
            return None
        self._told(better, f"refined on {count} runs")
        return better

    def _fewer(self, count: int) -> Reruns:
        """Return the first of the runs."""
        if count not in self._some:
            self._some[count] = Reruns(self.pipeline, self.conditions[:count], self.seeds[:count], self.sampling)
        return self._some[count]

    # A quality is given

    def _for_quality(self, measured: Sensitivity) -> tuple[list[Candidate], Candidate | None]:
        wanted = self.settings.goal.min_psnr
        assert wanted is not None
        form = self.forms[0]
        kept: list[Candidate] = []
        count, tested = self._foretold(measured, wanted), set[int]()
        while 0 < count < self.steps and count not in tested:
            tested.add(count)
            computed = self._steps(measured, count)
            weights = [(self._weights(measured, form, computed, ridge), f"weights held {ridge:g}") for ridge in RIDGES]
            best = max((self._try(form, computed, *given) for given in weights), key=lambda c: c.expected)
            for _ in range(ROUNDS):
                if best.expected < wanted and (better := self._refined(best, 1.0)) is not None:
                    best = better
            if best.expected >= wanted:
                kept.append(best)
            count += -1 if best.expected >= wanted else 1
        share = min((c.macs_fraction for c in kept), default=1.0)
        singles = [c for c in self._singles(share) if c.decibels >= wanted]
        return [*kept, *singles], max(singles, key=lambda c: c.decibels, default=None)

    def _foretold(self, measured: Sensitivity, wanted: float) -> int:
        """Return the fewest computed steps that are foretold to give a quality."""
        for count in range(2, self.steps):
            computed = self._steps(measured, count)
            if measured.decibels(measured.forecasts(computed, self.settings.outputs, RIDGE)[1]) >= wanted:
                return count
        return self.steps - 1

    # What is tried

    def _form(self, candidate: Candidate) -> Form:
        return next(form for form in self.forms if form.name == candidate.name)

    def _steps(self, measured: Sensitivity, count: int) -> list[int]:
        ends = sorted({*np.round(np.linspace(0, self.steps - 1, count)).astype(int).tolist()})
        starts = [even(count, self.steps), *([ends] if len(ends) == count else [])]
        error = lambda steps: measured.forecasts(steps, self.settings.outputs, RIDGE)[1]  # noqa: E731
        return measured.best_steps(starts, error)[0]

    def _weights(self, measured: Sensitivity, form: Form, computed: Sequence[int], ridge: float) -> Forecasts:
        return self._within_rows(form, computed, lambda outputs: measured.forecasts(computed, outputs, ridge)[0])

    def _within_rows(self, form: Form, computed: Sequence[int], make: Callable[[int], Forecasts]) -> Forecasts:
        """Return forecasts of as many outputs as the rows allow."""
        for outputs in range(self.settings.outputs, 0, -1):
            forecasts = make(outputs)
            if distinct_rows(form.plan(self.steps, computed, forecasts), self.anatomy) <= self.settings.max_rows:
                return forecasts
        raise CalibrationError(f"auto: no plan has {self.settings.max_rows} different rows or fewer; raise --max-rows")

    def _schedule(self, form: Form, computed: Sequence[int], forecasts: Forecasts) -> Schedule:
        return Schedule("auto", {}, self.anatomy, self.target, self.steps, form.plan(self.steps, computed, forecasts))

    def _singles(self, share: float) -> Iterator[Candidate]:
        """Try what every method gives for a share of the multiply-accumulates without a search.

        The first runs come first: who is far behind on each of them is not tried on the others, but for the best few.
        """
        few = self._fewer(min(GLANCE, len(self.runs)))
        seen: list[Candidate] = []
        for name, schedule in self._calibrated(share):
            try:
                seen.append(tried(few, name, schedule))
            except (ScheduleError, CacheError) as error:  # it does not fit how the pipeline calls its model
                self.report.append(Tried(name, None, None, self.spent, note=str(error).removeprefix(f"{name}: ")))
        self.bar.update(len(seen))
        ahead = None if self.best is None else self.best.psnr[: len(few)] - FAR_BEHIND
        within = [glance for glance in seen if glance.macs_fraction <= share + 1e-9]
        for over in (glance for glance in seen if glance.macs_fraction > share + 1e-9):
            found = f"{over.decibels:.1f} dB on {len(few)} runs, where it computes more than was asked for"
            self.report.append(Tried(over.name, None, over.macs_fraction, self.spent, note=found))
        for place, glance in enumerate(sorted(within, key=lambda c: -c.decibels)):
            if place >= KEPT and ahead is not None and (glance.psnr < ahead).all():
                found = f"{glance.decibels:.1f} dB on {len(few)} runs, on each {FAR_BEHIND:g} dB or more behind"
                self.report.append(Tried(glance.name, None, glance.macs_fraction, self.spent, note=found))
                continue
            candidate = tried(self.runs, glance.name, glance.schedule)
            self._told(candidate, "")
            yield candidate

    def _calibrated(self, share: float) -> Iterator[tuple[str, Schedule]]:
        """Make every method's schedule, and report those that cannot be had."""
        for name, make in singles_of(self.profile, share).items():
            try:
                schedule = make()
            except (CalibrationError, PlanError) as error:
                self.report.append(Tried(name, None, None, self.spent, note=str(error).removeprefix(f"{name}: ")))
                continue
            if schedule.plan is not None and distinct_rows(schedule.plan, self.anatomy) > self.settings.max_rows:
                self.report.append(Tried(name, None, None, self.spent, note=f"more than {self.settings.max_rows} rows"))
                continue
            yield name, schedule

    # What is told and kept

    def _told(self, candidate: Candidate, note: str) -> None:
        self.bar.update()
        steps = "" if candidate.schedule.plan is None else candidate.schedule.expected_steps
        share = candidate.macs_fraction
        self.report.append(Tried(candidate.name, candidate.decibels, share, self.spent, steps, note))
        if self.best is None or candidate.expected > self.best.expected:
            self.best = candidate
        self.bar.set_postfix_str(f"best {self.best.decibels:.1f} dB: {self.best.name}")

    def _kept(self, name: str, runs: int) -> Kept:
        """Return where what some of the runs gave is kept, under all that decides their images."""
        if self.kept is None:
            return Kept()
        key = key_of(self.pipeline, self.conditions[:runs], self.seeds[:runs], self.sampling)
        return Kept(self.kept / f"{name}-{key[:16]}")


def default_folder(output: Path) -> Path:
    """Return where a search keeps what it measured: beside the schedule that it writes."""
    return output.with_name(output.name.removesuffix(".json") + ".auto")
