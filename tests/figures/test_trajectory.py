from dataclasses import replace

import numpy as np
import pytest

from dicache.evaluate.evaluation import Result
from dicache.evaluate.quality import Mean
from dicache.figures import FigureError
from dicache.figures.palette import AMBER, BLUE
from dicache.figures.trajectory import drift

RESULT = Result(
    name="teacache-2x",
    steps=3,
    computed_steps=2,
    macs_fraction=0.7,
    speedup=None,
    psnr=Mean(30.25, 29, 31),
    ssim=Mean(0.9, 0.8, 1.0),
    latent_error=(0.0, 0.1, 0.2),
    images=np.zeros((2, 8, 8, 3)),
)


def test_each_result_is_a_line_with_its_psnr_and_the_colour_of_its_method() -> None:
    figure = drift([RESULT, replace(RESULT, name="deep"), replace(RESULT, name="shallow")])
    (axes,) = figure.axes
    teacache, _, _ = axes.lines
    assert np.asarray(teacache.get_xydata()).tolist() == [[0, 0], [1, 0.1], [2, 0.2]]
    assert teacache.get_label() == "teacache-2x (30.2 dB)"
    assert teacache.get_color() == AMBER
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--", "-."]
    assert BLUE not in [line.get_color() for line in axes.lines[1:]]


def test_what_cannot_be_compared_or_told_apart_is_refused() -> None:
    with pytest.raises(FigureError, match="11 steps took other steps than the uncached run; leave it out"):
        drift([RESULT, replace(RESULT, name="11 steps", latent_error=())])
    with pytest.raises(FigureError, match="found 7 results; needed 1 to 6"):
        drift([RESULT] * 7)
