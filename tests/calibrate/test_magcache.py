import numpy as np
import pytest

from dicache.calibrate import CalibrationError
from dicache.calibrate.magcache import MagCache, simulate
from dicache.calibrate.methods import METHODS
from dicache.profiler import Profile
from tests.calibrate.profiled import profile
from tests.toys import written

# Published for FLUX in 28 steps.
FLUX = [
    *(1, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562),
    *(1.00781, 1, 1.00781, 1, 1.00781, 1, 1, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062),
]


def measured(*ratios: list[float], runs: int = 1) -> Profile:
    """Return a profile in which each guidance pass has these ratios."""
    table = np.array(ratios, dtype=float)
    table[:, 0] = np.nan
    magnitude = np.stack([np.stack([table, table, table], axis=-1)] * runs)  # (runs, contexts, steps, 3)
    names = tuple(f"pass{c}" for c in range(len(ratios)))
    return profile(written(2), {"magnitude": magnitude}, steps=table.shape[1], contexts=names, parts=(1,) * len(ratios))


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        (MagCache(0.24, 5, 0.1, (11,)), [0, 1, 2, 5, 9, 11, 17, 23, 26]),  # the released code's
        (MagCache(0.24, 5, 0.1), [0, 1, 2, 5, 9, 15, 21, 26]),
        (MagCache(0.06, 3, 0.2), [*range(6), 7, 9, 13, 17, 21, 24, 26, 27]),  # diffusers' defaults
    ],
)
def test_the_computed_steps_for_flux_are_the_published_ones(settings: MagCache, computed: list[int]) -> None:
    schedule = settings.calibrate(measured(FLUX, runs=2))
    assert schedule.plan is not None
    assert list(schedule.plan.computed_steps) == computed
    assert set(schedule.table().values()) == {"".join("C" if i in computed else "S" for i in range(28))}


def test_the_error_is_of_the_product_and_adds_up() -> None:
    # Ratios of 1.1: |1 - 1.1| = 0.1, then |1 - 1.21| = 0.21, 0.31 in all.
    assert simulate([1.1] * 7, threshold=0.30, max_skip=9, retention=0) == "C.C.C.C"
    assert simulate([1.1] * 7, threshold=0.32, max_skip=9, retention=0) == "C..C..C"
    assert simulate([1.0] * 7, threshold=0.1, max_skip=2, retention=0) == "C..C..C"
    assert simulate([1.0] * 7, threshold=0.1, max_skip=9, retention=0.5) == "CCCC..."


def test_a_step_that_was_not_measured_is_computed_and_spoils_none_after_it() -> None:
    assert simulate([np.nan, 1.0, np.nan, 1.0, 1.0], threshold=0.1, max_skip=9, retention=0) == "C.C.."


def test_each_guidance_pass_has_its_own_plan_unless_they_agree() -> None:
    still, moving = [1.0] * 5, [1.0, 1.5, 1.5, 1.5, 1.5]
    schedule = MagCache(0.1, 4, 0).calibrate(measured(still, moving))
    assert schedule.contexts == ("pass0",)
    assert schedule.table("pass0")["0.attn"] == "CSSSS"
    assert schedule.table("pass1")["0.attn"] == "CCCCC"
    assert MagCache(0.1, 4, 0).calibrate(measured(still, still)).contexts == ()
    assert schedule.measured["ratios"]["pass1"] == [None, 1.5, 1.5, 1.5, 1.5]
    assert METHODS["magcache"] is MagCache


def test_wrong_settings_are_refused_with_what_is_needed() -> None:
    with pytest.raises(CalibrationError, match="threshold must be a number of 0 or more, found nan"):
        MagCache(float("nan"))
    with pytest.raises(CalibrationError, match="found -1"):
        MagCache(max_skip=-1)
    with pytest.raises(CalibrationError, match="share of the steps from 0 to 1, found 2"):
        MagCache(retention=2)
    with pytest.raises(CalibrationError, match="there is no step 9; the steps are 0-4"):
        MagCache(never_skip=(9,)).calibrate(measured([1.0] * 5))
    with pytest.raises(CalibrationError, match="no run that did not fail"):
        MagCache().calibrate(profile(written(2), {"magnitude": np.ones((0, 1, 5, 3))}, steps=5))
