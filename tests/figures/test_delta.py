import numpy as np
import pytest

from dicache.figures import delta_map
from dicache.profiler import ProfileError
from tests.figures import drawn, synthetic

NAN = np.nan


def test_a_cell_is_the_mean_over_runs_and_passes_of_one_block_at_one_step() -> None:
    cosine = np.full((2, 2, 3, 2), 0.5)  # runs, contexts, steps, blocks
    cosine[:, :, 0] = NAN
    cosine[:, :, 1, 0] = [[0.2, 0.4], [0.6, 0.8]]
    figure = delta_map(synthetic.profile(cosine))
    cells = drawn.table(figure.axes[0])
    assert cells.shape == (2, 3)  # blocks down, steps across
    assert cells.mask.tolist() == [[True, False, False]] * 2
    np.testing.assert_allclose(cells[:, 1:], [[0.5, 0.5], [0.5, 0.5]])
    assert figure.axes[0].yaxis.get_inverted()  # block 0 at the top


def test_the_block_and_the_step_are_not_swapped() -> None:
    cosine = np.full((1, 1, 3, 2), 0.9)
    cosine[:, :, 0] = NAN
    cosine[:, :, 2, 1] = 0.3
    cells = drawn.table(delta_map(synthetic.profile(cosine)).axes[0])
    assert cells[1, 2] == pytest.approx(0.3)
    assert cells[0, 2] == cells[1, 1] == pytest.approx(0.9)


def test_a_run_that_has_a_gap_does_not_hide_the_others() -> None:
    cosine = np.full((2, 1, 2, 1), 0.8)
    cosine[0, 0, 1, 0] = NAN
    cells = drawn.table(delta_map(synthetic.profile(cosine)).axes[0])
    assert cells[0, 1] == pytest.approx(0.8)


def test_labels_say_what_is_seen_and_on_what() -> None:
    figure = delta_map(synthetic.profile(np.full((3, 2, 4, 2), 0.9)))
    axes, bar = figure.axes
    assert axes.get_xlabel() == "step (0 = noisiest)"
    assert axes.get_ylabel() == "block (0 = first)"
    assert bar.get_ylabel() == "cosine with the step before"
    heading = " ".join(text.get_text() for text in figure.texts)
    assert "delta" in heading
    assert "digits, 4 steps of DDIMScheduler, mean of 3 runs and 2 guidance passes" in heading


def test_one_outlier_does_not_take_the_colours_from_the_rest_and_the_bar_says_so() -> None:
    cosine = np.linspace(0.9, 1.0, 10 * 10).reshape(1, 1, 10, 10)
    cosine[0, 0, 5, 5] = -0.5
    figure = delta_map(synthetic.profile(cosine))
    assert drawn.colour_limits(figure.axes[0]) == pytest.approx((0.9, 1), abs=0.01)
    colour_bar = figure.axes[0].images[0].colorbar
    assert colour_bar is not None
    assert colour_bar.extend == "min"


def test_an_even_spread_is_drawn_whole() -> None:
    figure = delta_map(synthetic.profile(np.linspace(0.5, 1.0, 25).reshape(1, 1, 5, 5)))
    assert drawn.colour_limits(figure.axes[0]) == (0.5, 1)
    colour_bar = figure.axes[0].images[0].colorbar
    assert colour_bar is not None
    assert colour_bar.extend == "neither"


def test_deltas_that_never_change_still_have_a_colour() -> None:
    low, high = drawn.colour_limits(delta_map(synthetic.profile(np.ones((1, 1, 3, 2)))).axes[0])
    assert low < high == 1


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ProfileError, match="none of the 0 runs"):
        delta_map(synthetic.profile(np.ones((0, 1, 3, 2))))
    with pytest.raises(ProfileError, match="the one before"):
        delta_map(synthetic.profile(np.full((1, 1, 1, 2), NAN)))
