import io

import numpy as np
import pytest
from PIL import Image

from dicache.figures import image_grid
from tests.figures import drawn

RANDOM = np.random.default_rng(0)


def test_every_image_is_drawn_in_its_row_and_column() -> None:
    before, after = RANDOM.random((3, 8, 8, 3)), RANDOM.random((3, 8, 8, 3))
    figure = image_grid([("uncached", before), ("cached", after)], captions=["0", "1", "2"])
    images = np.stack([drawn.table(axes) for axes in figure.axes])
    np.testing.assert_allclose(images, np.concatenate([before, after]))
    assert [text.get_text() for text in figure.texts] == ["uncached", "cached"]
    assert [axes.get_title() for axes in figure.axes] == ["0", "1", "2", "", "", ""]
    tops = [axes.get_position().y1 for axes in figure.axes]
    assert tops[0] == tops[2] > tops[3]


def test_each_pixel_of_a_small_image_is_a_square_of_one_colour() -> None:
    small = RANDOM.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    figure = image_grid([("a", small / 255)])
    file = io.BytesIO()
    figure.savefig(file, format="png")
    page = np.asarray(Image.open(file).convert("RGB"))
    box = figure.axes[0].get_window_extent()
    left, top, width = round(box.x0), round(len(page) - box.y1), round(box.width)
    assert width % 32 == 0
    np.testing.assert_array_equal(
        page[top : top + width, left : left + width], small[0].repeat(width // 32, 0).repeat(width // 32, 1)
    )


@pytest.mark.parametrize(
    ("rows", "captions", "message"),
    [
        ([], None, "no images to draw"),
        ([("a", np.zeros((2, 4, 4)))], None, r"shape \(2, 4, 4\); needed \(n, height, width, 3\)"),
        ([("a", np.zeros((2, 4, 4, 3))), ("b", np.zeros((1, 4, 4, 3)))], None, "'b' have the shape"),
        ([("a", np.full((1, 4, 4, 3), 255))], None, "divide 8-bit values by 255"),
        ([("a", np.full((1, 4, 4, 3), np.nan))], None, r"must lie in \[0, 1\]"),
        ([("a", np.zeros((2, 4, 4, 3)))], ["x"], "1 captions for 2 columns"),
    ],
)
def test_images_that_cannot_be_compared_are_an_error(
    rows: list[tuple[str, np.ndarray]], captions: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        image_grid(rows, captions)
