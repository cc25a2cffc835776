"""What stands on the page, without a browser."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dicache.calibrate.rescale import held_out
from dicache.evaluate.evaluation import Replayed
from dicache.evaluate.references import Trajectory
from dicache.figures import FigureError
from dicache.figures.report import report, save
from dicache.figures.report.achieved import Ran, achieved, images
from dicache.figures.report.decided import schedules
from dicache.figures.report.fit import teacache
from dicache.figures.report.measured import held_errors, range_errors
from dicache.profiler import ProfileError
from dicache.schedules import Rule
from tests.figures import synthetic
from tests.figures.report import pages


def cells(table: str, page: str) -> list[list[str]]:
    """Return the texts of a table's rows, their names first."""
    body = page[page.index(f'id="{table}"') :].partition("<tbody>")[2].partition("</tbody>")[0]
    return [re.findall(r"<t[hd][^>]*>([^<]*)<", row) for row in body.split("</tr>")[:-1]]


def test_all_that_it_needs_is_in_it_and_what_stands_in_files_is_text() -> None:
    page = pages.page()
    assert len(page) < 300_000
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert not re.search(r"url\((?!data:)|@import|https?:", page)
    assert page.count("<script") == page.count("</script") == 1
    assert "<img src=x" not in page
    assert "&lt;script&gt;window.hacked" in page


def test_each_range_of_blocks_has_the_mean_of_its_errors() -> None:
    profile = pages.profile()
    errors = range_errors(profile)
    for first in range(3):
        for last in range(first, 3):
            assert errors[first, last] == pytest.approx(np.nanmean(profile.range_error(first, last + 1)))
    assert errors.mask.tolist() == [[False, False, False], [True, False, False], [True, True, False]]


def test_holding_a_residual_errs_by_how_far_it_is_from_the_later_one() -> None:
    gram = np.array([[[4.0, 2.0], [2.0, 1.0]]])  # residuals 2 and 1 in one direction
    profile = pages.profile()
    errors = held_errors(replace(profile, arrays={**profile.arrays, "body/gram": gram}))
    assert errors[0, 1] == 1.0
    assert errors.mask.tolist() == [[True, False], [True, True]]


def test_what_the_polynomial_leaves_is_of_runs_that_it_was_not_fitted_to() -> None:
    profile = pages.profile()
    x, y = profile.relative_l1("input"), profile.relative_l1("output")
    rows = cells("pairs", teacache(profile, ()).markup)
    assert len(rows) == x.size
    point, run, step, change, measured, foretold, left = rows[-1]
    assert (point, run, step) == (str(x.size - 1), "2", str(pages.STEPS - 1))
    assert (change, measured) == (f"{x[-1, -1, -1]:.4g}", f"{y[-1, -1, -1]:.4g}")
    expected = held_out(x, y).foretold[-1, -1, -1]
    assert (foretold, left) == (f"{expected:.4g}", f"{y[-1, -1, -1] - expected:.3g}")


def test_a_polynomial_of_a_schedule_is_drawn_and_judged_beside_the_fit() -> None:
    made = teacache(pages.profile(), [("mine", synthetic.teacache(pages.STEPS, (1.0, 0.0), (0.1, 0.5)))]).markup
    assert 'class="line other"' in made
    assert "mine, as it is" in made


def test_where_there_is_no_fit_it_says_why() -> None:
    profile = pages.profile()
    few = replace(profile, arrays={name: values[:1] for name, values in profile.arrays.items()})
    made = teacache(few, ()).markup
    assert "There is no fit: teacache: found 1 run in the profile, needed two or more" in made
    assert len(cells("along", made)) == pages.STEPS - 1


def test_what_is_not_foreseen_is_not_drawn() -> None:
    unknown = synthetic.teacache(pages.STEPS, (1.0, 0.0), (0.1, 0.5))
    made = schedules([("it", unknown)]).markup
    assert "<strong>it</strong> (teacache): decides at run time; what to expect is not known." in made
    assert "<svg" not in made


def test_where_branches_are_treated_differently_those_that_are_alike_are_one_row() -> None:
    made = schedules(pages.schedules()).markup
    assert [row[0] for row in cells("strip-0-0", made)] == ["attn 0-2", "mlp 0", "mlp 1-2"]
    assert [row[0] for row in cells("strip-1-0", made)] == ["0", "1", "2"]


def test_images_that_were_computed_alike_are_one_row_of_what_was_achieved() -> None:
    ran = pages.ran()
    made = achieved(pages.schedules(), ran).markup
    assert [row[0] for row in cells("achieved-0", made)] == ["planned", "every image, cond", "every image, uncond"]
    differing = replace(ran.cached[0], steps_each=({"0": "CC.C.C"}, {"0": "CCCC.C"}))
    made = achieved(pages.schedules(), replace(ran, cached=[differing, differing])).markup
    assert [row[0] for row in cells("achieved-0", made)] == ["planned", "image 0", "image 1"]
    numbers = re.findall(r"<td>([^<]*)</td>", made.partition("<tbody>")[2].partition("</tr>")[0])
    assert numbers[:4] == ["0.889", "0.800", "4", "4.5 (4 to 5)"]


def test_large_images_are_shown_smaller_and_videos_frame_by_frame() -> None:
    def made(uncached: np.ndarray) -> str:
        replayed = Replayed(Trajectory(uncached, np.empty(0)), 1.0, (6.0,), ({"0": "CCCCCC"},))
        return images(pages.schedules()[:1], Ran(("fox",), (0,), uncached, [replayed])).markup

    assert "1024 x 1024 pixels, shown at 50% of their size, compressed" in made(np.zeros((1, 1024, 1024, 3)))
    video = made(np.zeros((1, 9, 16, 16, 3)))
    assert "64 x 16 pixels, bit for bit. 4 frames of each" in video


def test_a_schedule_for_something_else_is_refused() -> None:
    other = synthetic.planned("fora", 2, Rule("reuse", "CC.C.C"))
    with pytest.raises(FigureError, match=r"it was made for the 4 sites of a \w+, found 6 of a"):
        report(pages.profile(), [("it", other)])


def test_a_profile_without_finished_runs_is_refused() -> None:
    profile = pages.profile()
    empty = replace(profile, arrays={name: values[:0] for name, values in profile.arrays.items()})
    with pytest.raises(ProfileError, match="none of the 4 runs"):
        report(empty)


def test_a_page_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    save("old", file)
    with pytest.raises(UnicodeEncodeError):
        save("new \ud800", file)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
