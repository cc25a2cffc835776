"""Captioned scenes: a small grammar of captions, and the images that are drawn from it.

A scene is one object, or two objects above, below, left or right of each other, on a background. Every image follows
from the seed and its own index alone, so that a longer list of scenes begins with the shorter one.

Training and held-out scenes share no combination: of one object, its background and itself together are held out; of
two, the unordered pair of objects, whatever the relation and the background. The pair is not ordered because "a above
b" and "b below a" are the same picture.
"""

import re
import zlib
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

SIZE = 32  # pixels
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.85, 0.10, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.88),
    "yellow": (0.97, 0.82, 0.05),
    "purple": (0.72, 0.20, 0.78),
    "black": (0.06, 0.06, 0.06),
}
SIZES = {"small": 4.2, "large": 7.0}  # radius in pixels: two large objects just fit side by side
RELATIONS = ("above", "below", "left of", "right of")
BACKGROUNDS = ("plain", "striped", "checkered", "dotted")
LAYOUTS = ("alone", "vertical", "horizontal")
PLACES = ("centre", "top", "bottom", "left", "right")
LIGHT, DARK = 0.93, 0.70  # greys of the textures
CELL = 4  # pixels of a stripe and of a checker
ONE_OBJECT = 0.35  # share of scenes with a single object
HELD_OUT = 8  # one combination of so many is never trained on


@dataclass(frozen=True)
class Item:
    """One object; None is an attribute that a caption leaves open."""

    size: str | None
    colour: str | None
    shape: str | None

    def phrase(self) -> str:
        return " ".join(["a", *(word for word in (self.size, self.colour, self.shape) if word)])


@dataclass(frozen=True)
class Scene:
    """What a caption says: `first` alone, or in a relation to `second`, on a background."""

    first: Item
    relation: str | None
    second: Item | None
    background: str | None

    def caption(self, *, sizes: bool = True, background: bool = True) -> str:
        """Return the caption, with or without the words of size and of background."""

        def phrase(item: Item) -> str:
            return (item if sizes else Item(None, item.colour, item.shape)).phrase()

        words = phrase(self.first)
        if self.second is not None:
            words += f" {self.relation} {phrase(self.second)}"
        if background and self.background is not None:
            words += f" on a {self.background} background"
        return words

    @property
    def layout(self) -> str:
        """Return how the objects are arranged, whichever is named first."""
        if self.second is None:
            return "alone"
        return "vertical" if self.relation in ("above", "below") else "horizontal"

    @property
    def slots(self) -> tuple[Item, Item | None]:
        """Return the object at the top, at the left or alone, and the other one."""
        if self.second is not None and self.relation in ("below", "right of"):
            return self.second, self.first
        return self.first, self.second

    @property
    def places(self) -> tuple[str, str | None]:
        """Return where the first and the second named object are."""
        there = {"above": "top", "below": "bottom", "left of": "left", "right of": "right"}
        back = {"above": "bottom", "below": "top", "left of": "right", "right of": "left"}
        if self.relation is None:
            return "centre", None
        return there[self.relation], back[self.relation]

    @property
    def held_out(self) -> bool:
        """Whether training never sees this combination, under any of its captions."""
        if self.second is None:
            key = f"{self.first.phrase()} on {self.background}"
        else:
            key = " and ".join(sorted((self.first.phrase(), self.second.phrase())))
        return zlib.crc32(key.encode()) % HELD_OUT == 0


_ITEM = rf"a (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_ITEM}(?: ({'|'.join(RELATIONS)}) {_ITEM})?(?: on a ({'|'.join(BACKGROUNDS)}) background)?")


def is_caption(text: str) -> bool:
    """Whether a text is of the grammar."""
    return _CAPTION.fullmatch(text.strip().lower()) is not None


def parse(caption: str) -> Scene:
    """Return what a caption asks for.

    Raises:
        ValueError: If it is not of the grammar.
    """
    match = _CAPTION.fullmatch(caption.strip().lower())
    if match is None:
        raise ValueError(
            f"{caption!r} is not of the grammar of scenes; needed something like "
            "'a small red circle above a large blue square on a striped background', with the sizes "
            f"{', '.join(SIZES)}, the colours {', '.join(COLOURS)}, the shapes {', '.join(SHAPES)}, the relations "
            f"{', '.join(RELATIONS)} and the backgrounds {', '.join(BACKGROUNDS)}"
        )
    one, relation, two, background = match.group(1, 2, 3), match[4], match.group(5, 6, 7), match[8]
    return Scene(Item(*one), relation, Item(*two) if relation else None, background)


def scene_at(index: int, *, held_out: bool = False, seed: int = 0) -> Scene:
    """Return one scene for training, or one that training never sees."""
    random = np.random.default_rng((seed, int(held_out), index))
    while True:
        items = [
            Item(str(random.choice(list(SIZES))), str(random.choice(list(COLOURS))), str(random.choice(SHAPES)))
            for _ in range(2)
        ]
        background = str(random.choice(BACKGROUNDS))
        if random.random() < ONE_OBJECT:
            scene = Scene(items[0], None, None, background)
        else:
            scene = Scene(items[0], str(random.choice(RELATIONS)), items[1], background)
        if scene.held_out == held_out:
            return scene


def captions(count: int, *, held_out: bool = True, seed: int = 0) -> list[str]:
    """Return different captions, by default such that training never saw their combinations."""
    found: dict[str, None] = {}
    index = 0
    while len(found) < count:
        found.setdefault(scene_at(index, held_out=held_out, seed=seed).caption())
        index += 1
    return list(found)


def draw(scene: Scene, index: int, *, seed: int = 0) -> np.ndarray:
    """Draw a scene; place, size, colour and grey vary a little with the index.

    Returns:
        An anti-aliased RGB image in [0, 1], shape (32, 32, 3).
    """
    random = np.random.default_rng((seed, 2, index))
    image = np.repeat(texture(scene.background or "plain", random)[:, :, None], 3, axis=2)
    wiggle = random.uniform(-1, 1, (2, 6))  # drawn for both objects, so that the first does not depend on the second
    for item, place, w in zip((scene.first, scene.second), scene.places, wiggle, strict=True):
        if item is None or place is None:
            continue
        x, y = CENTRES[place]
        # Two objects keep their distance along the axis of their relation.
        x += w[0] * (0.5 if place in ("left", "right") else 2.0)
        y += w[1] * (0.5 if place in ("top", "bottom") else 2.0)
        radius = SIZES[item.size or "large"] * (1 + 0.03 * w[2])
        colour = np.clip(np.array(COLOURS[item.colour or "black"]) + 0.03 * w[3:], 0, 1)
        inside = coverage(item.shape or "circle", x, y, radius)[:, :, None]
        image = image * (1 - inside) + colour * inside
    return image


CENTRES = {
    "centre": (16.0, 16.0),
    "top": (16.0, 8.5),
    "bottom": (16.0, 23.5),
    "left": (8.5, 16.0),
    "right": (23.5, 16.0),
}


def texture(background: str, random: np.random.Generator) -> np.ndarray:
    """Return a background in grey, shape (32, 32), with a phase and a brightness of its own."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    shift_y, shift_x = random.integers(2, size=2) * CELL
    rows, columns = rows + shift_y, columns + shift_x
    if background == "striped":
        dark = (columns // CELL) % 2 == 1
    elif background == "checkered":
        dark = (columns // CELL + rows // CELL) % 2 == 1
    elif background == "dotted":
        away = np.hypot(columns % (2 * CELL) - CELL + 0.5, rows % (2 * CELL) - CELL + 0.5)
        dark = np.clip(2.3 - away, 0, 1)
    else:
        dark = np.full((SIZE, SIZE), 0.25)
    return np.asarray(LIGHT + (DARK - LIGHT) * dark + 0.03 * random.uniform(-1, 1))


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Return how much of each pixel a shape covers, shape (32, 32), from the distance to its edge."""
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    dx, dy = columns - x, rows - y
    if shape == "circle":
        edge = np.hypot(dx, dy) - radius
    elif shape == "square":
        edge = np.maximum(abs(dx), abs(dy)) - 0.88 * radius
    elif shape == "triangle":  # points up; its centre of mass is a third of its height above the base
        slope = np.sqrt(3) / 2
        edge = np.maximum(dy - 0.6 * radius, slope * abs(dx) - 0.5 * dy - 0.6 * radius)
    else:
        wide, narrow = radius, 0.34 * radius
        bar = np.maximum(abs(dx) - wide, abs(dy) - narrow)
        edge = np.minimum(bar, np.maximum(abs(dx) - narrow, abs(dy) - wide))
    return np.asarray(np.clip(0.5 - edge, 0, 1))


def drawn(scenes: list[Scene], *, seed: int = 0) -> Tensor:
    """Return images of scenes in [-1, 1], shape (n, 3, 32, 32); the place in the list is the index."""
    images = np.stack([draw(scene, index, seed=seed) for index, scene in enumerate(scenes)])
    return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) * 2 - 1


def attributes(scenes: list[Scene]) -> dict[str, Tensor]:
    """Return what scenes show as class numbers, each of shape (n,); -1 where there is no such object or no word."""

    def number(known: tuple[str, ...], value: str | None) -> int:
        return -1 if value is None else known.index(value)

    columns: dict[str, list[int]] = {name: [] for name in CLASSES}
    for scene in scenes:
        columns["layout"].append(number(LAYOUTS, scene.layout))
        columns["background"].append(number(BACKGROUNDS, scene.background))
        for slot, item in zip(("first", "second"), scene.slots, strict=True):
            for field in fields(Item):
                value = None if item is None else getattr(item, field.name)
                columns[f"{slot}_{field.name}"].append(number(CLASSES[f"{slot}_{field.name}"], value))
    return {name: torch.tensor(column) for name, column in columns.items()}


# The attributes of a picture: `first` is the object at the top, at the left or alone.
CLASSES: dict[str, tuple[str, ...]] = {
    "layout": LAYOUTS,
    "background": BACKGROUNDS,
    "first_size": tuple(SIZES),
    "first_colour": tuple(COLOURS),
    "first_shape": SHAPES,
    "second_size": tuple(SIZES),
    "second_colour": tuple(COLOURS),
    "second_shape": SHAPES,
}
