"""Which frequencies images hold: Delta-DiT's relative log magnitude by distance from the centre of the spectrum."""

import numpy as np

FLOOR = 1e-8  # of the largest magnitude; what is below is rounding, and has no logarithm where it is zero


def radial_log_magnitude(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return spatial frequencies and, at each, the relative log magnitude of each image.

    The channels' mean is transformed; the natural logarithm of each coefficient's magnitude, relative to the image's
    largest, is averaged over rings of equal frequency.

    Args:
        images: Shape (n, h, w, 3), h and w at least 4.

    Returns:
        Frequencies in cycles per pixel, shape (f,), the middles of rings from 0 to 0.5, and values, shape (n, f), 0
        for the largest coefficient.

    Raises:
        ValueError: If the shape is another, or an image is black: it has no largest coefficient.

    References:
        Delta-DiT, arXiv 2406.01125, equations 4 and 5, figure 5.
    """
    magnitude = np.abs(_transformed(images))
    largest = magnitude.max(axis=(1, 2), keepdims=True)
    if not largest.all():
        raise ValueError(f"image {int(np.argmin(largest))} is black; its spectrum has no largest coefficient")
    return _ring_means(np.log(np.maximum(magnitude / largest, FLOOR)))


def radial_error(images: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return spatial frequencies and, at each, how far each image is from its reference.

    The channels' mean is transformed; of each ring of equal frequency it is the 2-norm of the difference over that of
    the reference, or over rounding where the reference holds nothing.

    Args:
        images: Shape (n, h, w, 3), h and w at least 4.
        reference: Of the same shape.

    Returns:
        Frequencies in cycles per pixel, shape (f,), and values, shape (n, f): 0 where nothing differs, 1 where as much
        does as there is.

    Raises:
        ValueError: If the shapes are others.
    """
    if images.shape != reference.shape:
        raise ValueError(f"found images of shape {images.shape} and references of {reference.shape}; needed the same")
    wanted = _transformed(reference)
    frequencies, error = _ring_means(np.abs(_transformed(images) - wanted) ** 2)
    _, power = _ring_means(np.abs(wanted) ** 2)
    least = (FLOOR**2) * power.max(axis=1, keepdims=True)
    return frequencies, np.sqrt(error / np.maximum(power, np.maximum(least, np.finfo(float).tiny)))


def _transformed(images: np.ndarray) -> np.ndarray:
    """Return the Fourier coefficients of the channels' mean, (n, h, w)."""
    if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < 4:
        raise ValueError(f"found images of shape {images.shape}; needed (n, h, w, 3), at least 4 pixels high and wide")
    return np.asarray(np.fft.fft2(images.astype(np.float64).mean(axis=-1)))


def _ring_means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the middles of rings of equal frequency, (f,), and the means of values (n, h, w) over each, (n, f)."""
    height, width = values.shape[1:]
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")).ravel()
    rings = min(height, width) // 2 + 1
    ring = np.rint(radius * 2 * (rings - 1)).astype(int)  # corners lie beyond 0.5, in no ring
    inside = ring < rings
    sums = np.zeros((rings, len(values)))
    np.add.at(sums, ring[inside], values.reshape(len(values), -1)[:, inside].T)
    return np.linspace(0, 0.5, rings), (sums / np.bincount(ring[inside])[:, None]).T
