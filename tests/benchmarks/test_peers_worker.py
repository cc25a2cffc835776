from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers_worker import Bench, run
from dicache.calibrate.fora import Fora
from dicache.calibrate.methods import planned_schedule
from dicache.calibrate.taylorseer import TaylorSeer
from dicache.models.sampling import Sampling, sample
from dicache.profiler.describing import survey_pipeline
from dicache.runtime import apply

STEPS, RUNS = 6, (["3", "8"], [1, 2])
DEPTH = 12  # blocks of the model


@pytest.fixture(scope="module")
def bench() -> Bench:
    calibration = {"conditions": RUNS[0], "seeds": RUNS[1]}
    return Bench({"model": "digits", "sampling": {"steps": STEPS, "guidance": 4.0}, "calibration": calibration})


def answer(bench: Bench, folder: Path, peer: str, settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    about = {"key": "it", "peer": peer, "settings": settings, "conditions": RUNS[0], "seeds": RUNS[1]}
    return run(bench, {**about, "batch": 2, "most": 1.0, "file": str(folder / "images.npy"), **more})


def test_uncached_images_cost_all_and_are_not_changed_by_counting(bench: Bench) -> None:
    images, macs = bench.made(*RUNS)
    assert bench.share(macs, *RUNS) == 1
    assert np.array_equal(images, sample(bench.pipeline, *RUNS, Sampling(STEPS, 4.0)))


@pytest.mark.parametrize("method", [Fora(2), TaylorSeer(3, 1, granularity="body")])
def test_schedules_and_peers_are_counted_alike(bench: Bench, method: Any) -> None:
    schedule = planned_schedule(method, *survey_pipeline(bench.pipeline, bench.sampling))
    with apply(bench.pipeline, schedule):
        _, macs = bench.made(*RUNS)
    assert bench.share(macs, *RUNS) == pytest.approx(schedule.macs_fraction(), rel=1e-4)


@pytest.mark.parametrize(
    ("peer", "settings", "computed"),
    [
        # Steps 0 and 1 warm up, and from the second one after them, 3, the interval counts.
        ("taylorseer", {"modules": "every branch", "interval": 3, "order": 1, "warm_up": 2}, 3),
        # The ratios err by less than this, so that every second step is skipped.
        ("magcache", {"threshold": 9.0, "max_skip_steps": 1, "retention_ratio": 0.2}, 3),
        # Any change is below the threshold: the first block alone runs from the second step on.
        ("first_block", {"threshold": 9.0}, 1 + 5 / DEPTH),
    ],
)
def test_a_peer_computes_what_its_rule_says_again_and_again(
    bench: Bench, tmp_path: Path, peer: str, settings: dict[str, Any], computed: float
) -> None:
    plain = sample(bench.pipeline, *RUNS, bench.sampling)
    first = answer(bench, tmp_path, peer, settings)
    images = np.load(tmp_path / "images.npy")
    assert first["macs_fraction"] == pytest.approx(computed / STEPS, abs=0.02)  # and a little for modulation and head
    assert not np.array_equal(images, plain)
    assert answer(bench, tmp_path, peer, settings) == first
    assert np.array_equal(np.load(tmp_path / "images.npy"), images)  # nothing is carried over
    assert np.array_equal(sample(bench.pipeline, *RUNS, bench.sampling), plain)  # and nothing stays behind


def test_broadcast_attention_saves_attention_alone(bench: Bench, tmp_path: Path) -> None:
    settings = {"attn": 2, "temporal": None, "cross": None, "window": [0, 1000]}
    assert 0.7 < answer(bench, tmp_path, "pab", settings)["macs_fraction"] < 0.95


def test_what_does_not_run_or_costs_too_much_is_told(bench: Bench, tmp_path: Path) -> None:
    lite = answer(bench, tmp_path, "taylorseer", {"modules": "lite", "interval": 3, "order": 1, "warm_up": 2})
    assert lite["error"].startswith("NotImplementedError: foretells the output of proj_out")
    dear = answer(bench, tmp_path, "first_block", {"threshold": 0.0}, most=0.7)
    assert dear["error"] == "not gone on with: 1.000 of the MACs in 2 images"
    assert not (tmp_path / "images.npy").exists()
