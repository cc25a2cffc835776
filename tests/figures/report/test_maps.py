import re

import numpy as np

from dicache.figures.report.maps import LEVELS, Colours, blocks_axis, heat_map, steps_axis, strip
from dicache.figures.report.plots import Scale, cells


def test_the_brightest_colour_is_at_the_end_that_is_good_and_what_is_absent_has_none() -> None:
    values = np.ma.masked_invalid([np.nan, 0.5, 0.75, 1.0, 0.1])
    assert Colours(0.5, 1, "high", "").levels(values).tolist() == [-1, 0, (LEVELS - 1) / 2 + 0.5, LEVELS - 1, 0]
    assert Colours(0.5, 1, "low", "").levels(values).tolist() == [-1, LEVELS - 1, (LEVELS - 1) / 2 + 0.5, 0, LEVELS - 1]


def test_a_row_of_cells_of_one_colour_is_one_rectangle_in_its_place() -> None:
    values = np.ma.masked_invalid([[np.nan, 1.0, 1.0], [0.0, 1.0, 0.0]])
    made = heat_map("it", "A map", values, blocks_axis(2), steps_axis(3), Colours(0, 1, "high", ""))
    assert re.findall(r'<path d="([^"]*)" fill="([^"]*)"', made) == [
        ("M0 1h1v1h-1zM2 1h1v1h-1z", "#440154"),
        ("M1 0h2v1h-2zM1 1h1v1h-1z", "#fde724"),
    ]
    assert re.findall(r"<td>([^<]*)</td>", made) == ["none", "1", "1", "0", "1", "0"]


def test_a_strip_says_in_words_what_its_letters_mean() -> None:
    made = strip("it", "A strip", blocks_axis(2), ["CR", "CS"])
    said = ["computed", "output reused", "computed", "block skipped, its delta added"]
    assert re.findall(r"<td>([^<]*)</td>", made) == said
    assert '<path d="M0 0h1v1h-1zM0 1h1v1h-1z" class="computed"' in made


def test_ticks_are_in_the_middle_of_cells_and_no_more_than_can_be_read() -> None:
    assert cells(["0", "1"]) == [(0.25, "0"), (0.75, "1")]
    assert [text for _, text in cells([str(i) for i in range(50)])] == [
        "0",
        "5",
        "10",
        "15",
        "20",
        "25",
        "30",
        "35",
        "40",
        "45",
    ]


def test_a_scale_says_where_a_value_lies() -> None:
    assert Scale(2, 4)(3.0) == 0.5
    log = Scale(0.01, 1, log=True)
    assert np.isclose(log(0.1), 0.5)
    assert [text for _, text in log.ticks()] == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]


def test_a_scale_has_room_beside_what_it_is_made_for() -> None:
    scale = Scale.of(np.array([2.0, 4.0, np.nan]))
    assert (scale.low, scale.high) == (1.9, 4.1)
    from_zero = Scale.of(np.array([2.0, 4.0]), zero=True)
    assert (from_zero.low, from_zero.high) == (0.0, 4.2)
    log = Scale.of(np.array([0.01, 1.0, 0.0, np.nan]), log=True)
    assert 0.005 < log.low < 0.01
    assert 1 < log.high < 2
    constant = Scale.of(np.array([3.0, 3.0]))
    assert constant.low < 3 < constant.high
