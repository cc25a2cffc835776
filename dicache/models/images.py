"""Read and write images."""

from pathlib import Path

import numpy as np

from dicache.models.names import ModelError


def save_png(image: np.ndarray, path: Path) -> Path:
    """Write an image in [0, 1], shape (h, w, 3); of a video, shape (frames, h, w, 3), its frames side by side."""
    from PIL import Image

    if image.ndim == 4:
        image = np.concatenate(list(image), axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8)).save(path)
    return path


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Return the PNG images of a folder in [0, 1], each (h, w, 3), by name in order.

    Raises:
        ModelError: If there is no such folder, no image in it, one that cannot be read, or of another size than the
            first.
    """
    from PIL import Image, UnidentifiedImageError

    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise ModelError(f"{folder} holds no PNG images; `dicache evaluate --images` and `dicache generate` write them")
    images: dict[str, np.ndarray] = {}
    for path in paths:
        try:
            with Image.open(path) as picture:
                image = np.asarray(picture.convert("RGB")) / 255
        except (UnidentifiedImageError, OSError) as error:
            raise ModelError(f"{path} cannot be read as an image: {error}") from None
        wanted = next(iter(images.values()), image).shape
        if image.shape != wanted:
            raise ModelError(
                f"{path} is {image.shape[1]} x {image.shape[0]} pixels, "
                f"the first of its folder {wanted[1]} x {wanted[0]}"
            )
        images[path.name] = image
    return images
