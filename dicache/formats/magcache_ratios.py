"""MagCache's ratios: a JSON list; of two guidance passes one that goes by turns, or two lists.

References:
    Zehong-Ma/MagCache (commit of 2025-11-17): flat lists that begin with 1.0, and of Wan, whose passes are separate
    calls, `[1.0, 1.0]` and then the ratios of the guided and the unguided pass in turn. LightX2V dumps two lists.
"""

from pathlib import Path
from typing import Any

from dicache.calibrate.magcache import MagCache
from dicache.calibrate.methods import CalibrationError, body_plan
from dicache.formats.files import numbers, read_json
from dicache.formats.format import Format, FormatError, Given, Read

PASSES = ("cond", "uncond")


def read(path: Path, given: Given) -> Read:
    rows = _rows(path, read_json(path), given.steps)
    names = ("threshold", "max_skip", "retention")
    try:
        method = MagCache(**{name: given.setting(name, "of MagCache's rule") for name in names})
    except CalibrationError as error:
        raise FormatError(str(error)) from None
    letters = {name: method.simulate(row) for name, row in rows.items()}
    settings = {name: getattr(method, name) for name in names}
    return Read("magcache", {**settings, "ratios": rows}, plan=body_plan(letters))


def _rows(path: Path, content: Any, steps: int) -> dict[str, list[float]]:
    """Return the ratios of each guidance pass, or of all."""
    if isinstance(content, list) and content and isinstance(content[0], list):
        rows = dict(zip(PASSES, [numbers(str(path), row) for row in content], strict=False))
        if len(content) != len(PASSES):
            raise FormatError(f"{path} must be a list, or two of them, found {len(content)}")
    else:
        flat = numbers(str(path), content)
        by_turns = len(flat) == 2 * steps and flat[:2] == [1.0, 1.0]
        rows = {PASSES[0]: flat[::2], PASSES[1]: flat[1::2]} if by_turns else {"*": flat}
    for row in rows.values():
        if len(row) != steps:
            raise FormatError(
                f"{path} has {len(row)} ratios, but {steps} steps are asked for; ratios of other step counts were not "
                "measured: import with --steps of its own"
            )
    return rows


FORMAT = Format(
    name="magcache-ratios",
    engine="MagCache of 2025-11-17",
    source="Zehong-Ma/MagCache: MagCache4Wan2.1/magcache_generate.py, MagCache4FLUX/magcache_flux.py",
    suffix=".json",
    holds="a ratio a step, of one guidance pass or of two",
    loses="-",
    read=read,
)
