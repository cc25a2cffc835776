"""Successive halving: who is stopped, and that it is not who would have been the best."""

import math

import numpy as np
import pytest

from dicache.calibrate.halving import RIVALS, beaten_by, rungs
from dicache.calibrate.judging import Score


def score(each: "list[float] | np.ndarray", macs: float = 0.5) -> Score:
    return Score(float(np.mean(each)), macs, tuple(float(value) for value in each))


def test_runs_are_doubled_from_two_or_three() -> None:
    assert rungs(8) == (2, 4, 8)
    assert rungs(50) == (3, 6, 12, 25, 50)
    assert (rungs(1), rungs(3), rungs(4)) == ((1,), (3,), (2, 4))


def test_who_is_behind_by_three_standard_errors_is_stopped() -> None:
    rivals = [score([40.0 + k + (-1) ** run for run in range(8)]) for k in range(3)]
    rivals.append(score([42.0 + 1.0 * (-1) ** (run // 2) for run in range(8)]))
    best, each = rivals[2], rivals[2].each
    usual = np.median([np.std(np.subtract(rival.each, each), ddof=1) for rival in rivals])
    assert usual == 0  # the differences of the first three are the same in all runs
    found = beaten_by(score([each[0] - 0.1, each[1] - 0.1]), rivals)
    assert found is not None
    assert found[0] == best
    assert found[1] == pytest.approx(best.psnr - 0.1)
    # a spread of 1 dB between two runs, of 8: an error of sqrt(6 / 16)
    spread = math.sqrt(6 / 16) * 3
    mine = np.array([each[0] + math.sqrt(0.5), each[1] - math.sqrt(0.5)])
    assert beaten_by(score(mine - spread - 0.01), rivals) is not None
    assert beaten_by(score(mine - spread + 0.01), rivals) is None


def test_who_is_cheaper_or_has_few_rivals_is_not_stopped() -> None:
    rivals = [score([40.0] * 8) for _ in range(RIVALS)]
    assert beaten_by(score([30.0, 30.0], 0.5), rivals) is not None
    assert beaten_by(score([30.0, 30.0], 0.49), rivals) is None
    assert beaten_by(score([30.0, 30.0], 0.6), rivals[1:]) is None


def test_the_best_of_many_is_hardly_ever_stopped_and_most_of_the_others_are() -> None:
    random = np.random.default_rng(0)
    lost, spent, judged, whole = 0, 0, 0, 0
    for _ in range(60):
        quality = random.normal(35, 2, 60)
        runs = random.normal(0, 3, 8)
        all_scores = [score(q + runs + random.normal(0, 0.8, 8)) for q in quality]
        kept: list[Score] = []
        for trial in all_scores:
            for count in rungs(8):
                if count == 8:
                    kept.append(trial)
                elif beaten_by(score(list(trial.each[:count])), kept):
                    break
            spent += count
            whole += 8
        judged += len(kept)
        lost += max(all_scores, key=lambda s: s.psnr) not in kept
    assert lost <= 1
    assert spent / whole < 0.55
