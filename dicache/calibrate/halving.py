"""Successive halving over runs: a trial is judged on a few of them first, and only what stands its ground on more."""

from collections.abc import Sequence

import numpy as np

from dicache.calibrate.judging import Score

FEWEST = 2  # runs that a trial is ever stopped after: of one nothing is known of how much a difference varies
RIVALS = 4  # fully judged trials before any is stopped: their differences are what tells noise
CERTAIN = 3.0  # standard errors by which a trial has to be behind
EXACT = 1e-6  # dB that rounding may make between two runs of the same


def rungs(runs: int) -> tuple[int, ...]:
    """Return the numbers of runs after which a trial may be stopped, and all of them last: 2, 4, 8 of 8."""
    counts = [runs]
    while counts[0] // 2 >= FEWEST:
        counts.insert(0, counts[0] // 2)
    return tuple(counts)


def beaten_by(score: Score, rivals: Sequence[Score]) -> tuple[Score, float] | None:
    """Return a rival that is better at no higher cost by more than noise, and the PSNR to expect of the trial, in dB.

    Both are compared run by run. What is sought is the mean over all N runs, of which the trial was judged on n, so
    that all that is not known yet is the other N - n: the difference d of the means over all of them is expected to be
    that over the n, with a standard error of s sqrt((N - n) / (n N)). The trial is stopped where d is below zero by
    more than three of them. s is the standard deviation of the difference from run to run: that on the n runs or, as
    few runs tell little of it, the usual one of the rival from the other rivals, whichever is larger.

    Args:
        score: On the first n runs, image by image.
        rivals: Judged on all N runs.
    """
    if len(rivals) < RIVALS:
        return None
    n, total = len(score.each), len(rivals[0].each)
    mine, theirs = np.array(score.each), np.array([rival.each for rival in rivals])  # (n,), (rivals, N)
    behind: list[tuple[float, Score, float]] = []
    for rival, each in zip(rivals, theirs, strict=True):
        if rival.macs_fraction > score.macs_fraction:
            continue
        difference = mine - each[:n]
        usual = float(np.median((theirs - each).std(axis=1, ddof=1)))
        spread = max(float(difference.std(ddof=1)), usual)
        error = spread * np.sqrt((total - n) / (n * total))
        lead = float(difference.mean()) + CERTAIN * float(error)
        if lead < -EXACT:
            behind.append((lead, rival, rival.psnr + float(difference.mean())))
    if not behind:
        return None
    _, rival, expected = min(behind, key=lambda found: found[0])
    return rival, expected
