"""LightX2V's JSON configuration of feature caching: MagCache's ratios for masks, TeaCache's polynomial.

References:
    ModelTC/LightX2V, `models/networks/wan/infer/feature_caching/transformer_infer.py` and
    `models/networks/hunyuan_video/infer/feature_caching/transformer_infer.py` (commit 1ae5ec4), `configs/caching`.
    Of Wan it takes two lists, of the guided and the unguided pass, and skips below the threshold from step
    int(steps * retention) on; Wan's TeaCache is of the time embedding, HunyuanVideo's of the modulated input.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicache.calibrate.magcache import simulate
from dicache.calibrate.methods import body_plan
from dicache.formats.files import as_json, check_keys, number, numbers, read_json, whole
from dicache.formats.format import Format, FormatError, Given, Losses, Read
from dicache.formats.polynomials import policy_of, read_coefficients, read_policy, settings_of
from dicache.formats.skip_ratios import THRESHOLD, ratios, whole_mask
from dicache.schedules import Schedule
from dicache.schedules.plan import ACT

MAG = (
    "feature_caching",
    "magcache_calibration",
    "magcache_K",
    "magcache_thresh",
    "magcache_retention_ratio",
    "magcache_ratios",
)
TEA = ("feature_caching", "coefficients", "use_ret_steps", "teacache_thresh")
PASSES = ("cond", "uncond")


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    if schedule.policy is not None:
        policy = policy_of(schedule, losses, "reference")
        if (policy.first_steps, policy.last_steps) != (1, 1):
            losses.beyond.append("the first and the last step would be computed always, and no others")
        return as_json(
            {
                "feature_caching": "Tea",
                "coefficients": list(policy.coefficients),
                "use_ret_steps": False,
                "teacache_thresh": policy.threshold,
            }
        )
    rows = [ratios(letters) for letters in _of_passes(schedule, losses)]
    return as_json(
        {
            "feature_caching": "Mag",
            "magcache_calibration": False,
            "magcache_K": schedule.steps,
            "magcache_thresh": THRESHOLD,
            "magcache_retention_ratio": 0.0,
            "magcache_ratios": rows,
        }
    )


def _of_passes(schedule: Schedule, losses: Losses) -> list[str]:
    """Return the mask of the guided and of the unguided pass."""
    plan = schedule.plan
    assert plan is not None
    if set(plan.contexts) - set(PASSES) or not plan.contexts:
        return [whole_mask(schedule, losses).letters] * 2
    rows = []
    for name in PASSES:
        table = plan.table(schedule.anatomy, name)
        if {"C", "S"} != set("".join(table.values())) or len(set(table.values())) > 1:
            return [whole_mask(schedule, losses).letters] * 2
        rows.append(next(iter(table.values())).replace("S", ACT))
    return rows


def read(path: Path, given: Given) -> Read:
    content = read_json(path)
    kind = content.get("feature_caching") if isinstance(content, Mapping) else None
    if kind == "Tea":
        return _read_polynomial(path, {key: value for key, value in content.items() if key in TEA}, given)
    if kind != "Mag":
        raise FormatError(f"{path}: feature_caching must be Mag or Tea, found {kind!r}")
    if "infer_steps" in content and content["infer_steps"] != given.steps:
        raise FormatError(f"{path} is for {content['infer_steps']} steps, but {given.steps} are asked for")
    settings = check_keys(str(path), {key: content[key] for key in content if key in MAG}, MAG, MAG[2:])
    rows = settings["magcache_ratios"]
    if not isinstance(rows, list) or len(rows) != len(PASSES):
        raise FormatError(f"{path}: magcache_ratios must be two lists, of the guided and of the unguided pass")
    threshold = number(f"{path}: magcache_thresh", settings["magcache_thresh"], least=0)
    most = whole(f"{path}: magcache_K", settings["magcache_K"], least=0)
    begins = int(
        given.steps * number(f"{path}: magcache_retention_ratio", settings["magcache_retention_ratio"], least=0)
    )
    letters = {}
    for name, row in zip(PASSES, rows, strict=True):
        found = numbers(f"{path}: magcache_ratios", row)
        if len(found) != given.steps:
            raise FormatError(f"{path} has {len(found)} ratios a pass, but {given.steps} steps are asked for")
        counted = [1.0] * begins + found[begins:]  # before that step nothing is added up
        below = threshold * (1 - 1e-12)  # it skips below the threshold, and not at it
        letters[name] = simulate(counted, below, most, (begins - 0.5) / given.steps)
    return Read("magcache", dict(settings), plan=body_plan(letters))


def _read_polynomial(path: Path, content: Mapping[str, Any], given: Given) -> Read:
    settings = check_keys(str(path), content, TEA, ("coefficients", "teacache_thresh"))
    rows = settings["coefficients"]
    if isinstance(rows, list) and rows and isinstance(rows[0], list):
        raise FormatError(
            f"{path} is for Wan, whose polynomials are of the time embedding; take one with `dicache calibrate "
            "teacache --published`"
        )
    policy = read_policy(
        read_coefficients(f"{path}: coefficients", rows),
        number(f"{path}: teacache_thresh", settings["teacache_thresh"], least=0),
        "reference",
    )
    return Read("teacache", settings_of(policy), policy=policy)


FORMAT = Format(
    name="lightx2v",
    engine="LightX2V at commit 1ae5ec4",
    source="ModelTC/LightX2V: models/networks/{wan,hunyuan_video}/infer/feature_caching/transformer_infer.py",
    suffix=".json",
    holds="masks of whole steps of all blocks, one for each of two guidance passes; TeaCache of HunyuanVideo",
    loses="branches; the range that x is held in",
    use=(
        "Copy the keys into the configuration that --config_json names, with infer_steps as the schedule has them.",
        "The polynomial is for HunyuanVideo: Wan's is of the time embedding, and is published (configs/caching).",
    ),
    export=export,
    read=read,
)
