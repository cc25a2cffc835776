"""SGLang's DPCache artefact: the computed steps, and the request that they are for.

References:
    sgl-project/sglang, `multimodal_gen/runtime/cache/dpcache.py` (commit b9810f5): `validate_schedule` and
    `DPCacheRequestSignature` say what a file must hold.
"""

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dicache import __version__
from dicache.formats.files import as_json, check_keys, number, numbers, read_json, whole
from dicache.formats.format import Format, FormatError, Given, Losses, Read
from dicache.formats.steps import body_plan, step_mask
from dicache.schedules import Schedule, Target
from dicache.schedules.plan import ACT, COMPUTE
from dicache.schedules.schedule import dump

SCHEMA = "sglang-dpcache-schedule-v2"
PREDICTOR = {"name": "final-feature-linear-extrapolation", "order": 1, "arithmetic": "feature-dtype-elementwise-v1"}
OBJECTIVE = "pact-mean-abs-final-feature-predicted-steps-only-v1"
DTYPE = "bfloat16"  # the only one that it serves
REQUEST = (
    "pipeline",
    "checkpoint",
    "num_inference_steps",
    "height",
    "width",
    "guidance_scale",
    "do_classifier_free_guidance",
    "quality",
    "attention_backend",
    "dtype",
    "scheduler",
    "scheduler_config_sha256",
    "timesteps",
    "sigmas",
)
NEEDED = (
    "schema",
    "predictor",
    "objective",
    "source_commit",
    "request",
    "mandatory_full_steps",
    "force_last_full",
    "max_gap",
    "num_full_steps",
    "full_steps",
    "calibrated_cost",
    "calibration",
)
ANCHORS = 2  # full steps that an extrapolation needs


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    found = step_mask(schedule, losses, highest_order=1)
    leading = len(found.letters) - len(found.letters.lstrip(COMPUTE))
    if leading < ANCHORS:
        raise FormatError(f"DPCache computes the first {ANCHORS} steps always, and this plan skips step {leading}")
    if not found.covers(schedule.anatomy):
        losses.beyond.append(f"all blocks would be skipped, where the plan skips {found.first} to {found.stop - 1}")
    if found.order:
        losses.stated.append("what leaves the blocks is extrapolated, and not the change that they make")
    elif not losses.beyond:
        losses.beyond.append("what leaves the blocks would be extrapolated from the last two, where the plan holds")
    full = found.computed
    return as_json(
        {
            "schema": SCHEMA,
            "schedule_method": f"dicache-{schedule.method}",
            "predictor": PREDICTOR,
            "objective": OBJECTIVE,
            "source_commit": f"dicache-{__version__}",
            "request": _request(schedule, losses, values),
            "mandatory_full_steps": list(range(leading)),
            "force_last_full": full[-1] == schedule.steps - 1,
            "max_gap": None,
            "num_full_steps": len(full),
            "full_steps": full,
            "calibrated_cost": 0.0,
            "calibration": {
                "manifest_sha256": hashlib.sha256(dump(schedule.to_json()).encode()).hexdigest(),
                "num_samples": int(schedule.measured.get("runs", 0)),
            },
        }
    )


def _request(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request that SGLang compares: of the schedule what that says, and the rest as it was set."""
    target = schedule.target
    if target.dtype not in (None, DTYPE):
        losses.beyond.append(f"it would be served in {DTYPE}, and the schedule was made for {target.dtype}")
    says: dict[str, Any] = {
        "num_inference_steps": schedule.steps,
        "guidance_scale": target.guidance,
        "do_classifier_free_guidance": None if target.guidance is None else target.guidance > 1,
        "dtype": DTYPE,
        "scheduler": target.scheduler,
        "timesteps": None if target.timesteps is None else [float(np.float32(t)) for t in target.timesteps],
    }
    request = {key: values.get(key, says.get(key)) for key in REQUEST}
    optional = {"attention_backend"}
    if missing := [key for key in REQUEST if request[key] is None and key not in optional]:
        raise FormatError(
            f"DPCache binds a schedule to a request, of which the schedule does not say {', '.join(missing)}; set each "
            f"with --set, such as --set {missing[0]}=..., as SGLang's own artefacts for the model have them"
        )
    for key, length in (("timesteps", schedule.steps), ("sigmas", schedule.steps + 1)):
        if len(numbers(key, request[key])) != length:
            raise FormatError(f"{key} must be {length} numbers for {schedule.steps} steps, found {len(request[key])}")
    return request


def read(path: Path, given: Given) -> Read:
    content = check_keys(str(path), read_json(path), (*NEEDED, "schedule_method"), NEEDED)
    for key, needed in (("schema", SCHEMA), ("predictor", PREDICTOR), ("objective", OBJECTIVE)):
        if content[key] != needed:
            raise FormatError(f"{path}: found {key} {content[key]!r}, needed {needed!r}")
    request = check_keys(f"{path}: request", content["request"], REQUEST, REQUEST)
    steps = whole(f"{path}: num_inference_steps", request["num_inference_steps"], least=ANCHORS)
    if steps != given.steps:
        raise FormatError(f"{path} is for {steps} steps, but {given.steps} are asked for; import with --steps {steps}")
    full = content["full_steps"]
    if not isinstance(full, list) or any(type(step) is not int for step in full) or full != sorted(set(full)):
        raise FormatError(f"{path}: full_steps must be a rising list of steps, found {full!r}")
    if full[:ANCHORS] != list(range(ANCHORS)) or full[-1] >= steps:
        raise FormatError(f"{path}: full_steps must begin with 0 and 1 and lie within the {steps} steps, found {full}")
    gap = content["max_gap"]
    if gap is not None and max(b - a for a, b in pairwise([*full, steps])) > whole(f"{path}: max_gap", gap, least=1):
        raise FormatError(f"{path}: full_steps are further apart than its max_gap of {gap}; was it cut off?")
    if content["num_full_steps"] != len(full):
        raise FormatError(f"{path}: num_full_steps is {content['num_full_steps']!r}, found {len(full)} full_steps")
    timesteps = tuple(numbers(f"{path}: timesteps", request["timesteps"]))
    if len(timesteps) != steps:
        raise FormatError(f"{path}: timesteps must be {steps} numbers, found {len(timesteps)}")
    letters = "".join(COMPUTE if step in set(full) else ACT for step in range(steps))
    says = Target(
        dtype=str(request["dtype"]),
        scheduler=str(request["scheduler"]),
        num_inference_steps=steps,
        timesteps=timesteps,
        guidance=number(f"{path}: guidance_scale", request["guidance_scale"]),
    )
    settings = {key: content[key] for key in ("full_steps", "mandatory_full_steps", "force_last_full", "max_gap")}
    return Read("dp", {**settings, "request": dict(request)}, plan=body_plan(letters, given, order=1), says=says)


FORMAT = Format(
    name="sglang-dpcache",
    engine="SGLang at commit b9810f5",
    source="sgl-project/sglang: multimodal_gen/runtime/cache/dpcache.py",
    suffix=".json",
    holds="masks of whole steps of all blocks, the first two computed, by a Taylor expansion of order 1",
    loses="what is extrapolated is the output of the blocks, not their change",
    use=(
        "Put FILE into the folder of schedules that the server is started with, and ask for a budget of its",
        "num_full_steps. It is refused at the start for another pipeline, checkpoint or attention backend, and for",
        "each request that differs in any other field.",
    ),
    export=export,
    read=read,
)
