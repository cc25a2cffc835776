from typing import Any

import pytest

from dicache.calibrate import CalibrationError
from dicache.calibrate.deepcache import DeepCache
from dicache.calibrate.delta_cache import DeltaCache
from dicache.calibrate.faster_diffusion import FasterDiffusion
from dicache.calibrate.methods import METHODS
from dicache.schedules import Plan, Rule
from tests.tiny import anatomy_of, unet
from tests.toys import written

# Three stages of two residual blocks; attention in the first two; a sampler behind the first two.
# 0 r 1 a 2 r 3 a 4 d | 5 r 6 a 7 r 8 a 9 d | 10 r 11 r | 12 r 13 a 14 r | 15 r 16 r 17 r 18 u | 19 r 20 a ... 25 u
SKIPPED = ("0-29", "2-27", "4-25", "5-22", "7-20", "9-18", "10-16", "11-15", "12-14")


@pytest.mark.parametrize(("branch", "blocks"), list(enumerate(SKIPPED)))
def test_a_branch_is_a_skip_connection(branch: int, blocks: str) -> None:
    plan = DeepCache(3, branch).plan(anatomy_of(unet), 8)
    assert plan.rules == (Rule("skip", "C..C..C.", blocks=blocks, predictor="feature"),)


def test_an_interval_of_one_computes_everything() -> None:
    assert DeepCache(1).plan(anatomy_of(unet), 5) == Plan(5)
    assert DeepCache(1, center=2).plan(anatomy_of(unet), 5) == Plan(5)
    assert METHODS["deepcache"] is DeepCache


@pytest.mark.parametrize(
    ("steps", "settings", "full"),
    [
        (50, {"interval": 5, "center": 15, "power": 1.4}, [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]),
        (
            50,
            {"interval": 3, "center": 15, "power": 1.4},
            [0, 3, 6, 8, 11, 13, 15, 17, 20, 22, 25, 28, 32, 35, 38, 42, 46],
        ),
        (50, {"interval": 10, "center": 10}, [0, 9, 16, 26, 38]),
        (20, {"interval": 4, "center": 6, "power": 1.4}, [0, 4, 6, 10, 15]),
    ],
)
def test_uneven_intervals_are_those_of_the_released_code(steps: int, settings: dict[str, Any], full: list[int]) -> None:
    # From the rule of the released code, run by itself.
    [rule] = DeepCache(**settings).plan(anatomy_of(unet), steps).rules
    assert [i for i, letter in enumerate(rule.steps) if letter == "C"] == full


def test_delta_cache_skips_what_is_inside_a_branch_whose_ends_have_one_shape() -> None:
    anatomy = anatomy_of(unet)
    assert DeltaCache(2, branch=1).plan(anatomy, 5).rules == (Rule("skip", "C.C.C", blocks="2-27"),)
    assert DeltaCache(2, blocks="2-27").plan(anatomy, 5) == DeltaCache(2, branch=1).plan(anatomy, 5)
    with pytest.raises(CalibrationError, match=r"found branch 2 \(blocks 4-25: what enters them is 8 x 8 x 8, .* 0, 1"):
        DeltaCache(2, branch=2).plan(anatomy, 5)
    with pytest.raises(CalibrationError, match=r"no deep blocks can be skipped; give a branch, 0, 1, 4, 5, 6, 7 or 8"):
        DeltaCache(2).plan(anatomy, 5)
    with pytest.raises(CalibrationError, match=r"blocks 0-5 .* what block 1 makes also enters block 28.* 2-27"):
        DeltaCache(2, blocks="0-5").plan(anatomy, 5)
    with pytest.raises(CalibrationError, match=r"either the blocks, found '3', or a U-Net's branch"):
        DeltaCache(2, blocks="3", branch=1)
    with pytest.raises(CalibrationError, match=r"Toy has none; take the blocks instead"):
        DeltaCache(2, branch=1).plan(written(4), 5)
    with pytest.raises(CalibrationError, match=r"faster-diffusion: blocks 0-15 of .* through a skip connection"):
        FasterDiffusion().plan(anatomy, 5)


def test_wrong_settings_are_refused_with_what_is_needed() -> None:
    anatomy = anatomy_of(unet)
    with pytest.raises(CalibrationError, match=r"1 .* or more, found 0"):
        DeepCache(0)
    with pytest.raises(CalibrationError, match=r"0 .the outermost. or more, found -1"):
        DeepCache(branch=-1)
    with pytest.raises(CalibrationError, match=r"found branch 9, needed one of .* 7 or 8"):
        DeepCache(branch=9).plan(anatomy, 10)
    with pytest.raises(CalibrationError, match=r"at most the 4 steps, found 5"):
        DeepCache(5).plan(anatomy, 4)
    with pytest.raises(CalibrationError, match=r"U-Net, and Toy has none; take fora or faster-diffusion"):
        DeepCache().plan(written(4), 10)
    with pytest.raises(CalibrationError, match=r"goes with a center, found 1.4 and center None"):
        DeepCache(power=1.4)
    with pytest.raises(CalibrationError, match=r"above 1 and goes with a center, found 1 and center 3"):
        DeepCache(center=3, power=1.0)
    with pytest.raises(CalibrationError, match=r"one of the steps 0 to 9, found 10"):
        DeepCache(center=10).plan(anatomy, 10)
    with pytest.raises(CalibrationError, match=r"no power gives 25 full steps of 50 around step 25"):
        DeepCache(2, center=25, power=1.4).plan(anatomy, 50)
