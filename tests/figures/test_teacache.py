from dataclasses import replace

import numpy as np
import pytest

from dicache.calibrate.teacache_published import published
from dicache.figures import teacache_fit
from dicache.profiler import Profile, ProfileError
from dicache.schedules import Rule
from tests.figures import drawn, synthetic

INPUT = np.array([[[0.1, 0.2, 0.4]], [[0.3, 0.4, 0.8]]])  # (2 runs, 1 context, 4 steps - 1)


def known() -> Profile:
    changes = {"input": INPUT, "output": 2 * INPUT, "residual": 3 * INPUT, "body": 4 * INPUT}
    return synthetic.profile(np.full((2, 1, 4, 2), 0.9), changes=changes)


@pytest.mark.parametrize(("output", "factor"), [("output", 2), ("residual", 3), ("body", 4)])
def test_a_point_is_a_step_of_a_run(output: str, factor: int) -> None:
    scatter = teacache_fit(known(), output=output).axes[0]
    np.testing.assert_allclose(drawn.points(scatter), np.stack([INPUT.ravel(), factor * INPUT.ravel()], axis=1))
    np.testing.assert_array_equal(np.asarray(scatter.collections[0].get_array()), [1, 2, 3, 1, 2, 3])
    assert scatter.get_xlabel() == "relative L1 change of the modulated input"


def test_what_is_not_finite_has_no_point() -> None:
    changes = {"input": INPUT.copy(), "output": 2 * INPUT}
    changes["input"][0, 0, 0] = np.inf
    scatter = teacache_fit(synthetic.profile(np.ones((2, 1, 4, 2)), changes=changes)).axes[0]
    assert len(drawn.points(scatter)) == 5


def test_the_polynomial_is_drawn_over_its_range_and_held_outside() -> None:
    # p(x) = 2 x - 0.5 on [0.2, 0.5]: negative, so zero, up to 0.25.
    scatter = teacache_fit(known(), synthetic.teacache(4, (2.0, -0.5), (0.2, 0.5))).axes[0]
    inside, below, above = scatter.lines
    x, y = np.asarray(inside.get_xdata()), np.asarray(inside.get_ydata())
    assert (x[0], x[-1]) == (0.2, 0.5)
    np.testing.assert_allclose(y, np.maximum(2 * x - 0.5, 0), atol=1e-12)
    assert inside.get_label() == "polynomial of degree 1"
    assert set(np.asarray(below.get_ydata()).tolist()) == {0.0}
    assert set(np.asarray(above.get_ydata()).tolist()) == {0.5}
    low, high = (patch.get_extents().transformed(scatter.transData.inverted()) for patch in scatter.patches)
    assert low.x1 == pytest.approx(0.2)
    assert high.x0 == pytest.approx(0.5)


def test_along_the_steps_the_median_and_the_quartiles_of_the_runs_are_drawn() -> None:
    along = teacache_fit(known()).axes[1]
    for line, factor, name in zip(along.lines, (1, 2), ("modulated input", "model's output"), strict=True):
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(np.asarray(line.get_ydata()), factor * np.array([0.2, 0.3, 0.6]))
    band = along.collections[0].get_paths()[0].vertices
    at_one = np.asarray(band)[np.asarray(band)[:, 0] == 1][:, 1]
    assert at_one.min() == pytest.approx(0.15)  # between 0.1 and 0.3
    assert at_one.max() == pytest.approx(0.25)


def test_a_schedule_without_a_polynomial_is_an_error() -> None:
    with pytest.raises(ValueError, match="fora has no polynomial"):
        teacache_fit(known(), synthetic.planned("fora", 2, Rule("reuse", "C.C.")))


def test_only_an_output_can_be_foretold() -> None:
    with pytest.raises(ValueError, match="residual, body, output; found 'input'"):
        teacache_fit(known(), output="input")


def test_a_profile_without_the_signals_is_an_error() -> None:
    with pytest.raises(ProfileError, match="no signal 'input'"):
        teacache_fit(synthetic.profile(np.ones((2, 1, 4, 2))))


def test_a_published_polynomial_is_drawn_over_the_points_of_its_signal() -> None:
    profile = known()
    provenance = replace(profile.provenance, time_signals=("time",))
    timed = {**profile.arrays, "teacache/time": profile.arrays["teacache/residual"]}  # 3 INPUT
    figure = teacache_fit(replace(profile, provenance=provenance, arrays=timed), published=published("wan2.1-i2v-480p"))
    scatter = figure.axes[0]
    np.testing.assert_allclose(drawn.points(scatter), np.stack([3 * INPUT.ravel(), 2 * INPUT.ravel()], axis=1))
    assert scatter.get_xlabel() == "relative L1 change of the time embedding"
    policy = published("wan2.1-i2v-480p").policy(0.0)
    inside = scatter.lines[0]
    assert inside.get_label() == "published for wan2.1-i2v-480p"
    x, y = np.asarray(inside.get_xdata()), np.asarray(inside.get_ydata())
    assert (x[0], x[-1]) == pytest.approx(policy.input_range)
    np.testing.assert_allclose(y, [policy.rescale(value) for value in x])


def test_one_that_is_held_far_beyond_the_points_does_not_widen_the_picture() -> None:
    scatter = teacache_fit(known(), published=published("flux")).axes[0]
    assert scatter.get_xlim()[1] < 0.9  # flux is held in [0, 1]; the points end at 0.8
    assert np.asarray(scatter.lines[0].get_xdata())[-1] == pytest.approx(scatter.get_xlim()[1])
