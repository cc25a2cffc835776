"""The best schedule for a budget: every method's, and plans of its own whose forecasts are fitted to real runs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dicache.calibrate.eoc import Prior
from dicache.calibrate.every_method import EveryMethod
from dicache.calibrate.forms import forms_of
from dicache.calibrate.judging import ROUNDING, Goal, Score
from dicache.calibrate.layouts import Layouts
from dicache.calibrate.methods import CalibrationError
from dicache.calibrate.planning import GAINED, ROUNDS, Planning, action_of, best_of_each
from dicache.calibrate.refining import Candidate
from dicache.calibrate.trying import Tried, Trying
from dicache.models.sampling import Sampling
from dicache.profiler import Profile
from dicache.schedules import Schedule
from dicache.schedules.rows import distinct_rows

Granularity = Literal["any", "body", "branch"]
FORESEEN = ("expected_steps", "macs_fraction")  # what a schedule that decides at run time says of what it will compute
FEWEST_ROWS = 3  # computed and kept, computed and not kept, and held


@dataclass(frozen=True)
class Auto:
    """Settings.

    Attributes:
        goal: What is sought.
        max_rows: Most rows of a plan that do different things: graphs of a compiled replay.
        budget: What may be computed, as a number of uncached images; what is begun is finished.
        outputs: Most computed outputs that a forecast is made of.
        granularity: Whether plans of its own skip blocks, `body`, reuse the outputs of branches, `branch`, or `any`.
        trials: Settings of each of the best three methods that Optuna tries. What they compute is told, but is not part
            of the budget.
    """

    goal: Goal
    max_rows: int = 6
    budget: float = 300.0
    outputs: int = 3
    granularity: Granularity = "any"
    trials: int = 0

    def __post_init__(self) -> None:
        if self.max_rows < FEWEST_ROWS:
            raise CalibrationError(f"auto: --max-rows must be {FEWEST_ROWS} or more, found {self.max_rows}")
        if self.granularity not in get_args(Granularity):
            known = ", ".join(get_args(Granularity))
            raise CalibrationError(f"auto: the granularity must be one of {known}, found {self.granularity!r}")
        if not self.budget > 0:
            raise CalibrationError(f"auto: the budget must be above 0 images, found {self.budget:g}")


@dataclass(frozen=True)
class Best:
    """What was found.

    Attributes:
        schedule: With the report in `measured`.
        psnr: On the runs of the search, in dB.
        single: The best of the single methods, if one could be made.
        single_psnr: Its PSNR.
        other: The best plan of the other granularity than the schedule's, if there is one.
        report: All that was tried, in order.
        spent: Uncached images' worth of computing.
    """

    schedule: Schedule
    psnr: float
    single: tuple[str, Schedule] | None
    single_psnr: float
    other: tuple[str, Schedule] | None
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
        kept: Folder of what was measured, so that a search that was interrupted goes on; None keeps nothing.
        prior: Of a site, as `Eoc.calibrate` takes it; None where the profile has no priors.
        storage: Of Optuna's trials, if the settings ask for any; see `open_study`.
        progress: Whether to show a bar on standard error.
    """

    profile: Profile
    pipeline: Any
    conditions: Sequence[str]
    seeds: Sequence[int]
    sampling: Sampling
    settings: Auto
    kept: Path | None = None
    prior: Prior | None = None
    storage: str = ""
    progress: bool = True

    def __post_init__(self) -> None:
        settings, on = self.settings, (self.pipeline, self.conditions, self.seeds, self.sampling)
        self.trying = Trying(*on, settings.budget, self.kept, self.progress)
        forms = [f for f in forms_of(self.profile.anatomy) if settings.granularity in ("any", f.granularity)]
        self.planning = Planning(self.trying, self.profile, forms, settings.max_rows, settings.outputs)
        self.methods = EveryMethod(
            self.trying, self.profile, settings.max_rows, self.prior, settings.trials, self.storage
        )

    def __call__(self) -> Best:
        """Search.

        Raises:
            CalibrationError: If nothing keeps to the goal, or on Ctrl-C.
        """
        try:
            with self.trying.bar:
                return self._search()
        except KeyboardInterrupt:
            told = f"what was measured is kept in {self.kept}; the same command goes on with it" if self.kept else ""
            raise CalibrationError(f"auto: interrupted; {told or 'nothing is kept'}") from None

    def _search(self) -> Best:
        goal, trying = self.settings.goal, self.trying
        if goal.max_macs is not None:
            found, single = self._for_share(goal.max_macs)
        else:
            assert goal.min_psnr is not None
            found, single = self._for_quality(goal.min_psnr)
        if not found:
            raise CalibrationError(f"auto: nothing was found with {goal}; ask for less")
        best = self._best(found)
        assert best is not None
        made = best.schedule
        told = {
            "goal": {name: value for name, value in vars(goal).items() if value is not None},
            "psnr": round(best.decibels, 3),
            "expected_psnr": round(best.expected, 3),
            "macs_fraction": round(best.macs_fraction, 4),
            "spent_images": round(trying.spent, 1),
            "runs": len(trying.runs),
            "seeds": list(self.seeds),
            "rows": None if made.plan is None else distinct_rows(made.plan, self.profile.anatomy),
            "tried": [asdict(line) for line in trying.report],
        }
        settings = {**asdict(self.settings), "form": best.name, "from": made.method, "of": made.settings}
        foreseen = {name: made.measured[name] for name in FORESEEN if name in made.measured}
        return Best(
            replace(made, method="auto", settings=settings, measured={**foreseen, "auto": told}),
            best.decibels,
            None if single is None else (single.name, single.schedule),
            float("nan") if single is None else single.decibels,
            self._other(found, best),
            tuple(trying.report),
            trying.spent,
        )

    def _best(self, found: Sequence[Candidate]) -> Candidate | None:
        """Return what suits the goal best, by what is expected on other runs."""
        return max(found, key=lambda c: self.settings.goal.rank(Score(c.expected, c.macs_fraction)), default=None)

    def _other(self, found: Sequence[Candidate], best: Candidate) -> tuple[str, Schedule] | None:
        """Return the best plan that skips blocks where the best reuses branches, or the other way round."""
        other = self._best([c for c in found if best.slots and c.slots and action_of(c) != action_of(best)])
        return None if other is None else (other.name, other.schedule)

    def _for_share(self, share: float) -> tuple[list[Candidate], Candidate | None]:
        layouts = Layouts(self.profile, share)
        planned = self.planning.foretold(layouts)
        rival = max(planned, key=lambda c: c.expected, default=None)
        singles = [c for c in self.methods(share, rival) if c.macs_fraction <= share + ROUNDING]
        finished = self.planning.finished(layouts, best_of_each(planned))
        return [*planned, *singles, *finished], self._best(singles)

    def _for_quality(self, wanted: float) -> tuple[list[Candidate], Candidate | None]:
        """Look for the fewest computed steps that suffice, by halves."""
        kept: list[Candidate] = []
        low, high = 0, self.profile.steps  # too few, and enough
        while high - low > 1:
            count = (low + high) // 2
            best = self._with_steps(count)
            for _ in range(ROUNDS):
                if best is not None and best.expected < wanted <= best.expected + GAINED:
                    best = self.planning.refined(best) or best
            if best is not None and best.expected >= wanted:
                kept.append(best)
                high = count
            else:
                low = count
        rival = self._best(kept)
        singles = [
            c for c in self.methods(1.0 if rival is None else rival.macs_fraction, rival) if c.decibels >= wanted
        ]
        return [*kept, *singles], self._best(singles)

    def _with_steps(self, count: int) -> Candidate | None:
        """Return the best plan of so many computed steps."""
        form, steps = self.planning.forms[0], self.profile.steps
        held = form.plan(steps, range(count), dict.fromkeys(range(count, steps), ((count - 1, 1.0),)))
        target = self.profile.provenance.target
        share = Schedule("auto", {}, self.profile.anatomy, target, steps, held).macs_fraction()
        planned = self.planning.foretold(Layouts(self.profile, share))
        return max(planned, key=lambda c: c.expected, default=None)


def default_folder(output: Path) -> Path:
    """Return where a search keeps what it measured: beside the schedule that it writes."""
    return output.with_name(output.name.removesuffix(".json") + ".auto")
