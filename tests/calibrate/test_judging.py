"""What schedules make of real runs, on the bundled model."""

from pathlib import Path

import numpy as np
import pytest

from dicache.calibrate.fora import Fora
from dicache.calibrate.judging import RealRuns
from dicache.calibrate.methods import planned_schedule
from dicache.models.loading import load
from dicache.models.sampling import Sampling
from dicache.profiler.describing import survey_pipeline

CLASSES, SEEDS = ["0", "1", "2"], [7, 8, 9]


def test_runs_can_be_judged_in_parts_and_count_what_they_spend(tmp_path: Path) -> None:
    pipeline = load("digits", device="cpu")
    sampling = Sampling(steps=4).usual_for("digits")
    runs = RealRuns.of(pipeline, CLASSES, SEEDS, sampling, references=tmp_path, progress=False)
    assert (len(runs), runs.spent) == (3, 3.0)
    anatomy, target, steps = survey_pipeline(pipeline, runs.sampling)
    schedule = planned_schedule(Fora(2), anatomy, target, steps)
    whole = runs(schedule)
    assert whole.psnr == pytest.approx(np.mean(whole.each))
    assert len(whole.each) == 3
    assert runs.spent == pytest.approx(3 + 3 * schedule.macs_fraction())
    parts = [runs(schedule, slice(0, 1)), runs(schedule, slice(1, 3))]
    assert [*parts[0].each, *parts[1].each] == pytest.approx(whole.each, abs=1e-3)
    assert runs.spent == pytest.approx(3 + 6 * schedule.macs_fraction())
    again = RealRuns.of(pipeline, CLASSES, SEEDS, sampling, references=tmp_path, progress=False)
    assert again.spent == 0  # its images are on disk
