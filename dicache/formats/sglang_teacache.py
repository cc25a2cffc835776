"""SGLang's TeaCacheParams as JSON; its calibration writes the same two first keys.

References:
    sgl-project/sglang, `multimodal_gen/configs/sample/teacache.py` (commit 18ae017), `runtime/cache/teacache.py`
    (1922d5f: the rule) and `runtime/cache/teacache_calibrate.py` (2dcb5ab: what calibration writes).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicache.formats.files import as_json, check_keys, number, read_json
from dicache.formats.format import Format, FormatError, Given, Losses, Read
from dicache.formats.polynomials import policy_of, read_coefficients, read_policy, settings_of
from dicache.schedules import Schedule

START, END = 5, -1  # steps after and from which nothing is skipped, where a file does not say
KEYS = ("teacache_thresh", "coefficients", "start_skipping", "end_skipping", "cache_type")
EXPERTS = ("expert_coefficients", "expert_thresh")


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    policy = policy_of(schedule, losses, "reference")
    return as_json(
        {
            "teacache_thresh": policy.threshold,
            "coefficients": list(policy.coefficients),
            "start_skipping": policy.first_steps,
            "end_skipping": -policy.last_steps if policy.last_steps else schedule.steps,
        }
    )


def read(path: Path, given: Given) -> Read:
    content = read_json(path)
    if isinstance(content, Mapping) and (content.keys() & {*EXPERTS} or {"high", "low"} & content.keys()):
        raise FormatError(
            f"{path} is for two models that share the steps; import the part of each in a file of its own"
        )
    content = check_keys(str(path), content, (*KEYS, "use_ret_steps"), ("coefficients",))
    if content.get("use_ret_steps") is not None:
        raise FormatError(
            f"{path}: use_ret_steps is for Wan, whose polynomial is of the time embedding; take one with `dicache "
            "calibrate teacache --published`"
        )
    threshold = content.get("teacache_thresh")
    if threshold is None:
        threshold = given.setting("threshold", "of TeaCache")
    policy = read_policy(
        read_coefficients(f"{path}: coefficients", content["coefficients"]),
        number(f"{path}: teacache_thresh", threshold, least=0),
        "reference",
        first_steps=max(1, _boundary(path, content.get("start_skipping", START), given.steps)),
        last_steps=max(0, given.steps - _boundary(path, content.get("end_skipping", END), given.steps)),
    )
    return Read("teacache", settings_of(policy), policy=policy)


def _boundary(path: Path, value: Any, steps: int) -> int:
    """Return a step: whole numbers count steps, from the end if they are negative, and others are a share of them."""
    if isinstance(value, float):
        return int(steps * number(f"{path}: a share of the steps", value, least=0))
    if type(value) is not int or abs(value) > steps:
        raise FormatError(f"{path}: start_skipping and end_skipping must lie within the {steps} steps, found {value!r}")
    return steps + value if value < 0 else value


FORMAT = Format(
    name="sglang-teacache",
    engine="SGLang at commit 18ae017",
    source="sgl-project/sglang: multimodal_gen/configs/sample/teacache.py",
    suffix=".json",
    holds="TeaCache with a polynomial of degree 4 or less",
    loses="the range that x is held in",
    use=(
        "from sglang.multimodal_gen.configs.sample.teacache import TeaCacheParams",
        "sampling_params.teacache_params = TeaCacheParams(**json.load(open('FILE')))",
        "With guidance it is on for Wan, Hunyuan and Z-Image only; Flux and Qwen-Image run uncached without a word.",
    ),
    export=export,
    read=read,
)
