import numpy as np
import pytest

from dicache.evaluate.spectrum import FLOOR, radial_error, radial_log_magnitude


def wave(across: int, down: int, size: int = 16, strength: float = 0.25) -> np.ndarray:
    """Return a grey image of one wave round a mean of one half."""
    y, x = np.mgrid[:size, :size]
    grey = 0.5 + strength * np.cos(2 * np.pi * (across * x + down * y) / size)
    return np.repeat(grey[..., None], 3, axis=2)


def test_a_wave_is_found_at_its_frequency_with_half_its_strength_relative_to_the_mean() -> None:
    frequencies, values = radial_log_magnitude(wave(3, 0)[None])
    assert frequencies[3] == pytest.approx(3 / 16)
    assert values[0, 0] == pytest.approx(0)
    # Two of the coefficients of its ring hold it: 0.25 / 2 of the mean's 0.5 each.
    y, x = np.meshgrid(np.fft.fftfreq(16) * 16, np.fft.fftfreq(16) * 16)
    size = int((np.rint(np.hypot(x, y)) == 3).sum())
    assert values[0, 3] == pytest.approx((2 * np.log(0.25) + (size - 2) * np.log(FLOOR)) / size)
    assert values[0, [1, 2, 4, 5, 6, 7, 8]] == pytest.approx(np.log(FLOOR))


def test_direction_does_not_matter_and_corners_are_in_no_ring() -> None:
    along, down = (radial_log_magnitude(image[None])[1] for image in (wave(5, 0), wave(0, 5)))
    assert along == pytest.approx(down)
    corner = radial_log_magnitude(wave(8, 8)[None])[1]
    assert corner[0, 1:] == pytest.approx(np.log(FLOOR))


def test_noise_has_more_of_high_frequencies_than_its_blur_and_scale_does_not_matter() -> None:
    noise = np.random.default_rng(0).random((6, 24, 32, 3))
    blurred = (noise + np.roll(noise, 1, axis=1) + np.roll(noise, 1, axis=2)) / 3
    frequencies, sharp = radial_log_magnitude(noise)
    assert sharp.shape == (6, 13)
    assert (radial_log_magnitude(blurred)[1][:, -1] < sharp[:, -1]).all()
    assert radial_log_magnitude(noise * 0.1)[1] == pytest.approx(sharp)
    assert frequencies[[0, -1]].tolist() == [0, 0.5]


def test_a_black_image_and_another_shape_are_refused() -> None:
    images = np.stack([wave(1, 0), np.zeros((16, 16, 3))])
    with pytest.raises(ValueError, match="image 1 is black"):
        radial_log_magnitude(images)
    with pytest.raises(ValueError, match=r"needed \(n, h, w, 3\)"):
        radial_log_magnitude(images[..., 0])


def test_a_wave_that_doubles_is_as_far_off_as_it_is_large_and_only_at_its_frequency() -> None:
    wanted = wave(3, 0) + wave(0, 6) - 0.5
    frequencies, errors = radial_error((wanted + wave(3, 0) - 0.5)[None], wanted[None])
    assert frequencies[3] == pytest.approx(3 / 16)
    assert errors[0, 3] == pytest.approx(1)
    assert errors[0, [0, 6]] == pytest.approx(0, abs=1e-9)
    assert radial_error(wanted[None], wanted[None])[1].max() == 0


def test_an_error_needs_a_reference_of_the_same_shape() -> None:
    with pytest.raises(ValueError, match=r"found images of shape \(1, 16, 16, 3\) and references of \(2, 16, 16, 3\)"):
        radial_error(wave(1, 0)[None], np.stack([wave(1, 0)] * 2))
