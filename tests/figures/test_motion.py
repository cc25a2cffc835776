from dataclasses import replace

import numpy as np
import pytest

from dicache.calibrate.fora import Fora
from dicache.calibrate.methods import planned_schedule
from dicache.figures.motion import motion_rates
from dicache.profiler import Profile, ProfileError
from dicache.schedules import AdaCachePolicy, Schedule
from tests.figures.drawn import points
from tests.figures.synthetic import profile

RUNS, STEPS = 3, 6


def video(motion: np.ndarray) -> Profile:
    """Return a profile of runs whose decision block 0 moves this much, (r,), and never changes."""
    known = profile(np.ones((len(motion), 1, STEPS, 2)))
    between = np.broadcast_to(motion[:, None, None, None, None], (len(motion), 1, STEPS, 1, 3))
    size = np.ones((len(motion), 1, STEPS, 1, 3))
    arrays = {"motion/between_frames": between, "motion/abs_l1": size, "motion/diff_l1": np.zeros((*size.shape, 12))}
    return replace(known, provenance=replace(known.provenance, decision_blocks=(0,)), arrays={**known.arrays, **arrays})


def adacache(rate: int) -> Schedule:
    known = profile(np.ones((1, 1, STEPS, 2)))
    policy = AdaCachePolicy(((1.0, rate),), (0,), "block")
    return Schedule("adacache", {}, known.anatomy, known.provenance.target, STEPS, policy=policy)


def test_each_run_is_a_line_and_a_point_of_each_schedule() -> None:
    motion = np.array([0.1, 0.3, 0.2])
    steps, runs = motion_rates(video(motion), [("always", adacache(1)), ("rarely", adacache(3))]).axes
    assert [np.asarray(line.get_ydata())[0] for line in steps.lines] == pytest.approx(motion)
    assert points(runs)[:, 0] == pytest.approx(motion)
    assert points(runs)[:, 1].tolist() == [STEPS] * RUNS
    assert np.asarray(runs.collections[1].get_offsets())[0, 1] < STEPS
    assert runs.get_ylabel() == "steps computed, of 6"


def test_single_pictures_and_other_methods_are_refused() -> None:
    known = video(np.full(RUNS, np.nan))
    with pytest.raises(ProfileError, match="makes single pictures, without motion"):
        motion_rates(known, [("one", adacache(1))])
    fora = planned_schedule(Fora(2), known.anatomy, known.provenance.target, STEPS)
    with pytest.raises(ValueError, match="needed 1 to 4 schedules of adacache; found 1 of any method"):
        motion_rates(known, [("fora", fora)])
