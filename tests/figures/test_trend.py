from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from dicache.figures.trend import shared_change, trend_maps
from dicache.profiler import Profile, ProfileError
from tests.figures.drawn import table
from tests.figures.synthetic import profile


def measured(outputs: np.ndarray) -> Profile:
    """Return a profile of runs whose only block gave these outputs in both branches, (r, s, numbers)."""
    runs, steps = outputs.shape[:2]
    known = profile(np.ones((runs, 1, steps, 1)))
    norm2 = (outputs**2).sum(axis=-1)[:, None, :, None, None].repeat(2, axis=3)
    dot = np.full_like(norm2, np.nan)
    dot[:, :, 1:] = (outputs[:, 1:] * outputs[:, :-1]).sum(axis=-1)[:, None, :, None, None]
    return replace(known, arrays={**known.arrays, "sites/norm2": norm2, "sites/dot": dot})


def means(outputs: np.ndarray, steps: Sequence[int] | None = None) -> tuple[tuple[int, ...], np.ndarray]:
    every = range(outputs.shape[1]) if steps is None else steps
    return tuple(every), outputs.mean(axis=0)[None, list(every), None]  # one pass, one token


def test_runs_that_change_alike_share_all_of_it_and_the_trend_leaves_nothing() -> None:
    start = np.random.default_rng(0).normal(size=(3, 1, 8))
    outputs = start + np.array([0.0, 1.0, 3.0])[None, :, None]
    share, change, left = shared_change(measured(outputs), lambda _: means(outputs), "mlp")
    assert np.asarray(share[:, 1:]) == pytest.approx(np.ones((1, 2)))
    assert np.ma.getmaskarray(share)[:, 0].all()  # nothing before it
    assert change[1:] ** 2 == pytest.approx(
        [8 / (outputs[:, 1] ** 2).sum(-1).mean(), 32 / (outputs[:, 2] ** 2).sum(-1).mean()]
    )
    assert left[1:] == pytest.approx([0, 0], abs=1e-6)


def test_runs_that_have_nothing_in_common_share_nothing_whatever_their_number() -> None:
    for runs in (2, 20):
        outputs = np.random.default_rng(1).normal(size=(runs, 2, 4000))
        share, change, left = shared_change(measured(outputs), lambda _, o=outputs: means(o), "attn")  # type: ignore[misc]
        assert share[0, 1] == pytest.approx(0, abs=0.05)
        assert left[1] == pytest.approx(change[1], rel=0.03)


def test_the_maps_show_the_shares_and_the_lines_what_is_left() -> None:
    outputs = np.random.default_rng(0).normal(size=(3, 1, 8)) + np.array([0.0, 1.0, 3.0])[None, :, None]
    attn, line, *_ = trend_maps(measured(outputs), lambda _: means(outputs)).axes
    assert attn.get_title(loc="left") == "attn"
    assert np.asarray(table(attn)[:, 1:]) == pytest.approx(np.ones((1, 2)))
    assert np.asarray(line.lines[1].get_ydata())[1:] == pytest.approx([0, 0], abs=1e-6)


def test_means_of_some_steps_only_and_a_single_run_are_refused() -> None:
    outputs = np.random.default_rng(0).normal(size=(3, 3, 8))
    with pytest.raises(ProfileError, match=r"mean outputs of 0.attn at 2 of 3 steps; profile with --priors"):
        trend_maps(measured(outputs), lambda _: means(outputs, [0, 1]))
    with pytest.raises(ProfileError, match="one run, which has nothing in common with another"):
        trend_maps(measured(outputs[:1]), lambda _: means(outputs))
