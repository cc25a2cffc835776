"""The inputs of ComfyUI-TeaCache's node, with the coefficients that its table lacks.

References:
    welltop-cn/ComfyUI-TeaCache, `nodes.py` (commit 3657f7f): `TeaCache.INPUT_TYPES` and
    `SUPPORTED_MODELS_COEFFICIENTS`. It skips where start_percent <= step / steps <= end_percent, and takes p(x) as it
    is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicache.formats.files import as_json, check_keys, number, read_json
from dicache.formats.format import Format, FormatError, Given, Losses, Read
from dicache.formats.polynomials import policy_of, read_coefficients, read_policy, settings_of
from dicache.schedules import Schedule

KEYS = ("model_type", "rel_l1_thresh", "start_percent", "end_percent", "coefficients")
HIGHEST = 10.0  # threshold of the node


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    policy = policy_of(schedule, losses, "reference")
    if not 0 < policy.threshold <= HIGHEST:
        raise FormatError(f"the node takes thresholds above 0 up to {HIGHEST:g}, found {policy.threshold:g}")
    steps, last = schedule.steps, schedule.steps - 1 - policy.last_steps
    first = policy.first_steps if policy.first_steps > 1 else 0  # nothing is kept at the first step, which computes
    if first:
        losses.stated.append("at the steps that are always computed the sum is not set to zero")
    return as_json(
        {
            "model_type": values.get("model_type", f"dicache_{schedule.anatomy.model}"),
            "rel_l1_thresh": policy.threshold,
            "start_percent": _percent(first, steps, above=True),
            "end_percent": _percent(last, steps, above=False),
            "coefficients": list(policy.coefficients),
        }
    )


def _percent(step: int, steps: int, *, above: bool) -> float:
    """Return the percentage in the node's two digits at which skipping begins or ends with a step.

    Raises:
        FormatError: If two digits do not tell the step from its neighbours.
    """
    for percent in (count / 100 for count in range(101)):
        found = min((i for i in range(steps) if i / steps >= percent), default=steps)
        if above and found == step:
            return percent
        if not above and max((i for i in range(steps) if i / steps <= percent), default=-1) == step:
            return percent
    raise FormatError(f"the node's percentages have two digits, which do not tell step {step} of {steps} from others")


def read(path: Path, given: Given) -> Read:
    content = check_keys(str(path), read_json(path), KEYS, ("rel_l1_thresh", "coefficients"))
    start = number(f"{path}: start_percent", content.get("start_percent", 0.0), least=0)
    end = number(f"{path}: end_percent", content.get("end_percent", 1.0), least=0)
    within = [step for step in range(given.steps) if start <= step / given.steps <= end]
    if not within:
        raise FormatError(f"{path}: skips at no step: from {start:g} to {end:g} of the steps")
    policy = read_policy(
        read_coefficients(f"{path}: coefficients", content["coefficients"]),
        number(f"{path}: rel_l1_thresh", content["rel_l1_thresh"], least=0),
        "reference",
        first_steps=max(1, within[0]),
        last_steps=given.steps - 1 - within[-1],
    )
    return Read("teacache", settings_of(policy), policy=policy)


FORMAT = Format(
    name="comfyui-teacache",
    engine="ComfyUI-TeaCache at commit 3657f7f",
    source="welltop-cn/ComfyUI-TeaCache: nodes.py",
    suffix=".json",
    holds="TeaCache with a polynomial of degree 4 or less",
    loses="the range that x is held in",
    use=(
        "Put the coefficients in the place of those of your model's type in SUPPORTED_MODELS_COEFFICIENTS of nodes.py,",
        "and set the other values in the node. It knows Flux, HiDream, HunyuanVideo, LTX and Wan; of Wan and HiDream",
        "it takes the time embedding, for which dicache's coefficients mean nothing.",
    ),
    export=export,
    read=read,
)
