"""Refining: weights move to where the finished images are nearest, and never away from them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicache import Schedule
from dicache.calibrate.keeping import Kept
from dicache.calibrate.refining import first_difference, refined, same_before, tried
from dicache.calibrate.sensitivity import Forecasts
from dicache.evaluate.rerunning import Beginning, Made
from dicache.schedules import Plan, Rule, Target
from tests.toys import written

STEPS, RUNS, PIXELS = 6, 12, 60
COMPUTED = (0, 1, 3)
BEST: Forecasts = {2: ((1, 1.7), (0, -0.7)), 4: ((3, 1.3), (1, -0.2), (0, -0.1)), 5: ((3, 1.9), (1, -1.2), (0, 0.3))}
START: Forecasts = {2: ((1, 2.0), (0, -1.0)), 4: ((3, 1.5), (1, -0.5), (0, 0.0)), 5: ((3, 2.0), (1, -1.0), (0, 0.0))}


class Answers:
    """Images that answer to the weights' distance from the best ones, and to nothing else."""

    def __init__(self, bend: float = 0.0) -> None:
        random = np.random.default_rng(1)
        places = [(step, place) for step, weights in BEST.items() for place in range(1, len(weights))]
        self.answers = dict(zip(places, 0.02 * random.normal(size=(len(places), RUNS, PIXELS)), strict=True))
        self.rest = 1e-4 * random.normal(size=(RUNS, PIXELS))
        self.bend, self.spent, self.beginnings = bend, 0.0, list[Beginning]()
        self.uncached = Made(np.full((RUNS, PIXELS), 0.5), RUNS)

    def __len__(self) -> int:
        return RUNS

    def __call__(self, schedule: Schedule, beginning: Beginning | None = None, *, recorded: bool = False) -> Made:
        assert schedule.plan is not None
        weights: Mapping[int, Any] = schedule.plan.rules[0].weights
        off = sum(
            answer * (weights[step][place][1] - BEST[step][place][1]) for (step, place), answer in self.answers.items()
        )
        if beginning is not None:
            self.beginnings.append(beginning)
        self.spent += RUNS
        return Made(self.uncached.images + off + self.bend * off * abs(off) + self.rest, RUNS)


def schedule(forecasts: Forecasts) -> Schedule:
    letters = "".join("C" if step in COMPUTED else "." for step in range(STEPS))
    plan = Plan(STEPS, (Rule("skip", letters, predictor="forecast", weights=forecasts),))
    return Schedule("auto", {}, written(1), Target("Toy"), STEPS, plan)


def candidate(runs: Any) -> Any:
    return tried(runs, "toy", schedule(START))


def test_where_images_answer_linearly_one_step_finds_the_best_weights() -> None:
    runs: Any = Answers()
    better = refined(runs, candidate(runs), lambda: None)
    for step, weights in BEST.items():
        assert [w for _, w in better.slots[step, 0]] == pytest.approx([w for _, w in weights], abs=0.01)
    assert better.decibels > candidate(runs).decibels + 20
    assert 0 <= better.optimism < 2


def test_the_nudges_begin_where_the_plan_differs() -> None:
    runs: Any = Answers()
    refined(runs, candidate(runs), lambda: None)
    assert [sorted(beginning.steps) for beginning in runs.beginnings] == [[], [2], [2], [2, 4], [2, 4]]


def test_steps_are_known_where_nothing_that_is_run_needs_their_outputs() -> None:
    alone = forecast("C..C..C..", {1: (0,), 2: (0,), 4: (3, 0), 5: (3, 0), 7: (6, 3), 8: (6, 3)})
    assert same_before(Plan(9, (alone,)), 7) == {0, 1, 2, 4, 5}
    # Another rule computes step 5, where the first one acts and needs steps 3 and 0.
    other = forecast("C..C.CC..", {1: (0,), 2: (0,), 4: (3, 0), 7: (6, 5), 8: (6, 5)})
    assert same_before(Plan(9, (alone, other)), 7) == {1, 2, 4}


def test_plans_differ_from_the_first_step_that_has_other_letters_or_weights() -> None:
    sources = {1: (0,), 2: (0,), 4: (3, 0), 5: (3, 0)}
    plan = Plan(6, (forecast("C..C..", sources),))
    assert first_difference(plan, plan, written(1)) == 6
    lighter = replace(plan.rules[0], weights={**plan.rules[0].weights, 2: ((0, 0.9),)})
    assert first_difference(plan, Plan(6, (lighter,)), written(1)) == 2
    assert first_difference(plan, Plan(6, (forecast("C..CC.", {1: (0,), 2: (0,), 5: (4, 3)}),)), written(1)) == 4


def forecast(letters: str, sources: Mapping[int, Sequence[int]]) -> Rule:
    weights = {step: tuple((source, 1 / len(of)) for source in of) for step, of in sources.items()}
    return Rule("reuse", letters, predictor="forecast", weights=weights)


def test_a_candidate_that_nothing_improves_stays() -> None:
    runs: Any = Answers()
    best = refined(runs, candidate(runs), lambda: None)
    runs.answers = {place: 0 * answer for place, answer in runs.answers.items()}  # now nothing has an effect
    same = tried(runs, "toy", best.schedule)
    assert refined(runs, same, lambda: None) is same


@pytest.mark.parametrize("bend", [-20.0, 20.0])
def test_images_that_answer_otherwise_are_not_made_worse(bend: float) -> None:
    runs: Any = Answers(bend)
    start = candidate(runs)
    assert refined(runs, start, lambda: None).expected >= start.expected


def test_what_nudges_did_is_kept_and_not_made_again(tmp_path: Path) -> None:
    runs: Any = Answers()
    make = partial(refined, runs, candidate(runs), lambda: None)
    first = make(Kept(tmp_path))
    made = len(runs.beginnings)
    (tmp_path / ".broken.1.part").write_bytes(b"half")
    again = make(Kept(tmp_path))
    assert len(runs.beginnings) == made
    assert again.slots == first.slots
    one = sorted(tmp_path.glob("*.npz"))[0]
    one.write_bytes(one.read_bytes()[:50])
    assert make(Kept(tmp_path)).slots == first.slots
    assert len(runs.beginnings) == made + 1


def test_images_that_are_not_finite_are_the_worst_and_are_not_fitted_to() -> None:
    runs: Any = Answers()
    start = candidate(runs)
    runs.answers = {place: answer * np.nan for place, answer in runs.answers.items()}
    assert candidate(runs).decibels == 0.0
    assert refined(runs, start, lambda: None) is start
