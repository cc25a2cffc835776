"""cache-dit's YAML: a mask of steps, or DBCache's settings.

References:
    vipshop/cache-dit 1.5.3, `caching/load_configs.py`: what a file holds. Keys that it does not know it passes over in
    silence, so that they are refused here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicache.formats.dbcache import read_settings, settings_of
from dicache.formats.files import check_keys, read_yaml
from dicache.formats.format import Format, Given, Losses, Read
from dicache.schedules import Schedule

ONE_STACK = ("FluxTransformer2DModel",)  # double and single blocks, by its adapter
OTHER_SECTIONS = ("parallelism_config", "attention_backend", "quantize_config")


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    settings = settings_of(schedule, losses, ONE_STACK)
    return "cache_config:\n" + "".join(f"  {key}: {_scalar(value)}\n" for key, value in settings.items())


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.17g}" if "e" not in f"{value:.17g}" else f"{value:.20f}".rstrip("0")
    return str(value)


def read(path: Path, given: Given) -> Read:
    content = check_keys(str(path), read_yaml(path), ("cache_config", *OTHER_SECTIONS), ("cache_config",))
    return read_settings(f"{path}: cache_config", content["cache_config"], given)


FORMAT = Format(
    name="cache-dit",
    engine="cache-dit 1.5.3",
    source="vipshop/cache-dit: caching/load_configs.py, caching/cache_contexts/cache_config.py",
    suffix=".yaml",
    holds="masks of whole steps, held or by a Taylor expansion; first-block schedules",
    loses="branches; the first block always runs",
    use=(
        "import cache_dit",
        "cache_dit.enable_cache(pipe, **cache_dit.load_configs('FILE'))",
        "Enable it on the pipeline, not on its transformer: there the mask is shifted by a step from the second",
        "generation on, unless cache_dit.refresh_context is called before each. Add enable_separate_cfg: true where",
        "the pipeline calls the model twice a step and cache-dit does not know that. It runs other numbers of steps",
        "without a word: steps behind the end of the mask are cached.",
    ),
    export=export,
    read=read,
    comment="# ",
)
