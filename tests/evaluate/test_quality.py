import numpy as np
import pytest

from dicache.evaluate.quality import mean_with_interval, paired_difference, precision_recall, psnr, ssim
from dicache.evaluate.timing import speedup


def test_psnr_of_an_error_of_a_tenth_is_twenty_decibels() -> None:
    reference = np.full((2, 8, 8, 3), 0.5)
    assert psnr(reference + np.array([0.1, 0.01])[:, None, None, None], reference) == pytest.approx([20, 40])


def test_identical_images_count_as_120_decibels() -> None:
    images = np.full((1, 8, 8, 3), 0.5)
    assert psnr(images, images) == pytest.approx([120])


def test_ssim_is_one_for_equal_images_and_falls_with_noise() -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(1, 32, 32, 3))
    noisy = [(images + rng.normal(scale=scale, size=images.shape)).clip(0, 1) for scale in (0.0, 0.1, 0.5)]
    values = [ssim(other, images)[0] for other in noisy]
    assert values[0] == pytest.approx(1)
    assert values[0] > values[1] > values[2]


def test_ssim_of_a_video_is_the_mean_of_its_frames() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.uniform(size=(2, 1, 3, 16, 16, 3))
    assert ssim(one, two)[0] == pytest.approx(ssim(one[0], two[0]).mean())


def test_the_interval_holds_the_mean_and_narrows_with_more_images() -> None:
    values = np.random.default_rng(0).normal(40, 2, size=400)
    few, many = mean_with_interval(values[:10]), mean_with_interval(values)
    assert few.low < few.mean < few.high
    assert many.high - many.low < few.high - few.low
    assert many.high - many.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)


def test_images_of_one_prompt_are_drawn_together() -> None:
    values = np.array([30.0, 30.0, 50.0, 50.0])
    together = mean_with_interval(values, prompts=["a", "a", "b", "b"])
    # Both draws of two prompts are the same one in half of all sets, so that the interval reaches to both ends.
    assert (together.mean, together.low, together.high) == (40, 30, 50)
    alone = mean_with_interval(np.repeat(values, 10))
    assert 30 < alone.low < alone.mean < alone.high < 50
    assert mean_with_interval(np.repeat(values, 10), prompts=["a"] * 40) == alone  # one prompt: its images are drawn


def test_a_prompt_with_more_images_weighs_more() -> None:
    values = np.array([10.0, 20.0, 20.0, 20.0])
    found = mean_with_interval(values, prompts=["a", "b", "b", "b"])
    assert (found.mean, found.low, found.high) == (17.5, 10, 20)
    assert mean_with_interval(values, prompts=list("abcd")) == mean_with_interval(values)
    with pytest.raises(ValueError, match="found 4 values and 2 prompts"):
        mean_with_interval(values, prompts=["a", "b"])


def test_a_constant_gain_is_certain_however_much_images_differ() -> None:
    others = np.random.default_rng(0).normal(40, 5, size=50)
    gain = paired_difference(others + 3, others, ["a", "b"] * 25)
    assert [gain.mean, gain.low, gain.high] == pytest.approx([3, 3, 3])
    with pytest.raises(ValueError, match="found 50 and 49 values"):
        paired_difference(others, others[1:])


def test_the_speedup_is_the_median_over_rounds() -> None:
    assert speedup([2.0, 2.0, 20.0], [1.0, 1.0, 1.0]) == 2.0


def test_precision_is_of_what_was_made_and_recall_of_the_real() -> None:
    random = np.random.default_rng(0)
    real = random.normal(size=(200, 2))
    assert min(precision_recall(random.normal(size=(200, 2)), real)) > 0.8
    narrow = precision_recall(0.1 * random.normal(size=(200, 2)), real)  # good pictures, all alike
    assert narrow[0] > 0.95
    assert narrow[1] < 0.3
    wide = precision_recall(6 * random.normal(size=(200, 2)), real)  # all kinds, few of them good
    assert wide[0] < 0.3
    assert precision_recall(real + 100, real) == (0, 0)
    with pytest.raises(ValueError, match="found 3 and 200 points, needed more than 3"):
        precision_recall(real[:3], real)
