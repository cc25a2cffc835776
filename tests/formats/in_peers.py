"""Run exported files in cache-dit and SmoothCache; `test_peers` starts this in an environment that has them.

The jobs come as a JSON file; of each an .npz file is made, with the images of two generations in a row and the steps
that were computed.
"""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicache.formats.scm_presets import PRESETS
from dicache.models.loading import load
from tests.formats.running import Made, generations


def cache_dit(pipeline: Any, file: str) -> Made:
    import cache_dit as package

    package.enable_cache(pipeline, **package.load_configs(file))
    try:
        return generations(pipeline)
    finally:
        package.disable_cache(pipeline)


def cache_dit_transformer(pipeline: Any, file: str) -> Made:
    """Enable it on the transformer alone, and refresh before each generation, as the file's comment says."""
    import cache_dit as package

    settings = package.load_configs(file)
    package.enable_cache(pipeline.transformer, **settings)
    try:
        return generations(
            pipeline,
            before=lambda: package.refresh_context(pipeline.transformer, cache_config=settings["cache_config"]),
        )
    finally:
        package.disable_cache(pipeline.transformer)


def smoothcache(pipeline: Any, file: str) -> Made:
    from diffusers.models.attention import BasicTransformerBlock
    from SmoothCache import SmoothCacheHelper

    schedule = json.loads(Path(file).read_text())
    cache = SmoothCacheHelper(pipeline.transformer, BasicTransformerBlock, ["attn1", "ff"], schedule)

    def again() -> None:
        cache.disable()
        cache.enable()

    with redirect_stdout(StringIO()):  # it prints a line a call
        try:
            return generations(pipeline, before=again)
        finally:
            cache.disable()


def presets() -> list[list[int]]:
    """Return cache-dit's named masks for all numbers of steps up to 60 for which it has any."""
    import cache_dit as package

    return [
        package.steps_mask(total_steps=steps, mask_policy=name) for steps in (4, 6, *range(8, 61)) for name in PRESETS
    ]


ENGINES: Mapping[str, Callable[[Any, str], Made]] = {
    "cache-dit": cache_dit,
    "cache-dit, transformer": cache_dit_transformer,
    "smoothcache": smoothcache,
}


def main() -> None:
    torch.set_grad_enabled(False)
    folder, pipeline = Path(sys.argv[1]), load("digits")
    for name, (engine, file) in json.loads((folder / "jobs.json").read_text()).items():
        images, steps = ENGINES[engine](pipeline, file)
        np.savez(folder / f"{name}.npz", images=np.stack(images), steps=json.dumps(steps))
    (folder / "presets.json").write_text(json.dumps(presets()))


if __name__ == "__main__":
    main()
