"""Schedules and measurements in the forms of other projects: one file a format."""

from importlib import import_module

from dicache.formats.format import Exported, Format, FormatError, Given, Losses, Read, export, imported

__all__ = ["NAMES", "Exported", "Format", "FormatError", "Given", "Losses", "Read", "export", "find", "imported"]

NAMES = {
    "cache-dit": "cache_dit",
    "xdit": "xdit",
    "vllm-omni": "vllm_omni",
    "diffusers-magcache": "diffusers_magcache",
    "diffusers-taylorseer": "diffusers_taylorseer",
    "diffusers-pab": "diffusers_pab",
    "diffusers-first-block": "diffusers_first_block",
    "smoothcache": "smoothcache",
    "sglang-teacache": "sglang_teacache",
    "sglang-dpcache": "sglang_dpcache",
    "comfyui-teacache": "comfyui_teacache",
    "lightx2v": "lightx2v",
    "mask": "mask",
    "l2c-router": "l2c_router",
    "magcache-ratios": "magcache_ratios",
    "teacache-coefficients": "teacache_coefficients",
}


def find(name: str) -> Format:
    """Return a format by its name.

    Raises:
        FormatError: If there is none of that name.
    """
    if name not in NAMES:
        raise FormatError(f"unknown format {name!r}; known: {', '.join(NAMES)}")
    found = import_module(f"dicache.formats.{NAMES[name]}").FORMAT
    assert isinstance(found, Format)
    return found
