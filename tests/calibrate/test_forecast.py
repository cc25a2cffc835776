"""Forecasts against what they say in vectors, and the plans made of them."""

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler

from dicache.anatomy.clock import noise_levels, timesteps
from dicache.calibrate import CalibrationError
from dicache.calibrate.dp import Dp
from dicache.calibrate.forecast import Forecaster, agreement, best_choice
from dicache.calibrate.solvers import solver_of
from dicache.profiler import Profile
from dicache.schedules import Schedule, Target
from tests.calibrate.profiled import profile
from tests.toys import written

STEPS = 9
RIDGE = 1e-3


def walk(seed: int, steps: int = STEPS, size: int = 12) -> np.ndarray:
    """Return outputs that change smoothly from step to step, (steps, size)."""
    return np.random.default_rng(seed).standard_normal((steps, size)).cumsum(axis=0).cumsum(axis=0)


def forecaster(x: np.ndarray, seed: int = 0, outputs: int = 3, reaction: float = 0.0, **settings: Any) -> Forecaster:
    effects = np.random.default_rng(seed).uniform(-1, 1, len(x))
    return Forecaster(x @ x.T, effects, np.full(len(x), reaction), outputs, **settings)


@pytest.mark.parametrize("outputs", [1, 2, 3, 5])
def test_the_accumulated_error_is_what_a_linear_solver_adds_up(outputs: int) -> None:
    """The outputs are foretold in full; the model does not react."""
    x = walk(0)
    made = forecaster(x, outputs=outputs)
    for rest in combinations(range(1, STEPS), 3):
        found = made.forecast((0, *rest))
        error = np.zeros(x.shape[1])
        for step in range(STEPS):
            if step in found.weights:
                held = [s for s in (0, *rest) if s < step][::-1][:outputs]
                assert [source for source, _ in found.weights[step]] == held
                assert sum(weight for _, weight in found.weights[step]) == pytest.approx(1)
                own = sum(weight * x[source] for source, weight in found.weights[step]) - x[step]
                assert found.errors[step] == pytest.approx(np.linalg.norm(own) / np.linalg.norm(x[step]), abs=1e-6)
                error = error + made.effects[step] * own
            else:
                assert found.errors[step] == 0
            assert found.accumulated[step] == pytest.approx(np.linalg.norm(error), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("outputs", "reaction"), [(2, 0.0), (3, 0.0), (4, 0.3), (3, 1.0)])
def test_no_other_weights_make_the_objective_smaller(outputs: int, reaction: float) -> None:
    x, computed = walk(1), (0, 1, 2, 4, 6)
    made = forecaster(x, 3, outputs, reaction, own=0.5, ridge=RIDGE)
    found = made.forecast(computed)
    ridge = RIDGE * np.trace(made.gram) / STEPS
    error, extra = np.zeros(x.shape[1]), np.float64(0)  # of the outputs foretold, and the noise's square
    noise: dict[int, Any] = {}
    for step in range(STEPS):
        if step in computed:
            noise[step] = reaction**2 * (error @ error + extra)
            assert float(found.accumulated[step]) ** 2 == pytest.approx(error @ error + extra, rel=1e-6, abs=1e-9)
            continue
        sources, best = (np.array(row) for row in zip(*found.weights[step], strict=True))
        effect = made.effects[step]
        own = 0.5 * max(abs(effect), np.median(np.abs(made.effects))) ** 2

        def passed_on(w: np.ndarray, sources: np.ndarray = sources) -> float:
            return float(sum(w**2 * np.array([noise[s] for s in sources])))

        def objective(w: np.ndarray, sources=sources, step=step, effect=effect, own=own, error=error) -> float:  # type: ignore[no-untyped-def]
            d = w @ x[sources] - x[step]
            both = effect**2 + own
            spread = both * (passed_on(w, sources) + ridge * float(w[1:] @ w[1:]))
            return float((error + effect * d) @ (error + effect * d) + own * d @ d + spread)

        lowest = objective(best)
        for seed in range(20):
            change = np.random.default_rng(seed).standard_normal(len(best))
            for size in (1e-3, 0.1):
                assert objective(best + size * (change - change.mean())) >= lowest - 1e-9 * abs(lowest)
        error = error + effect * (best @ x[sources] - x[step])
        extra += effect**2 * passed_on(best)


def test_outputs_that_err_are_not_extrapolated_far() -> None:
    x = walk(2)
    steady, shaky = (forecaster(x, reaction=r).forecast((0, 1, 3, 5)).weights[6] for r in (0.0, 100.0))
    assert sum(abs(weight) for _, weight in shaky) < sum(abs(weight) for _, weight in steady)
    assert all(0 < weight < 1 for _, weight in shaky)  # a mean


@pytest.mark.parametrize("seed", range(4))
def test_no_move_of_one_step_improves_a_choice(seed: int) -> None:
    made = forecaster(walk(seed), seed)
    chosen = best_choice([made], 4, mandatory=(0, 1))
    every: dict[tuple[int, ...], float] = {
        (0, 1, *rest): made.forecast((0, 1, *rest)).accumulated[-1] for rest in combinations(range(2, STEPS), 2)
    }
    assert {0, 1} <= {*chosen}
    near = [value for other, value in every.items() if len({*other} - {*chosen}) <= 1]
    assert every[chosen] == pytest.approx(min(near))
    masks = np.array([np.isin(np.arange(STEPS), other) for other in every])
    np.testing.assert_allclose(np.sqrt(made.costs(masks)), list(every.values()), rtol=1e-6)


def test_a_step_that_changes_nothing_is_not_computed() -> None:
    made = forecaster(walk(5))
    made.effects[-1] = 1e-9
    assert STEPS - 1 not in best_choice([made], 5)
    chosen = best_choice([made], 5, mandatory=(STEPS - 1,), max_gap=3)
    assert chosen[-1] == STEPS - 1
    assert max(np.diff(chosen)) <= 3
    with pytest.raises(CalibrationError, match="2 of 9 steps cannot be computed; possible are 3 to 9"):
        best_choice([made], 2, max_gap=3)


def test_agreement_is_of_logarithms() -> None:
    correlation, ratio = agreement(np.array([0.0, 2.0, 4.0, 8.0]), np.array([1.0, 1.0, 2.0, 4.0]))
    assert correlation == pytest.approx(1)
    assert ratio == pytest.approx(2)


def measured(x: np.ndarray, **changes: Any) -> Profile:
    """Return a profile of DDIM, in which both kinds of branch have what the body has."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(len(x))
    target = Target(
        scheduler="DDIMScheduler",
        latents=(3, 4),
        num_inference_steps=len(x),
        timesteps=timesteps(scheduler),
        noise_levels=noise_levels(scheduler),
    )
    gram = (x @ x.T)[None]
    arrays = {"body/gram": gram, "body/output": gram, "body/branches": np.stack([gram, 4 * gram], axis=1)}
    made = profile(written(2), arrays, steps=len(x), target=replace(target, **changes))
    settings = {**made.provenance.settings, "scheduler_config": dict(scheduler.config)}
    return replace(made, provenance=replace(made.provenance, settings=settings))


def test_a_plan_of_the_body_has_the_weights_of_its_forecasts() -> None:
    found = measured(walk(6))
    schedule = Dp(steps_computed=4, predictor="forecast").calibrate(found)
    assert schedule.plan is not None
    (rule,) = schedule.plan.rules
    assert (rule.action, rule.predictor, rule.steps.count("C"), len(rule.weights)) == ("skip", "forecast", 4, 5)
    assert max(len(weights) for weights in rule.weights.values()) == 4
    assert Schedule.from_json(schedule.to_json()) == schedule
    rising = [
        Dp(steps_computed=count, predictor="forecast").calibrate(found).measured["expected_accumulated"]["body"][-1]
        for count in (2, 4, 6)
    ]
    assert rising == sorted(rising, reverse=True)


def test_kinds_of_branch_share_the_steps_and_have_weights_of_their_own() -> None:
    found = measured(walk(7))
    schedule = Dp(steps_computed=4, predictor="forecast", granularity="branch", order=1).calibrate(found)
    assert schedule.plan is not None
    one, two = schedule.plan.rules
    assert (one.action, one.branch, two.branch, one.steps) == ("reuse", "attn", "mlp", two.steps)
    assert one.weights.keys() == two.weights.keys()  # products that differ by a factor give the same
    assert [w for _, w in one.weights[8]] == pytest.approx([w for _, w in two.weights[8]])


def test_a_share_of_the_macs_takes_as_many_steps_as_fit() -> None:
    found = measured(walk(8))
    for share in (1.0, 0.8, 0.6):
        schedule = Dp(max_macs=share, predictor="forecast").calibrate(found)
        assert schedule.plan is not None
        assert schedule.macs_fraction() <= share
        count = schedule.measured["computed_steps"]["body"]
        assert count == STEPS or Dp(steps_computed=count + 1).calibrate(found).macs_fraction() > share
    with pytest.raises(CalibrationError, match=r"0\.01 of the MACs cannot be reached.*the least is"):
        Dp(max_macs=0.01, predictor="forecast").calibrate(found)


def test_an_expansion_can_be_planned_with_the_weights_of_the_solver() -> None:
    found = measured(walk(3))
    effects = solver_of(found, 0.2).carried()[-1]
    weighed = Dp(steps_computed=5, weigh="solver", variance=0.2).calibrate(found)
    assert weighed.plan == Dp(steps_computed=5).calibrate(found, effects**2).plan
    assert weighed.plan != Dp(steps_computed=5).calibrate(found).plan
    with pytest.raises(CalibrationError, match="not by both"):
        Dp(steps_computed=5, weigh="solver").calibrate(found, effects)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"order": 0}, "order must be 1 to 4 with forecast, found 0"),
        ({"order": 5}, "order must be 1 to 4 with forecast, found 5"),
        ({"own": -1.0}, "own error's weight must be 0 or more, found -1"),
        ({"variance": 0.0}, "variance must be above 0, found 0"),
        ({"reaction": float("nan")}, "reaction must be 0 or more, found nan"),
        ({"granularity": "branch", "together": False}, "planned together"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        Dp(**{"steps_computed": 3, "predictor": "forecast", **settings})


def test_a_profile_without_what_a_forecast_needs_is_refused() -> None:
    with pytest.raises(CalibrationError, match="how large the latents are"):
        Dp(steps_computed=3, predictor="forecast").calibrate(measured(walk(9), latents=None))
    with pytest.raises(CalibrationError, match="how its scheduler None was configured"):
        Dp(steps_computed=3, predictor="forecast").calibrate(measured(walk(9), scheduler=None))
    with pytest.raises(CalibrationError, match="takes its weights from"):
        Dp(steps_computed=3, predictor="forecast").calibrate(measured(walk(9)), np.ones(STEPS))
