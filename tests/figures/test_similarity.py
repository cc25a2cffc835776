from dataclasses import replace

import numpy as np
import pytest

from dicache.figures import similarity_maps
from dicache.profiler import Profile, ProfileError
from tests.figures import drawn, synthetic

STEPS, BLOCKS = 4, 3


def known(lags: int) -> Profile:
    """attn repeats with cosine 0.9, mlp with 0.7; each lag more takes 0.1."""
    similarity = np.empty((2, 1, STEPS, BLOCKS, 2, lags))
    for lag in range(lags):
        similarity[..., 0, lag], similarity[..., 1, lag] = 0.9 - 0.1 * lag, 0.7 - 0.1 * lag
    return synthetic.profile(np.full((2, 1, STEPS, BLOCKS), 0.9), similarity)


@pytest.mark.parametrize("lag", [1, 2])
def test_each_branch_has_a_map_of_its_own_cosines(lag: int) -> None:
    figure = similarity_maps(known(lags=2), lag=lag)
    for axes, branch, cosine in zip(figure.axes, ("attn", "mlp"), (1.0 - 0.1 * lag, 0.8 - 0.1 * lag), strict=False):
        cells = drawn.table(axes)
        assert axes.get_title(loc="left") == branch
        assert cells.mask.tolist() == [[step < lag for step in range(STEPS)]] * BLOCKS
        np.testing.assert_allclose(cells[:, lag:], cosine)


def test_all_maps_share_one_colour_scale() -> None:
    figure = similarity_maps(known(lags=1))
    first, second = (drawn.colour_limits(axes) for axes in figure.axes[:2])
    assert first == second == pytest.approx((0.7, 1))


def test_with_one_lag_there_are_only_maps() -> None:
    figure = similarity_maps(known(lags=1))
    assert [bool(axes.images) for axes in figure.axes[:2]] == [True, True]
    assert len(figure.axes) == 3  # and the colour bar


def test_with_several_lags_each_has_a_line_of_means_over_the_blocks() -> None:
    figure = similarity_maps(known(lags=3))
    attn, mlp = figure.axes[2:4]
    assert [line.get_label() for line in attn.lines] == ["1 step before", "2 steps before", "3 steps before"]
    for axes, cosines in ((attn, (0.9, 0.8, 0.7)), (mlp, (0.7, 0.6, 0.5))):
        for lag, (line, cosine) in enumerate(zip(axes.lines, cosines, strict=True), start=1):
            values = np.asarray(line.get_ydata(orig=False))
            assert np.isnan(values).tolist() == [step < lag for step in range(STEPS)]
            np.testing.assert_allclose(values[lag:], cosine)
    assert attn.get_ylim() == mlp.get_ylim()


def test_a_block_without_the_branch_is_masked() -> None:
    both = known(lags=1)
    first, second, third = both.anatomy.blocks
    mixed = replace(both.anatomy, blocks=(first, replace(second, sites=second.sites[:1]), replace(third, sites=())))
    sites = {f"sites/{name}": both.sites[name][..., [0, 1, 2], :] for name in both.sites}  # 0.attn, 0.mlp, 1.attn
    profile = replace(both, provenance=replace(both.provenance, anatomy=mixed), arrays={**both.arrays, **sites})
    attn, mlp = similarity_maps(profile).axes[:2]
    assert np.ma.getmaskarray(drawn.table(attn))[:, 1].tolist() == [False, False, True]
    assert np.ma.getmaskarray(drawn.table(mlp))[:, 1].tolist() == [False, True, True]


def test_five_branches_take_two_rows_of_maps() -> None:
    branches = ("attn", "cross_attn", "joint_attn", "mlp", "fused")
    similarity = np.full((1, 1, STEPS, BLOCKS, 5, 2), 0.8)
    figure = similarity_maps(synthetic.profile(np.full((1, 1, STEPS, BLOCKS), 0.9), similarity, branches=branches))
    assert [axes.get_title(loc="left") for axes in figure.axes[:5]] == list(branches)
    assert all(len(axes.lines) == 2 for axes in figure.axes[5:10])


def test_a_lag_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(ProfileError, match="lag 4 was not measured"):
        similarity_maps(known(lags=3), lag=4)


def test_a_lag_as_long_as_the_run_is_an_error() -> None:
    with pytest.raises(ProfileError, match="nothing to compare"):
        similarity_maps(known(lags=4), lag=4)
