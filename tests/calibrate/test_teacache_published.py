"""The published polynomials: where they are negative, where x is held, and what schedules of them say and do."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

import dicache
from dicache.calibrate import CalibrationError
from dicache.calibrate.freezing import freeze
from dicache.calibrate.simulating import simulate
from dicache.calibrate.teacache import TeaCache, changes, published_fits
from dicache.calibrate.teacache_published import (
    LARGEST,
    Signal,
    all_published,
    published,
    published_for,
    quoted_in_words,
    sensible_range,
)
from dicache.models.names import HUB
from dicache.profiler.time_signal import measure_time
from dicache.schedules import Target
from dicache.schedules.policies import Negative
from tests.calibrate.test_fora import TWO_BLOCKS
from tests.calibrate.test_teacache import profile_of
from tests.timed import STEPS, anatomy_of, cogvideox, hidream, wan

EVERY = pytest.mark.parametrize("name", list(all_published()))

NEGATIVES: tuple[Negative, ...] = ("reference", "clamp", "abs")

SLOPE = np.array([1, 1, 1, 1, 1.0, 1.001, 1.002, 1.003, 1.004, 1.005])  # a fit needs x to vary
SEEN: tuple[Signal, ...] = ("modulated", "time")

# Where p < 0, between 0 and 0.6; found by evaluating the coefficients.
NEGATIVE = [
    ("flux-kontext", (0.241, 0.6)),
    ("mochi", (0.145, 0.6)),
    ("wan2.1-t2v-1.3b", (0.185, 0.310)),
    ("wan2.1-t2v-14b", (0.0, 0.129)),
    ("wan2.1-t2v-14b", (0.407, 0.6)),
    ("wan2.1-i2v-480p", (0.0, 0.056)),
    ("wan2.1-i2v-720p", (0.0, 0.058)),
    ("wan2.1-t2v-14b-retention", (0.0, 0.0076)),
    ("wan2.1-t2v-14b-retention", (0.082, 0.6)),
    ("wan2.1-t2v-1.3b-retention", (0.0, 0.0043)),
    ("wan2.1-t2v-1.3b-retention", (0.102, 0.6)),
    ("cogvideox-5b", (0.0, 0.0074)),
    ("cogvideox-5b", (0.331, 0.6)),
    ("latte", (0.237, 0.6)),
    ("hidream-full", (0.069, 0.6)),
    ("lumina-next", (0.280, 0.6)),
    ("lumina2", (0.280, 0.6)),
]


@pytest.mark.parametrize(("name", "where"), NEGATIVE)
def test_where_a_published_polynomial_is_negative_only_the_reference_lowers_the_sum(
    name: str, where: tuple[float, float]
) -> None:
    # Held in a range that is wide enough to reach the trap.
    known = replace(published(name), input_range=(0.0, LARGEST), first_steps=1, last_steps=1)
    reference, clamp, magnitude = (known.policy(9.0, negative) for negative in NEGATIVES)
    for x in np.linspace(*where, 50):
        assert reference.rescale(x) < 0
        assert clamp.rescale(x) == 0
        assert magnitude.rescale(x) == -reference.rescale(x)
    memory = reference.remember()
    for step in range(1, 8):  # the sum falls, so nothing is computed until the forced last step
        assert not reference.decide(step, 9, float(np.mean(where)), memory)
        assert memory.accumulated == pytest.approx(step * reference.rescale(float(np.mean(where))))


@EVERY
def test_held_in_its_range_a_polynomial_is_not_negative_and_large_changes_foretell_no_less(name: str) -> None:
    known = published(name)
    clamp, reference = known.policy(0.0), known.policy(0.0, "reference")
    low, high = known.held_range
    inside = np.array([reference.rescale(x) for x in np.linspace(low, high, 400)])
    assert (inside >= -1e-9).all()
    assert [clamp.rescale(x) for x in np.linspace(low, high, 400)] == pytest.approx(np.maximum(inside, 0))
    assert clamp.rescale(9.0) == clamp.rescale(high) > 0
    if known.input_range is None and high < LARGEST:  # a peak before p falls to nothing
        beyond = [reference.rescale(x) for x in np.linspace(high, LARGEST, 2000)]
        assert beyond[1] < beyond[0]
        assert min(beyond) < 0
    elif known.input_range is None:
        assert clamp.rescale(high) > max([0.0, *(each.threshold for each in known.quoted)])


def test_the_range_where_a_polynomial_makes_sense_by_head() -> None:
    assert sensible_range((1.0, 0.0)) == (0.0, 1.0)
    assert sensible_range((1.0, -0.25)) == (0.25, 1.0)
    # -(x - 0.2)(x - 0.6) is positive between 0.2 and 0.6 and highest at 0.4.
    assert sensible_range((-1.0, 0.8, -0.12)) == pytest.approx((0.2, 0.4))
    assert sensible_range((1.0, -1.0, 0.25)) == (0.0, 1.0)  # (x - 0.5)^2 only touches zero
    assert sensible_range((-1.0, 0.5)) == (0.0, 0.5)  # falls from the start: no peak
    with pytest.raises(CalibrationError, match="nowhere positive"):
        sensible_range((-1.0, -0.5))


def test_the_polynomial_of_flux_foretells_no_less_than_a_floor_so_skips_come_in_short_rows() -> None:
    policy = published("flux").policy(0.0)
    grid = np.linspace(0, 0.3, 30001)
    foretold = np.array([policy.rescale(x) for x in grid])
    assert foretold.min() == pytest.approx(0.180, abs=5e-4)
    assert grid[foretold.argmin()] == pytest.approx(0.053, abs=1e-3)
    for threshold, longest in ((0.25, 1), (0.4, 2), (0.6, 3), (0.8, 4)):
        decided = simulate(replace(policy, threshold=threshold), np.full((1, 1, 27), 0.053))[0, 0]
        rows = "".join("C" if computes else "." for computes in decided).split("C")
        assert max(map(len, rows)) == longest


@EVERY
def test_each_says_what_it_is_of_and_where_it_is_from(name: str) -> None:
    known = published(name)
    assert known.name == name
    assert known.signal in get_args(Signal)
    assert known.source.startswith("https://github.com/")
    assert len(known.coefficients) == 5
    assert known.package_model is None or known.package_model in HUB
    thresholds = [each.threshold for each in known.quoted]
    assert thresholds == sorted(thresholds)
    if name.endswith("-retention"):
        assert (known.signal, known.first_steps, known.last_steps) == ("time-projected", 5, 0)


def test_the_signal_of_the_models_that_look_at_the_timestep_alone_is_the_time_embedding() -> None:
    by_time = {name for name, known in all_published().items() if known.signal != "modulated"}
    assert all(name.startswith(("wan", "cogvideox", "consisid", "hidream")) for name in by_time)
    assert len(by_time) == 8 + 5 + 1 + 3
    assert {known.name for known in published_for("FluxTransformer2DModel")} == {"flux", "flux-kontext"}


def test_a_name_that_is_not_known_is_answered_with_those_that_are() -> None:
    with pytest.raises(CalibrationError, match=r"published as 'fluks'; known are flux, tangoflux, .*z-image"):
        published("fluks")


def test_without_a_profile_the_schedule_decides_at_run_time_and_says_what_was_quoted() -> None:
    settings = TeaCache(0.4, published="flux", negative="reference")
    made = settings.without_profile("flux", TWO_BLOCKS, Target(num_inference_steps=28), 28)
    assert made.adaptive
    assert made.policy == published("flux").policy(0.4, "reference")
    assert not made.foreseen
    assert made.settings["published"] == "flux"
    told = made.measured["published"]
    assert told["fitted_range"] is None
    assert told["range_is"] == "sensible"
    assert quoted_in_words(told) == (
        "Quoted for flux as published (--negative reference, 28 steps): 0.25 1.5x; 0.4 1.8x; 0.6 2x; 0.8 2.25x."
    )
    given = replace(settings, input_range=(0.01, 0.2)).without_profile("flux", TWO_BLOCKS, Target(), 28)
    assert given.measured["published"]["range_is"] == "given"
    assert given.to_json()["policy"]["input_range"] == [0.01, 0.2]
    fitted = TeaCache(0.1, published="minimax-h3").without_profile("h3", TWO_BLOCKS, Target(), 50)
    assert fitted.to_json()["policy"]["input_range"] == fitted.measured["published"]["fitted_range"]


def test_what_cannot_be_known_without_a_profile_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"known from a profile; give one, or a --threshold. Quoted for flux"):
        TeaCache(target_speedup=2.0, published="flux").without_profile("flux", TWO_BLOCKS, Target(), 28)
    timed = TeaCache(0.1, published="wan2.1-t2v-1.3b", signal="time")
    with pytest.raises(CalibrationError, match="time embedding, which takes the model's weights"):
        timed.without_profile("wan", TWO_BLOCKS, Target(), 50)
    with pytest.raises(CalibrationError, match="a fit needs a profile"):
        TeaCache(0.1).without_profile("wan", TWO_BLOCKS, Target(), 50)


def test_settings_that_contradict_one_another_are_refused() -> None:
    for wrong, said in (
        ({"published": "wan2.1-t2v-1.3b"}, "is of the signal time"),
        ({"published": "wan2.1-t2v-1.3b", "signal": "time-projected"}, "is of the signal time"),
        ({"published": "nothing"}, "nothing is published"),
        ({"foretell": "steps", "published": "flux"}, "no signal and no polynomial"),
        ({"foretell": "steps", "signal": "time"}, "no signal and no polynomial"),
        ({"signal": "stars"}, "the signal is one of modulated, time, time-projected"),
        ({"first_steps": 0}, "at least the first step"),
        ({"last_steps": -1}, "no fewer than 0"),
        ({"input_range": (0.3, 0.1)}, "the range of x"),
    ):
        given: dict[str, Any] = wrong
        with pytest.raises(CalibrationError, match=said):
            TeaCache(threshold=0.1, **given)


def test_on_a_profile_it_is_told_how_well_the_polynomial_foretells() -> None:
    known = published("ltx")
    x = np.random.default_rng(0).uniform(0.02, 0.3, size=(4, 1, 10))
    profile = profile_of(x, np.vectorize(known.policy(0.0).rescale)(x))
    schedule = TeaCache(threshold=0.1, published="ltx").calibrate(profile)
    judged = schedule.measured["published"]["on_profile"]
    assert (judged["pairs"], judged["r2"], judged["rmse"], judged["outside_share"]) == (40, 1.0, 0.0, 0.0)
    assert schedule.policy == known.policy(0.1)
    assert schedule.measured["computed_steps"] < 11
    fits = published_fits(profile, ["ltx", "flux"])
    assert fits["ltx"].r2 == pytest.approx(1)
    assert fits["flux"].r2 < 0  # the mean of y foretells better
    assert published_fits(profile) == {}  # no polynomial is published for a toy


def test_a_share_of_x_that_is_negative_or_outside_is_counted() -> None:
    x = np.concatenate([np.full(6, 0.1), np.full(2, 0.2), np.full(2, 0.5)]).reshape(1, 1, 10).repeat(4, axis=0)
    profile = profile_of(x, x)
    schedule = TeaCache(threshold=0.1, published="mochi", negative="reference").calibrate(profile)
    judged = schedule.measured["published"]["on_profile"]
    assert (judged["outside_share"], judged["negative_share"]) == (0.4, 0.4)


def test_forced_steps_are_computed() -> None:
    x = np.random.default_rng(0).uniform(0.02, 0.3, size=(4, 1, 10))
    schedule = TeaCache(threshold=1e9, first_steps=5, last_steps=0).calibrate(profile_of(x, x))
    assert schedule.table()["0.attn"] == "CCCCC" + "S" * 6
    schedule = TeaCache(threshold=1e9, first_steps=2, last_steps=3).calibrate(profile_of(x, x))
    assert schedule.table()["0.attn"] == "CC" + "S" * 6 + "CCC"


def timed_profile(x: np.ndarray, spread: float = 0.0) -> Any:
    """Return a profile of three runs whose time embedding changes by x, shape (steps - 1,)."""
    rows = np.tile(x, (3, 1, 1)) * (1 + spread * np.arange(3)[:, None, None])
    profile = profile_of(np.random.default_rng(0).uniform(0.02, 0.3, size=rows.shape), 2 * rows)
    arrays = {**profile.arrays, "teacache/time": profile_of(rows, rows).arrays["teacache/input"]}
    return replace(profile, provenance=replace(profile.provenance, time_signals=("time",)), arrays=arrays)


def test_a_signal_that_sees_the_timestep_alone_gives_a_plan() -> None:
    x = np.array([0.1, 0.1, 0.1, 0.3, 0.05, 0.05, 0.05, 0.05, 0.1, 0.1])
    schedule = TeaCache(threshold=0.5, signal="time", degree=1).calibrate(timed_profile(x))
    assert not schedule.adaptive
    # y = 2 x: sums of 0.2, 0.4, then 0.6 computes; 0.6 computes; 0.1 to 0.4; 0.6 computes; the last is forced.
    assert schedule.table()["0.attn"] == "CSSCCSSSSCC"
    again = TeaCache(target_speedup=1.3, signal="time", degree=1).calibrate(timed_profile(x))
    assert 1 / again.macs_fraction() >= 1.3


def test_frozen_a_policy_that_sees_the_timestep_alone_is_that_plan() -> None:
    x = np.array([0.1, 0.1, 0.1, 0.3, 0.05, 0.05, 0.05, 0.05, 0.1, 0.1])
    profile = timed_profile(x)
    arrays = {**profile.arrays, "teacache/input": profile.arrays["teacache/time"], "body/gram": np.ones((3, 11, 11))}
    profile = replace(profile, arrays=arrays)
    adaptive, plan = (TeaCache(threshold=0.5, signal=each, degree=1).calibrate(profile) for each in SEEN)
    frozen = freeze(adaptive, profile)
    assert frozen.measured["agreement"] == [1.0] * 11
    assert frozen.table() == plan.table()


def test_steps_at_which_another_model_runs_are_none_of_the_plan() -> None:
    x = np.array([np.nan] * 4 + [0.1] * 6)
    schedule = TeaCache(threshold=0.5, signal="time", degree=1, last_steps=0).calibrate(timed_profile(x * SLOPE))
    assert schedule.table()["0.attn"][5:] == "SSCSSC"


def test_a_profile_without_the_signal_or_with_one_that_differs_between_runs_is_refused() -> None:
    x = np.linspace(0.05, 0.3, 10)
    with pytest.raises(CalibrationError, match="has no projected time embedding"):
        changes(timed_profile(x), "time-projected")
    with pytest.raises(CalibrationError, match="depends on more than the timestep"):
        TeaCache(threshold=0.5, signal="time", degree=1).calibrate(timed_profile(x, spread=0.01))


def reference_rule(x: np.ndarray, coefficients: tuple[float, ...], threshold: float, first: int, last: int) -> str:
    """TeaCache for one guidance pass, from its description: counts calls, adds up p(x), starts again at zero."""
    steps, accumulated, letters = len(x) + 1, 0.0, ""
    for count in range(steps):
        if count < first or count >= steps - last:
            computes, accumulated = True, 0.0
        else:
            accumulated += np.poly1d(coefficients)(x[count - 1])
            computes = not accumulated < threshold
            accumulated = 0.0 if computes else accumulated
        letters += "C" if computes else "S"
    return letters


@pytest.mark.parametrize(
    ("build", "name", "signal"),
    [
        (wan, "wan2.1-t2v-1.3b", "time"),
        (wan, "wan2.1-i2v-480p-retention", "time_projected"),
        (wan, "wan2.1-i2v-720p-retention", "time_projected"),
        (cogvideox, "cogvideox-2b", "time"),
        (hidream, "hidream-dev", "time"),
    ],
)
def test_the_plan_of_a_published_polynomial_computes_what_the_rule_does_step_by_step(
    build: Any, name: str, signal: str
) -> None:
    pipe, run = build()
    anatomy, known = anatomy_of(pipe, run), published(name)
    x = measure_time(pipe, anatomy, run)[signal]
    usual = float(np.median(np.abs(np.polyval(known.coefficients, x))))
    tables = set()
    for threshold in (0.0, 0.1, 0.3, usual, 1.5 * usual, 2.5 * usual):
        settings = TeaCache(
            threshold,
            published=name,
            negative="reference",
            signal=known.signal,
            first_steps=known.first_steps,
            last_steps=known.last_steps,
        )
        schedule = settings.without_profile("tiny", anatomy, Target(), STEPS, x)
        want = reference_rule(x, known.coefficients, threshold, known.first_steps, known.last_steps)
        assert not schedule.adaptive
        assert set(schedule.table().values()) == {want}
        tables.add(want)
    assert len(tables) > 1  # the thresholds tell something apart


def test_the_plan_runs_without_a_decision_and_computes_the_steps_that_it_names() -> None:
    pipe, run = wan()
    anatomy = anatomy_of(pipe, run)
    x = measure_time(pipe, anatomy, run)["time"]
    settings = TeaCache(target_speedup=1.5, published="wan2.1-i2v-480p", signal="time")
    schedule = settings.without_profile("tiny", anatomy, Target(), STEPS, x)
    computed = schedule.table()["0.attn"].count("C")
    calls: list[int] = []
    hook = pipe.transformer.blocks[1].attn1.register_forward_hook(lambda *_: calls.append(1))
    with dicache.apply(pipe, schedule):
        run()
    hook.remove()
    assert 2 < computed < STEPS
    assert len(calls) == 2 * computed  # two guidance passes
