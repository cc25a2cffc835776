"""The weights of a plan's forecasts, improved on the finished images of real runs by Gauss-Newton steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dicache.anatomy import Anatomy
from dicache.anatomy.fingerprint import digest
from dicache.calibrate.forms import Slots, together
from dicache.calibrate.keeping import Kept
from dicache.calibrate.layouts import Layout
from dicache.calibrate.sensitivity import FLOOR, numbers
from dicache.evaluate.quality import psnr
from dicache.evaluate.rerunning import Beginning, Made, Reruns
from dicache.schedules import Plan, Schedule

NOT_KEPT = Kept()
NUDGE = 0.05  # of a weight, to see what it does to the images
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # how strongly the weights are held, as a share of what each one does


@dataclass(frozen=True)
class Candidate:
    """A schedule that was tried.

    Attributes:
        name: Of what it is, in a few words.
        schedule: Itself.
        made: What it made of the runs.
        psnr: Of each image against the uncached one, in dB.
        optimism: In dB, how much better these runs are foretold to be than others, because its weights were fitted to
            them.
        layout: That its plan was made from, if it was.
    """

    name: str
    schedule: Schedule
    made: Made
    psnr: np.ndarray
    optimism: float = 0.0
    layout: Layout | None = None

    @property
    def decibels(self) -> float:
        return float(self.psnr.mean())

    @property
    def expected(self) -> float:
        """The PSNR to expect of other runs, in dB."""
        return self.decibels - self.optimism

    @property
    def macs_fraction(self) -> float:
        return self.made.spent / len(self.psnr)

    @property
    def slots(self) -> Slots:
        """Its weights, if all that its plan skips is forecast; else none."""
        plan = self.schedule.plan
        forecast = plan is not None and all(rule.predictor == "forecast" for rule in plan.rules)
        return together(plan)[0] if plan is not None and plan.rules and forecast else {}


def tried(
    runs: Reruns, name: str, schedule: Schedule, beginning: Beginning | None = None, *, recorded: bool = False
) -> Candidate:
    """Run with a schedule, and say how close the images are to the uncached ones; what is not finite counts as 0 dB.

    Args:
        runs: To try it on.
        name: Of the candidate.
        schedule: To try.
        beginning: What is known of it.
        recorded: Whether other runs are to begin as this one does; the model's outputs are held for that.
    """
    made = runs(schedule, beginning, recorded=recorded)
    decibels = np.nan_to_num(psnr(made.images, runs.uncached.images), nan=0.0, neginf=0.0)
    return Candidate(name, schedule, made, decibels)


def refined(runs: Reruns, found: Candidate, told: Callable[[], object], kept: Kept = NOT_KEPT) -> Candidate:
    """Return a candidate with weights that bring its images nearer to the uncached ones, or itself.

    Each weight is nudged alone, and the newest output's is lowered by as much, so that their sum stays. From what this
    does to the images, those weights follow that would leave the smallest error if all of it added up; no image counts
    more for being further off. How strongly they are held is chosen by how well the other images foretell each one.

    Args:
        runs: That it was tried on.
        found: Has weights and was recorded, or stays as it is.
        told: Called after each replay.
        kept: Where the images of nudged weights are kept.
    """
    slots = found.slots
    moves = [(slot, place) for slot, weights in slots.items() for place in range(1, len(weights))]
    if not moves:
        return found
    assert found.schedule.plan is not None
    _, plan_of = together(found.schedule.plan)

    def schedule_of(slots: Slots) -> Schedule:
        return replace(found.schedule, plan=plan_of(slots))

    images = numbers(found.made.images)
    wanted = numbers(runs.uncached.images) - images  # (runs, numbers)
    scale = 1 / np.sqrt(np.maximum((wanted**2).mean(axis=1, keepdims=True), 1e-300))
    effects = []
    for slot, place in moves:
        schedule = schedule_of(_moved(slots, [(slot, place)], [NUDGE]))
        assert schedule.plan is not None
        beginning = Beginning(found.made, same_before(schedule.plan, slot[0]))
        made = kept.get(digest(schedule.to_json()["plan"]), runs, lambda: numbers(runs(schedule, beginning).images))  # noqa: B023 # called at once
        effects.append((made - images) / NUDGE * scale)
        told()
    change = np.stack(effects)  # (moves, runs, numbers)
    if not (np.isfinite(change).all() and np.isfinite(wanted).all()):
        return found
    by_run = np.einsum("ark,brk->rab", change, change)
    toward = np.einsum("ark,rk->ra", change, wanted * scale)
    square = (wanted * scale)[:, None, :] @ (wanted * scale)[:, :, None]

    def error(ridge: float, *, left_out: bool) -> float:
        """Return the mean logarithm of each image's squared error, with the weights of all images or of the others."""
        errors = []
        for run in range(len(images)):
            others = by_run.sum(0) - left_out * by_run[run], toward.sum(0) - left_out * toward[run]
            move = _solved(*others, ridge)
            left = square[run, 0, 0] - 2 * move @ toward[run] + move @ by_run[run] @ move
            errors.append(np.log(max(left, 1e-300)))
        return float(np.mean(errors))

    ridge = min(RIDGES, key=lambda ridge: error(ridge, left_out=True)) if len(images) > 1 else RIDGES[-1]
    for held in (ridge, 10 * ridge, 100 * ridge):  # smaller steps, where the errors do not add up
        weights = _moved(slots, moves, _solved(by_run.sum(0), toward.sum(0), held))
        other = tried(runs, found.name, schedule_of(weights), recorded=True)
        told()
        apart = error(held, left_out=True) - error(held, left_out=False) if len(images) > 1 else 0.0
        optimism = found.optimism + max(0.0, 10 / np.log(10) * apart)
        other = replace(other, optimism=optimism, layout=found.layout)
        if other.expected > found.expected:
            return other
    return found


def _solved(square: np.ndarray, toward: np.ndarray, ridge: float) -> np.ndarray:
    held = square + np.diag(ridge * np.diag(square) + FLOOR * np.diag(square).max() + 1e-300)
    solved: np.ndarray = np.linalg.solve(held, toward)
    return solved


def same_before(plan: Plan, since: int) -> set[int]:
    """Return the steps before one whose outputs need not be made again, because nothing is kept of them.

    Args:
        plan: Of forecasts.
        since: The first step that is done otherwise than before.
    """
    run = set(range(since, plan.steps))
    while more := {s for rule in plan.rules for step in run for s, _ in rule.weights.get(step, ())} - run:
        run |= more  # and at these steps other rules may act, which need what was computed before
    return set(range(since)) - run


def first_difference(one: Plan, other: Plan, anatomy: Anatomy) -> int:
    """Return the first step at which two plans do different things; the number of steps if there is none."""

    def does(plan: Plan) -> list[Any]:
        stand_ins, ranges = plan.stand_ins(anatomy), plan.ranges(anatomy)
        table = plan.table(anatomy).values()
        return [
            (
                [letters[step] for letters in table],
                {key: by_step[step] for key, by_step in stand_ins.items() if step in by_step},
                {key: by_step[step] for key, by_step in ranges.items() if step in by_step},
            )
            for step in range(plan.steps)
        ]

    pairs = zip(does(one), does(other), strict=True)
    return next((step for step, (mine, theirs) in enumerate(pairs) if mine != theirs), one.steps)


def _moved(slots: Slots, moves: list[tuple[tuple[int, int], int]], by: Sequence[float] | np.ndarray) -> Slots:
    """Return weights some of which are larger, and that of the newest output smaller by as much."""
    rows = {slot: [weight for _, weight in weights] for slot, weights in slots.items()}
    for (slot, place), change in zip(moves, by, strict=True):
        rows[slot][place] += float(change)
        rows[slot][0] -= float(change)
    return {
        slot: tuple((source, weight) for (source, _), weight in zip(weights, rows[slot], strict=True))
        for slot, weights in slots.items()
    }
