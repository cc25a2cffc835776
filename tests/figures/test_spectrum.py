from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dicache.cli import main
from dicache.evaluate.spectrum import radial_error, radial_log_magnitude
from dicache.figures.palette import AMBER, BLUE, INK
from dicache.figures.spectrum import error_spectra, spectra
from dicache.models.images import save_png


def noise(seed: int, count: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 16, 16, 3))


def test_the_left_panel_has_the_means_and_the_right_one_what_is_apart_from_the_first() -> None:
    one, two = noise(0), noise(1) * 0.5 + 0.25
    whole, apart = spectra([("uncached", one), ("deep", two)]).axes
    (_, first), (_, second) = radial_log_magnitude(one), radial_log_magnitude(two)
    assert [line.get_label() for line in whole.lines] == ["uncached", "deep"]
    assert whole.lines[1].get_ydata() == pytest.approx(second.mean(axis=0))
    assert apart.lines[1].get_ydata() == pytest.approx((second - first).mean(axis=0))
    assert apart.get_ylabel() == "more (+) or less (-) than uncached"


def test_the_same_images_are_not_apart() -> None:
    _, apart = spectra([("uncached", noise(0)), ("again", noise(0))]).axes
    assert np.abs(apart.lines[1].get_ydata()).max() == 0


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'b' have the shape \(4, 16, 16, 3\), those of 'a' \(5, 16, 16, 3\)"):
        spectra([("a", noise(0)), ("b", noise(1, 4))])
    with pytest.raises(ValueError, match="found 1 sets of images; needed 2 to"):
        spectra([("a", noise(0))])


def run(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["plot", "spectrum", *map(str, words)])
    return result.exit_code, result.output


def test_the_command_draws_folders_of_images(tmp_path: Path) -> None:
    for name in ("uncached", "deep", "fewer"):
        for number, image in enumerate(noise(len(name))):
            save_png(image, tmp_path / name / f"{number:04}.png")
    picture = tmp_path / "spectrum.png"
    assert run(*(tmp_path / name for name in ("uncached", "deep", "fewer")), "-o", picture) == (0, f"Wrote {picture}\n")
    assert picture.stat().st_size > 10_000

    (tmp_path / "deep" / "0004.png").rename(tmp_path / "deep" / "0005.png")
    code, told = run(tmp_path / "uncached", tmp_path / "deep", "-o", picture)
    assert code == 1
    assert "0004.png is in only one of" in told
    (tmp_path / "deep" / "0005.png").write_bytes(b"no picture")
    assert "0005.png cannot be read as an image" in run(tmp_path / "uncached", tmp_path / "deep", "-o", picture)[1]
    assert "holds no PNG images" in run(tmp_path / "none", tmp_path / "uncached", "-o", picture)[1]
    assert run(tmp_path / "uncached", "-o", picture)[0] == 2


def test_images_of_two_sizes_in_a_folder_are_refused(tmp_path: Path) -> None:
    save_png(np.zeros((16, 16, 3)), tmp_path / "a" / "0.png")
    save_png(np.zeros((16, 20, 3)), tmp_path / "a" / "1.png")
    assert (
        "1.png is 20 x 16 pixels, the first of its folder 16 x 16"
        in run(tmp_path / "a", tmp_path / "a", "-o", tmp_path / "x.png")[1]
    )


def test_a_set_has_the_colour_of_the_method_that_its_name_tells_of() -> None:
    whole, _ = spectra([("uncached", noise(0)), ("deep", noise(1)), ("teacache", noise(2))]).axes
    assert [line.get_color() for line in whole.lines] == [INK, BLUE, AMBER]


def test_the_difference_is_drawn_at_each_frequency_as_the_median_over_the_images() -> None:
    one, two = noise(0), noise(1)
    (axes,) = error_spectra([("uncached", one), ("deep", two)]).axes
    (line,) = axes.lines
    assert line.get_ydata() == pytest.approx(np.median(radial_error(two, one)[1], axis=0))
    with pytest.raises(ValueError, match="found 1 sets of images; needed 2 to 7"):
        error_spectra([("uncached", one)])
