"""Write images."""

from pathlib import Path

import numpy as np


def save_png(image: np.ndarray, path: Path) -> Path:
    """Write an image in [0, 1], shape (h, w, 3); of a video, shape (frames, h, w, 3), its frames side by side."""
    from PIL import Image

    if image.ndim == 4:
        image = np.concatenate(list(image), axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8)).save(path)
    return path
