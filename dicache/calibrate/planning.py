"""Plans of forecasts on real runs: those that are foretold to be best, changed and refined as long as that helps."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import numpy as np

from dicache.calibrate.foretelling import Foretelling, OfEffects, OfProfile
from dicache.calibrate.forms import Form, forms_of
from dicache.calibrate.layouts import Layout, Layouts
from dicache.calibrate.methods import CalibrationError
from dicache.calibrate.refining import Candidate, first_difference, refined, same_before, tried
from dicache.calibrate.sensitivity import BACK, Sensitivity, mean_gram, measure
from dicache.calibrate.trying import Trying
from dicache.evaluate.rerunning import Beginning, Reruns
from dicache.profiler import Profile
from dicache.schedules import Plan, Schedule
from dicache.schedules.rows import distinct_rows

MEASURING, FEWEST_MEASURED = 0.3, 2  # most of the budget for what each step alone does, and runs to measure it on
MOVING = 0.25  # of the budget for changing a plan in one thing after another
GAINED = 4.0  # dB that refining may gain
ROUNDS = 2  # of refining the best again
FIRST, BEST = 4, 2  # runs that show which plans are best, and how many of them are tried on all
FEWEST = 4  # runs to refine on: with fewer, weights fit what is by chance


@dataclass(frozen=True)
class Planning:
    """Finds plans of forecasts.

    Attributes:
        trying: The runs.
        profile: Of the model and the sampler.
        forms: That plans may have, that of all blocks or all branches first.
        max_rows: Most rows of a plan that do different things.
        outputs: Most computed outputs that a forecast is made of.
    """

    trying: Trying
    profile: Profile
    forms: Sequence[Form]
    max_rows: int
    outputs: int
    _taken: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)  # outputs and trade

    def _measuring(self) -> tuple[int, int] | None:
        """Return on how many runs each step is left out, and how often; None where that takes too much computing."""
        each = (0.5 * self.profile.steps + BACK) / self.profile.steps  # what comes before a step is known
        for times in (2, 1):
            count = int(MEASURING * self.trying.budget / (times * self.profile.steps * each))
            if count >= FEWEST_MEASURED:
                return min(count, len(self.trying.runs)), times
        return None

    def _measured(self) -> Sensitivity:
        count, times = self._measuring() or (FEWEST_MEASURED, 1)
        few, kept = self.trying.first(count), self.trying.keeping("effects", count)
        self.trying.bar.total = times * self.profile.steps
        on = self.profile.anatomy, self.profile.provenance.target, mean_gram(self.profile)
        measured = measure(few, *on, self.trying.bar.update, kept, nudged=times == 2)
        note = f"{len(measured.effects)} replays of {count} runs"
        self.trying.noted(OfEffects.name, note)
        return measured

    @cached_property
    def _sources(self) -> list[Foretelling]:
        """What tells the weights of forecasts: the profile and, where the budget allows it or there is nothing else,
        what leaving out each step alone does."""
        found: list[Foretelling] = []
        try:
            found.append(OfProfile(self.profile))
        except CalibrationError as error:
            self.trying.noted(OfProfile.name, str(error))
        skips = any(form.action == "skip" for form in forms_of(self.profile.anatomy))
        if skips and (not found or self._measuring() is not None):
            try:
                found.append(OfEffects(self._measured(), self.outputs))
            except CalibrationError as error:
                self.trying.noted(OfEffects.name, str(error))
        return found

    def foretold(self, layouts: Layouts) -> list[Candidate]:
        """Try the steps and weights that are foretold to be best, the best of them on all runs.

        How many outputs a forecast is made of, and the trade, are decided on the first runs, with the form of all
        blocks and that of branches, once: the other forms, and other shares, take what was best.
        """
        few = self.trying.first(FIRST)
        seen: list[Candidate] = []
        for form, source in product(self.forms, self._sources):
            known = self._taken.get((form.action, source.name))
            glances: list[Candidate] = []
            for outputs, trade in [known] if known else self._tries(source):
                if glances and known is None and outputs < self._outputs_of(glances[0]) and not source.orders:
                    break
                layout = layouts.first(form, source, outputs, trade)
                if layout is not None and self._in_rows(plan := layouts.plan(layout)):
                    glances.append(self._of_layout(few, layout, plan))
                    self.trying.bar.update()
            if glances and known is None:
                layout = max(glances, key=lambda c: c.decibels).layout
                assert layout is not None
                self._taken[form.action, source.name] = layout.outputs, layout.trade
            seen += glances
        seen.sort(key=lambda c: -c.decibels)
        chosen = [*best_of_each(seen), *seen[:BEST]]
        planned = []
        for glance in {id(c): c for c in chosen}.values():
            assert glance.layout is not None
            planned.append(self._of_layout(self.trying.runs, glance.layout, glance.schedule.plan, recorded=True))
            self.trying.told(planned[-1], glance.layout.name)
        return planned

    @staticmethod
    def _outputs_of(candidate: Candidate) -> int:
        return 0 if candidate.layout is None else candidate.layout.outputs

    def _tries(self, source: Foretelling) -> list[tuple[int, float]]:
        return [(outputs, trade) for outputs in range(self.outputs, 0, -1) for trade in source.trades]

    def _of_layout(
        self,
        runs: Reruns,
        layout: Layout,
        plan: Plan | None,
        beginning: Beginning | None = None,
        *,
        recorded: bool = False,
    ) -> Candidate:
        schedule = Schedule("auto", {}, self.profile.anatomy, self.profile.provenance.target, self.profile.steps, plan)
        return replace(tried(runs, layout.form.name, schedule, beginning, recorded=recorded), layout=layout)

    def _in_rows(self, plan: Plan) -> bool:
        return bool(plan.rules) and distinct_rows(plan, self.profile.anatomy) <= self.max_rows

    def finished(self, layouts: Layouts, chosen: Sequence[Candidate]) -> list[Candidate]:
        """Move and refine the best candidate of each kind, the best one first, and refine what is the best then again.

        One that is further behind what was refined than refining may gain is left as it is.
        """
        found = list(chosen)
        for candidate in chosen:
            if candidate.expected >= max(c.expected for c in found) - GAINED:
                moved = self._moved(layouts, candidate)
                found.append(self.refined(moved) or moved)
        for _ in range(ROUNDS if found else 0):
            better = self.refined(max(found, key=lambda c: c.expected))
            if better is None:
                break
            found.append(better)
        return found

    def _moved(self, layouts: Layouts, start: Candidate) -> Candidate:
        """Return what comes of changing a plan in one thing after another, as long as the images are nearer for it."""
        few = self.trying.first(FIRST)
        allowed = self.trying.spent + min(self.trying.left, MOVING * self.trying.budget)
        here: Candidate | None = start
        best, seen = start, [start.schedule.plan]
        while here is not None:
            best = here
            assert best.layout is not None
            base = self._of_layout(few, best.layout, best.schedule.plan, recorded=True)
            tries: list[tuple[Candidate, str]] = []
            for move in layouts.moves(best.layout):
                plan = layouts.plan(move.layout)
                if plan in seen or not self._in_rows(plan) or self.trying.spent > allowed:
                    continue
                seen.append(plan)
                assert base.schedule.plan is not None
                since = first_difference(base.schedule.plan, plan, self.profile.anatomy)
                beginning = Beginning(base.made, same_before(plan, since))
                tries.append((self._of_layout(few, move.layout, plan, beginning), move.name))
                self.trying.bar.update()
            here = self._better(best, base, tries)
        return best

    def _better(self, here: Candidate, base: Candidate, tries: Sequence[tuple[Candidate, str]]) -> Candidate | None:
        """Return the first of the best tries that is ahead on all runs too, of those that are ahead on the first."""
        ahead = sorted((pair for pair in tries if _ahead(pair[0], base)), key=lambda pair: -pair[0].decibels)
        for glance, name in ahead[:BEST]:
            assert glance.layout is not None
            candidate = self._of_layout(self.trying.runs, glance.layout, glance.schedule.plan, recorded=True)
            self.trying.told(candidate, name)
            if _ahead(candidate, here):
                return candidate
        return None

    def refined(self, candidate: Candidate) -> Candidate | None:
        """Improve the weights on as many runs as what is left of the budget allows."""
        moves = sum(len(weights) - 1 for weights in candidate.slots.values())
        share = candidate.macs_fraction
        each = (
            moves * (0.5 * share + BACK / self.profile.steps) + 3 * share
        )  # of a run: what is before a nudge is known
        count = min(len(self.trying.runs), int(self.trying.left / each))
        if count < min(FEWEST, len(self.trying.runs)) or not moves:
            return None
        self.trying.bar.total = self.trying.bar.n + moves
        better = self._refined_on(candidate, count)
        return better if better is not None and better.expected > candidate.expected else None

    def _refined_on(self, candidate: Candidate, count: int) -> Candidate | None:
        kept = self.trying.keeping("nudges", count)
        if count == len(self.trying.runs):
            better = refined(self.trying.runs, candidate, self.trying.bar.update, kept)
        else:
            few = self.trying.first(count)
            base = tried(few, candidate.name, candidate.schedule, recorded=True)
            found = refined(few, base, self.trying.bar.update, kept)
            if found is base:
                return None
            fitted = found.optimism * count / len(self.trying.runs)  # the other runs were not fitted to
            better = tried(self.trying.runs, found.name, found.schedule, recorded=True)
            better = replace(better, optimism=candidate.optimism + fitted, layout=candidate.layout)
        if better is candidate:
            return None
        self.trying.told(better, f"refined on {count} runs")
        return better


def _ahead(one: Candidate, other: Candidate) -> bool:
    """Whether the one is better on the same runs, by more than the differences from run to run leave open."""
    difference = one.psnr - other.psnr
    return bool(difference.mean() > difference.std(ddof=1) / np.sqrt(len(difference)))


def action_of(candidate: Candidate) -> str:
    """Return what the plan of a candidate does: skip or reuse."""
    assert candidate.schedule.plan is not None
    return candidate.schedule.plan.rules[0].action


def best_of_each(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the best candidate that skips blocks and the best that reuses branches, the better one first."""
    best: dict[str, Candidate] = {}
    for candidate in candidates:
        action = action_of(candidate)
        best[action] = max(best.get(action, candidate), candidate, key=lambda c: c.expected)
    return sorted(best.values(), key=lambda c: -c.expected)
