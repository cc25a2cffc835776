"""Small models that were trained for this package, and the scripts that trained them."""

from pathlib import Path

NAMES = {
    "digits": "class-conditional DiT of 12 blocks on scikit-learn's handwritten digits, 32 x 32",
    "scenes": "text-to-image PixArt of 12 blocks on drawn scenes of one or two objects, 32 x 32",
    "clips": "text-to-video Latte of 12 blocks on drawn moving objects, 8 frames of 32 x 32",
    "flow": "text-to-image Flux of 4 double and 6 single blocks by rectified flow, on the scenes of `scenes`, 32 x 32",
}


def folder(name: str) -> Path:
    """Return the folder of a bundled model, in diffusers' format."""
    return Path(__file__).parent / "weights" / name
