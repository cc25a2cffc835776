"""Two generations in a row of the bundled digits, and which steps a block computes in each; dicache is not asked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dicache.models.sampling import Sampling, sample

STEPS, DEPTH = 8, 12  # blocks of the model
SAMPLING = Sampling(STEPS, 4.0)
SEEDS = (1, 5)

Made = tuple[list[np.ndarray], list[list[list[int]]]]


class Watch:
    """Notes, of the attention and the MLP of some blocks, the steps at which something inside of them runs."""

    def __init__(self, model: Any, blocks: tuple[int, ...]) -> None:
        self.step = -1
        self.found: list[list[int]] = [[] for _ in range(2 * len(blocks))]
        inner = [m for b in blocks for m in (_block(model, b).attn1.to_q, _block(model, b).ff.net[0].proj)]
        self._hooks = [model.register_forward_pre_hook(self._begin)]
        self._hooks += [m.register_forward_hook(self._note(place)) for place, m in enumerate(inner)]

    def _begin(self, *_: Any) -> None:
        self.step += 1

    def _note(self, place: int) -> Callable[..., None]:
        return lambda *_: self.found[place].append(self.step)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _block(model: Any, index: int) -> Any:
    """Return a block, also where a cache has put the list of them away."""
    return model._modules["transformer_blocks"][index]


@contextmanager
def watching(model: Any, blocks: tuple[int, ...]) -> Iterator[Watch]:
    watch = Watch(model, blocks)
    try:
        yield watch
    finally:
        watch.close()


def generations(pipeline: Any, blocks: tuple[int, ...] = (0, 5, 11), before: Callable[[], None] = lambda: None) -> Made:
    """Make two images one after the other.

    Args:
        pipeline: With something on it.
        blocks: That are watched.
        before: What is to be called before each.

    Returns:
        The images, and of each the steps at which the attention and the MLP of each block ran.
    """
    images, steps = [], []
    for seed in SEEDS:
        before()
        with watching(pipeline.transformer, blocks) as watch:
            images.append(sample(pipeline, ["3"], [seed], SAMPLING))
        steps.append(watch.found)
    return images, steps


def farthest(made: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Return the largest difference of a pixel, of 1 between black and white."""
    return max(float(np.abs(a - b).max()) for a, b in zip(made, wanted, strict=True))
