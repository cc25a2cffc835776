"""xDiT's `--cache_config`: a JSON object of cache-dit's settings over those of a preset.

References:
    xdit-project/xDiT, `xfuser/model_executor/cache/adapters/cache_dit.py` (`_build_config`) and `cache/presets.py`
    (`DBCachePreset`), commit 57f5bd8. Keys that neither knows are passed over with a warning.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicache.formats.dbcache import DEFAULTS, read_settings, settings_of
from dicache.formats.files import check_keys, read_json
from dicache.formats.format import Format, FormatError, Given, Losses, Read
from dicache.schedules import Schedule

OWN = ("scm_policy", "enable_encoder_calibrator")  # of its presets
ORDER = 1  # of the Taylor expansion, the only one


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    settings = settings_of(schedule, losses)
    order = settings.pop("taylorseer_order", 0)
    if order > ORDER:
        losses.beyond.append(f"the Taylor expansion would be of order {ORDER}, where the plan has {order}")
    settings["enable_taylorseer"] = bool(order)
    settings["scm_policy"] = None  # of the preset, whose mask would be taken otherwise
    del settings["num_inference_steps"]  # its command line says it
    return json.dumps(settings) + "\n"


def read(path: Path, given: Given) -> Read:
    content = check_keys(str(path), read_json(path), [*DEFAULTS, *OWN, "enable_separate_cfg"])
    policy = content.get("scm_policy", "fast")  # its presets take that mask where none is given
    settings = {key: value for key, value in content.items() if key not in OWN}
    if "steps_computation_mask" not in settings and policy is not None:
        settings["steps_computation_mask"] = policy
    if settings.get("enable_taylorseer") is not False:
        settings["enable_taylorseer"] = True
    if settings.get("taylorseer_order", ORDER) != ORDER:
        raise FormatError(f"{path}: xDiT's Taylor expansion is of order {ORDER}, and it does not read taylorseer_order")
    return read_settings(str(path), settings, given)


FORMAT = Format(
    name="xdit",
    engine="xDiT at commit 57f5bd8",
    source="xdit-project/xDiT: xfuser/model_executor/cache/adapters/cache_dit.py, cache/presets.py",
    suffix=".json",
    holds="masks of whole steps, held or by a Taylor expansion of order 1; first-block schedules",
    loses="branches; the first block always runs",
    use=(
        '... --cache_method dbcache --num_inference_steps STEPS --cache_config "$(cat FILE)"',
        "It needs a version whose presets have enable_taylorseer: older ones put a Taylor expansion onto every mask.",
    ),
    export=export,
    read=read,
)
