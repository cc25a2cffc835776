"""Captioned clips: a small grammar of captions, and the moving objects that are drawn from it.

A clip is one object on a plain background that stands still or moves in one of four directions, slowly or fast. Every
clip follows from the seed and its own index alone, so that a longer list of clips begins with the shorter one.

One in four combinations of colour, shape, direction and speed is held out: training never sees it, on any background.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dicache.models.zoo.scene_data import SHAPES, SIZE, coverage

FRAMES = 8
COLOURS = {
    "red": (0.85, 0.10, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.88),
    "yellow": (0.97, 0.82, 0.05),
    "purple": (0.62, 0.15, 0.72),
    "cyan": (0.10, 0.80, 0.85),
}
BACKGROUNDS = {
    "black": (0.05, 0.05, 0.05),
    "grey": (0.50, 0.50, 0.50),
    "white": (0.95, 0.95, 0.95),
    "brown": (0.40, 0.24, 0.10),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 0.75, "fast": 2.25}  # pixels a frame: 5 and 16 of the 32 in a clip
STILL = "still"
RADIUS = 5.2  # pixels
MARGIN = 6.0  # pixels that the centre keeps from the edges along its path
HELD_OUT = 4  # one combination of so many is never trained on


@dataclass(frozen=True)
class Clip:
    """What a caption says; None is what it leaves open.

    Attributes:
        colour: Of the object.
        shape: Of the object.
        direction: `left`, `right`, `up`, `down` or `still`.
        speed: `slowly` or `fast`; None where it stands still.
        background: Its colour.
    """

    colour: str
    shape: str
    direction: str
    speed: str | None
    background: str | None

    def caption(self, *, speed: bool = True, background: bool = True) -> str:
        """Return the caption, with or without the words of speed and of background."""
        words = f"a {self.colour} {self.shape} "
        words += "standing still" if self.direction == STILL else f"moving {self.direction}"
        if speed and self.speed is not None:
            words += f" {self.speed}"
        if background and self.background is not None:
            words += f" on a {self.background} background"
        return words

    @property
    def held_out(self) -> bool:
        """Whether training never sees this combination."""
        return zlib.crc32(self.caption(background=False).encode()) % HELD_OUT == 0


_MOTION = rf"standing still|moving ({'|'.join(DIRECTIONS)})(?: ({'|'.join(SPEEDS)}))?"
_CAPTION = re.compile(
    rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) (?:{_MOTION})(?: on a ({'|'.join(BACKGROUNDS)}) background)?"
)


def parse(caption: str) -> Clip:
    """Return what a caption asks for.

    Raises:
        ValueError: If it is not of the grammar.
    """
    match = _CAPTION.fullmatch(caption.strip().lower())
    if match is None:
        raise ValueError(
            f"{caption!r} is not of the grammar of clips; needed something like 'a red circle moving right fast on a "
            f"black background' or 'a red circle standing still', with the colours {', '.join(COLOURS)}, the shapes "
            f"{', '.join(SHAPES)}, the directions {', '.join(DIRECTIONS)}, the speeds {', '.join(SPEEDS)} and the "
            f"backgrounds {', '.join(BACKGROUNDS)}"
        )
    colour, shape, direction, speed, background = match.groups()
    return Clip(colour, shape, direction or STILL, speed, background)


def is_caption(text: str) -> bool:
    """Whether a text is a caption of the grammar."""
    return _CAPTION.fullmatch(text.strip().lower()) is not None


def clip_at(index: int, *, held_out: bool = False, seed: int = 0) -> Clip:
    """Return one clip for training, or one that training never sees; a ninth of them stand still."""
    random = np.random.default_rng((seed, int(held_out), index))
    while True:
        colour, shape = str(random.choice(list(COLOURS))), str(random.choice(SHAPES))
        motion, background = int(random.integers(9)), str(random.choice(list(BACKGROUNDS)))
        direction = STILL if motion == 8 else list(DIRECTIONS)[motion % 4]
        speed = None if motion == 8 else list(SPEEDS)[motion // 4]
        clip = Clip(colour, shape, direction, speed, background)
        if clip.held_out == held_out:
            return clip


def captions(count: int, *, held_out: bool = True, seed: int = 0) -> list[str]:
    """Return captions, by default such that training never saw their combinations; all different as long as there are.

    There are 864 in all.
    """
    combinations = [
        Clip(colour, shape, direction, speed, background)
        for colour in COLOURS
        for shape in SHAPES
        for direction, speed in ((STILL, None), *((d, s) for d in DIRECTIONS for s in SPEEDS))
        for background in BACKGROUNDS
    ]
    fitting = [clip.caption() for clip in combinations if clip.held_out == held_out]
    order = np.random.default_rng(seed).permutation(len(fitting))
    return [fitting[order[i % len(fitting)]] for i in range(count)]


def draw(clip: Clip, index: int, *, seed: int = 0) -> np.ndarray:
    """Draw a clip; place, size, colour and speed vary a little with the index.

    Returns:
        Anti-aliased RGB frames in [0, 1], shape (8, 32, 32, 3).
    """
    random = np.random.default_rng((seed, 2, index))
    place, wiggle = random.uniform(0, 1, 2), random.uniform(-1, 1, 8)
    step = SPEEDS[clip.speed or "slowly"] * (1 + 0.08 * wiggle[0]) if clip.direction != STILL else 0.0
    radius = RADIUS * (1 + 0.04 * wiggle[1])
    colour = np.clip(np.array(COLOURS[clip.colour]) + 0.03 * wiggle[2:5], 0, 1)
    background = np.clip(np.array(BACKGROUNDS[clip.background or "black"]) + 0.03 * wiggle[5:], 0, 1)
    towards = np.array(DIRECTIONS.get(clip.direction, (0, 0)))
    reach = np.abs(towards) * step * (FRAMES - 1) / 2 + MARGIN  # from the middle of the path to the edges, at least
    middle = reach + place * (SIZE - 2 * reach)
    frames = []
    for frame in range(FRAMES):
        x, y = middle + towards * step * (frame - (FRAMES - 1) / 2)
        inside = coverage(clip.shape, x, y, radius)[:, :, None]
        frames.append(background * (1 - inside) + colour * inside)
    return np.stack(frames)


def drawn(clips: Sequence[Clip], *, seed: int = 0) -> Tensor:
    """Return clips as bytes, shape (n, 8, 3, 32, 32); the place in the list is the index."""
    out = torch.empty(len(clips), FRAMES, 3, SIZE, SIZE, dtype=torch.uint8)
    for index, clip in enumerate(clips):
        frames = torch.from_numpy(draw(clip, index, seed=seed)).permute(0, 3, 1, 2)
        out[index] = (frames * 255).round()
    return out


def as_input(clips: Tensor) -> Tensor:
    """Turn bytes into values in [-1, 1]."""
    return clips.float() / 127.5 - 1


def attributes(clips: Sequence[Clip]) -> dict[str, Tensor]:
    """Return what clips show as class numbers, each of shape (n,); -1 where a caption does not say it."""
    return {
        name: torch.tensor([-1 if (value := getattr(clip, name)) is None else known.index(value) for clip in clips])
        for name, known in CLASSES.items()
    }


CLASSES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "direction": (*DIRECTIONS, STILL),
    "speed": tuple(SPEEDS),
    "background": tuple(BACKGROUNDS),
}
