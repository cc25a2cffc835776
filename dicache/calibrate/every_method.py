"""Every method on real runs: what it gives for a share of the multiply-accumulates, and what a search makes of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dicache.anatomy import Anatomy
from dicache.anatomy.fingerprint import digest
from dicache.calibrate.eoc import Prior
from dicache.calibrate.judging import ROUNDING, Goal, RealRuns
from dicache.calibrate.methods import Axis, CalibrationError, Space
from dicache.calibrate.refining import Candidate, tried
from dicache.calibrate.search import BrokenOffError, search
from dicache.calibrate.singles import corrected, singles_of, spaces_of
from dicache.calibrate.trying import Trying
from dicache.evaluate.rerunning import Reruns
from dicache.profiler import Profile, ProfileError
from dicache.runtime import CacheError
from dicache.schedules import PlanError, Schedule, ScheduleError
from dicache.schedules.rows import distinct_rows

GLANCE, FAR_BEHIND, KEPT = 2, 6.0, 3  # runs that show who is behind, by how many dB, and how many are tried even so
SEARCHED = 3  # methods whose settings are searched


@dataclass(frozen=True)
class FewRows:
    """A space without the plans of too many rows.

    Attributes:
        space: With them.
        most: Rows that do different things.
        anatomy: The model's.
    """

    space: Space
    most: int
    anatomy: Anatomy

    @property
    def axes(self) -> Mapping[str, Axis]:
        return self.space.axes

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**self.space.identity, "max_rows": self.most}

    def plain(self, max_macs: float | None) -> Mapping[str, Any]:
        return self.space.plain(max_macs)

    def schedule(self, parameters: Mapping[str, Any]) -> Schedule:
        made = self.space.schedule(parameters)
        if too_many(made, self.most, self.anatomy):
            raise CalibrationError(f"more than {self.most} rows")
        return made


def too_many(schedule: Schedule, most: int, anatomy: Anatomy) -> bool:
    """Whether a schedule has a plan of more different rows than that."""
    return schedule.plan is not None and distinct_rows(schedule.plan, anatomy) > most


@dataclass(frozen=True)
class EveryMethod:
    """Tries every method.

    Attributes:
        trying: The runs.
        profile: That the methods are calibrated on.
        max_rows: Most rows of a plan that do different things.
        prior: Of a site, as `Eoc.calibrate` takes it; None where the profile has no priors.
        trials: Settings of each of the best methods that Optuna tries.
        storage: Of the trials; see `open_study`.
    """

    trying: Trying
    profile: Profile
    max_rows: int
    prior: Prior | None = None
    trials: int = 0
    storage: str = ""

    def __call__(self, share: float, rival: Candidate | None) -> Iterator[Candidate]:
        """Try what every method gives for a share of the multiply-accumulates, without a search and with one.

        The first runs come first: who is far behind on each of them is not tried on the others, but for the best few.

        Args:
            share: Of the multiply-accumulates.
            rival: The best plan of about this share, which the methods are to be near; None tries all on all runs.
        """
        few = self.trying.first(GLANCE)
        seen = list(self._seen(few, self._calibrated(share)))
        within = [glance for glance in seen if glance.macs_fraction <= share + ROUNDING]
        for over in (glance for glance in seen if glance.macs_fraction > share + ROUNDING):
            found = f"{over.decibels:.1f} dB on {len(few)} runs, where it computes more than was asked for"
            self.trying.noted(over.name, found, over.macs_fraction)
        within.sort(key=lambda c: -c.decibels)
        within = sorted([*within, *self._seen(few, self._corrected(within))], key=lambda c: -c.decibels)
        ahead = None if rival is None else rival.psnr[: len(few)] - FAR_BEHIND
        for place, glance in enumerate(within):
            if place >= KEPT and ahead is not None and (glance.psnr < ahead).all():
                found = f"{glance.decibels:.1f} dB on {len(few)} runs, on each {FAR_BEHIND:g} dB or more behind"
                self.trying.noted(glance.name, found, glance.macs_fraction)
                continue
            candidate = tried(self.trying.runs, glance.name, glance.schedule)
            self.trying.told(candidate, "")
            yield candidate
        yield from self._searched(share, [glance.name for glance in within])

    def _seen(self, few: Reruns, schedules: Iterable[tuple[str, Schedule]]) -> Iterator[Candidate]:
        """Try schedules on a few runs, and report those that do not fit how the pipeline calls its model."""
        for name, schedule in schedules:
            try:
                yield tried(few, name, schedule)
                self.trying.bar.update()
            except (ScheduleError, CacheError) as error:
                self.trying.noted(name, str(error))

    def _corrected(self, within: Sequence[Candidate]) -> Iterator[tuple[str, Schedule]]:
        """Yield EOC's corrections of the best schedule that holds branches, where the profile has priors."""
        if self.prior is None:
            return
        for glance in within:
            try:
                for name, schedule in corrected(self.profile, self.prior, glance.schedule):
                    yield f"{name} on {glance.name}", schedule  # of as many rows as it
            except (CalibrationError, ProfileError):  # it holds no branch, or there are no priors for it
                continue
            return

    def _searched(self, share: float, names: Sequence[str]) -> Iterator[Candidate]:
        """Search the settings of the best methods with Optuna, and try the best of each."""
        if not self.trials:
            return
        spaces = spaces_of(self.profile, share)
        sampling = self.trying.sampling.resolved(self.trying.pipeline)
        judge = RealRuns(
            self.trying.pipeline, self.trying.conditions, self.trying.seeds, sampling, self.trying.runs.uncached.images
        )
        best: dict[str, str] = {}  # by method, one of its names in the table
        for name in names:
            best.setdefault(name.partition(" ")[0], name)
        for method, name in [pair for pair in best.items() if pair[1] in spaces][:SEARCHED]:
            try:
                space = FewRows(spaces[name](), self.max_rows, self.profile.anatomy)
                found = search(
                    space,
                    Goal(share),
                    judge,
                    trials=self.trials,
                    storage=self.storage,
                    name=f"auto {method} {digest([space.identity, judge.identity, share])}",
                    where=self.storage,
                    identity=judge.identity,
                    progress=self.trying.progress,
                )
            except BrokenOffError:
                raise
            except CalibrationError as error:
                self.trying.noted(f"{method}, searched", str(error))
                continue
            self.trying.beside += found.spent
            candidate = tried(self.trying.runs, f"{method}, searched", found.schedule)
            self.trying.told(candidate, f"{found.trials} trials")
            yield candidate

    def _calibrated(self, share: float) -> Iterator[tuple[str, Schedule]]:
        """Make every method's schedule, and report those that cannot be had."""
        for name, make in singles_of(self.profile, share).items():
            try:
                schedule = make()
            except (CalibrationError, PlanError) as error:
                self.trying.noted(name, str(error))
                continue
            if too_many(schedule, self.max_rows, self.profile.anatomy):
                self.trying.noted(name, f"more than {self.max_rows} rows")
                continue
            yield name, schedule
