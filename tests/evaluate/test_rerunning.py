"""Reruns: what is known of a run is not computed again, and nothing else changes."""

from typing import Any

import numpy as np
import pytest

from dicache import Schedule
from dicache.calibrate.refining import first_difference, same_before
from dicache.evaluate.rerunning import BATCH, Beginning, Reruns
from dicache.models.loading import load
from dicache.models.sampling import Sampling, sample
from dicache.profiler.describing import survey_pipeline
from dicache.schedules import Plan, Rule
from dicache.schedules.plan import Weights

STEPS = 6
SAMPLING = Sampling(STEPS, 4.0)
LETTERS = "CC.C.."
FORECASTS: dict[int, Weights] = {2: ((1, 1.8), (0, -0.8)), 4: ((3, 1.4), (1, -0.4)), 5: ((3, 2.0), (1, -1.0))}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load("digits")


@pytest.fixture(scope="module")
def runs(pipeline: Any) -> Reruns:
    return Reruns(pipeline, ["3", "7"], [1, 2], SAMPLING)


def schedule(pipeline: Any, action: Any, weights: dict[int, Weights]) -> Schedule:
    anatomy, target, steps = survey_pipeline(pipeline, SAMPLING)
    plan = Plan(steps, (Rule(action, LETTERS, predictor="forecast", weights=weights),))
    return Schedule("auto", {}, anatomy, target, steps, plan)


def test_the_uncached_run_is_the_pipelines_own(pipeline: Any, runs: Reruns) -> None:
    assert np.array_equal(runs.uncached.images, sample(pipeline, ["3", "7"], [1, 2], SAMPLING))
    assert [len(calls) for _, calls in sorted(runs.uncached.outputs[0].items())] == [1] * STEPS
    assert runs.uncached.spent == 2


@pytest.mark.parametrize("action", ["skip", "reuse"])
@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_rerun_with_a_known_beginning_is_the_whole_one_bit_for_bit(
    pipeline: Any, runs: Reruns, action: Any, step: int
) -> None:
    base = runs(schedule(pipeline, action, FORECASTS), recorded=True)
    (newest, weight), *rest = FORECASTS[step]
    nudged = schedule(pipeline, action, {**FORECASTS, step: ((newest, weight + 0.1), *rest)})
    sources = {source for source, _ in FORECASTS[step]}
    whole, short = runs(nudged), runs(nudged, Beginning(base, set(range(step)) - sources))
    assert not np.array_equal(whole.images, base.images)
    assert np.array_equal(short.images, whole.images)
    known = [LETTERS[known] for known in set(range(step)) - sources]
    share = (whole.spent - short.spent) / len(runs) * STEPS
    assert share == pytest.approx(known.count("C") + known.count(".") * (whole.spent / 2 * STEPS - 3) / 3, abs=1e-6)


@pytest.mark.parametrize("action", ["skip", "reuse"])
def test_blocks_that_are_computed_at_other_steps_than_the_rest_begin_alike_too(
    pipeline: Any, runs: Reruns, action: Any
) -> None:
    anatomy, target, steps = survey_pipeline(pipeline, SAMPLING)

    def made(last: float) -> Schedule:
        """At step 4 the deep blocks are computed, and the shallow ones are made of steps 3 and 1."""
        shallow: dict[int, Weights] = {**FORECASTS, 5: ((3, 1.0 + last), (1, -last))}
        deep: dict[int, Weights] = {2: FORECASTS[2], 5: ((4, 1.0 + last), (3, -last))}
        rules = (
            Rule(action, LETTERS, "0-7", predictor="forecast", weights=shallow),
            Rule(action, "CC.CC.", "8-11", predictor="forecast", weights=deep),
        )
        return Schedule("auto", {}, anatomy, target, steps, Plan(steps, rules))

    base, other = made(0.5), made(0.7)
    assert base.plan is not None
    assert other.plan is not None
    assert first_difference(base.plan, other.plan, anatomy) == 5
    known = same_before(other.plan, 5)
    assert known == {0, 2}
    whole, short = runs(other), runs(other, Beginning(runs(base, recorded=True), known))
    assert short.spent < whole.spent
    assert np.array_equal(short.images, whole.images)


def test_a_run_that_was_not_recorded_is_no_beginning(pipeline: Any, runs: Reruns) -> None:
    base = schedule(pipeline, "skip", FORECASTS)
    with pytest.raises(ValueError, match="recorded"):
        runs(base, Beginning(runs(base), {0}))


def test_what_is_computed_is_counted_in_uncached_images(pipeline: Any) -> None:
    runs = Reruns(pipeline, ["3"] * (BATCH + 1), list(range(BATCH + 1)), Sampling(2, 4.0))
    assert runs.spent == BATCH + 1
    assert len(runs.uncached.outputs) == 2  # batches
    assert runs.uncached.images.shape[0] == BATCH + 1


def test_the_model_is_as_it_was_afterwards(pipeline: Any, runs: Reruns) -> None:
    runs(schedule(pipeline, "skip", FORECASTS))
    assert not pipeline.transformer._forward_hooks
    assert "forward" not in vars(pipeline.transformer)
    assert not {"step", "set_timesteps"} & vars(pipeline.scheduler).keys()
