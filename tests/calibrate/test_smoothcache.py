import numpy as np
import pytest

from dicache.anatomy import Anatomy
from dicache.calibrate import CalibrationError
from dicache.calibrate.methods import METHODS
from dicache.calibrate.smoothcache import SmoothCache, branch_errors, scan
from dicache.profiler import Profile
from tests.calibrate.profiled import profile
from tests.toys import written

TWO = written(2)  # sites 0.attn, 0.mlp, 1.attn, 1.mlp


def measured(outputs: np.ndarray, lags: int, anatomy: Anatomy = TWO) -> Profile:
    """Return a profile of outputs with one element each, (runs, contexts, steps, sites)."""
    runs, contexts, steps, sites = outputs.shape
    diff = np.full((runs, contexts, steps, sites, lags), np.nan)
    for k in range(1, lags + 1):
        diff[:, :, k:, :, k - 1] = np.abs(outputs[:, :, k:] - outputs[:, :, :-k])
    size = np.repeat(np.abs(outputs)[..., None], lags, axis=-1)
    arrays = {"sites/diff_l1": diff, "sites/abs_l1": size, "sites/dot": diff, "sites/norm2": size}
    names = tuple(str(c) for c in range(contexts))
    return profile(anatomy, arrays, steps=steps, lags=lags, contexts=names, parts=(1,) * contexts)


def test_the_error_has_the_later_output_below() -> None:
    outputs = np.array([1.0, 2.0, 4.0, 5.0])[None, None, :, None].repeat(4, axis=3)
    errors = branch_errors(measured(outputs, lags=2))
    want = [[1 / 2, 2 / 4, 1 / 5, np.nan], [3 / 4, 3 / 5, np.nan, np.nan]]
    assert list(errors) == ["attn", "mlp"]
    np.testing.assert_allclose(errors["attn"], want)


def test_runs_and_passes_are_one_batch_and_the_blocks_are_averaged() -> None:
    outputs = np.ones((2, 2, 2, 4))
    outputs[0, 0, 1, 0] = 5.0  # of 0.attn: differences 4, 0, 0, 0 below 5 + 1 + 1 + 1; of 1.attn none
    errors = branch_errors(measured(outputs, lags=1))
    assert errors["attn"][0, 0] == pytest.approx((4 / 8 + 0) / 2)
    assert errors["mlp"][0, 0] == 0


def test_a_pass_that_was_left_out_at_a_step_does_not_count_there() -> None:
    outputs = np.ones((1, 2, 2, 4))
    outputs[0, 0, 1] = 2.0
    outputs[0, 1, 1] = np.nan
    assert branch_errors(measured(outputs, lags=1))["mlp"][0, 0] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("errors", "alpha", "letters"),
    [
        ([[0.1] * 7, [0.2] * 7, [0.3] * 7], 0.05, "CCCCCCC"),
        ([[0.1] * 7, [0.2] * 7, [0.3] * 7], 0.1, "C.C.C.C"),
        ([[0.1] * 7, [0.2] * 7, [0.3] * 7], 0.2, "C..C..C"),
        ([[0.1] * 7, [0.2] * 7, [0.3] * 7], 9.9, "C...C.C"),  # the last step is computed
        ([[0.9] * 7, [0.1] * 7], 0.2, "C..C..C"),  # only the farthest error is asked for
        ([[0.1, 0.9, 0.9, 0.1, 0.9, 0.9]], 0.2, "C.CC.C"),
    ],
)
def test_the_scan_takes_the_farthest_step_within_the_threshold(
    errors: list[list[float]], alpha: float, letters: str
) -> None:
    table = np.array(errors)
    for k in range(1, len(table) + 1):
        table[k - 1, table.shape[1] - k :] = np.nan
    assert scan(table, alpha) == letters


def test_each_kind_of_branch_has_a_plan_of_its_own() -> None:
    outputs = np.ones((1, 1, 5, 4))
    outputs[0, 0, :, 0::2] = (2.0 ** np.arange(5))[:, None]  # the attentions double: an error of 1/2
    schedule = SmoothCache(0.3).calibrate(measured(outputs, lags=3))
    assert schedule.table() == {"0.attn": "CCCCC", "0.mlp": "CRRRC", "1.attn": "CCCCC", "1.mlp": "CRRRC"}
    assert schedule.measured["lookahead"] == 3
    assert schedule.measured["smallest_error"] == {"attn": 0.5, "mlp": 0.0}
    assert METHODS["smoothcache"] is SmoothCache


def test_wrong_settings_and_a_profile_without_runs_are_refused() -> None:
    for alpha in (-0.1, float("nan")):
        with pytest.raises(CalibrationError, match="alpha must be a number of 0 or more, found"):
            SmoothCache(alpha)
    with pytest.raises(CalibrationError, match="no run that did not fail"):
        SmoothCache(0.1).calibrate(measured(np.ones((0, 1, 3, 4)), lags=1))
