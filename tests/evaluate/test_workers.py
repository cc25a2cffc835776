"""An evaluation whose images several processes share, against that of one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import distributed

from dicache.anatomy import survey
from dicache.evaluate import evaluation
from dicache.evaluate.evaluation import evaluate
from dicache.models.launching import ALONE, Workers
from dicache.models.loading import load
from dicache.models.sampling import Sampling
from dicache.schedules import Rule, Schedule, Target, TeaCachePolicy
from tests.evaluate.test_evaluation import STEPS, schedule
from tests.profiler.test_shards import run

CONDITIONS = ["1", "7", "1", "3", "4"]
LIMIT = 0.45  # at which images differ in what is computed for them


def judged(folder: Path, workers: Workers = ALONE, timing_rounds: int = 0) -> list[dict[str, Any]]:
    pipeline = load("digits")
    policy = TeaCachePolicy(LIMIT, (1.0, 0.0), (0.0, 10.0))
    adaptive = Schedule("teacache", {}, survey(pipeline.transformer), Target(), STEPS, policy=policy)
    schedules = [("plan", schedule(pipeline, Rule("skip", "C.C.C."))), ("policy", adaptive)]
    uncached, results, fewer = evaluate(
        pipeline,
        schedules,
        CONDITIONS,
        sampling=Sampling(STEPS),
        timing_rounds=timing_rounds,
        references=folder / "references",
        judges={"sum": lambda images: float(np.cumsum(images.mean(axis=(1, 2, 3)))[-1])},
        progress=False,
        workers=workers,
    )
    return [
        {
            **result.to_json(),
            "computed_each": list(result.computed_each),
            "mean": result.images.mean(axis=(1, 2, 3)).tolist(),
        }
        for result in (uncached, *results, *fewer)
    ]


def share(rank: int, folder: Path) -> None:
    workers = Workers(rank, distributed.get_world_size())
    first = judged(folder, workers)
    evaluation.write = None  # type: ignore[assignment, attr-defined] # of this process: uncached images are not made again
    said = [first, judged(folder, workers, timing_rounds=1)]
    (folder / f"{rank}.json").write_text(json.dumps(said))


def test_workers_judge_what_one_process_would(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone = judged(tmp_path / "alone")
    assert len(set(alone[2]["computed_each"])) > 1
    assert run(share, 2, tmp_path, tmp_path / "meeting") == ["done", "done"]
    for rank in range(2):
        first, again = json.loads((tmp_path / f"{rank}.json").read_text())
        for want, found, timed in zip(alone, first, again, strict=True):
            assert (timed.pop("speedup") is None) == (rank > 0)  # one times, undisturbed
            found.pop("speedup")
            assert found == timed  # by the uncached images that were kept
            for name in found:
                exact = name == "schedule" or want[name] is None
                assert found[name] == (want[name] if exact else pytest.approx(want[name], rel=1e-3, abs=1e-4)), name
    assert len(list((tmp_path / "references").iterdir())) == 1
