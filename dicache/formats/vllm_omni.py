"""vLLM-Omni's cache backend and its settings: tea_cache, cache_dit or, for masks, mag_cache.

References:
    vllm-project/vllm-omni, `diffusion/data.py` (`DiffusionCacheConfig`, commit 0027c20),
    `diffusion/cache/magcache/hook.py` (45d71af) and `diffusion/cache/teacache` (011a7ac): TeaCache takes the magnitude
    of p(x) and always computes the first step only; MagCache is diffusers' rule.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicache.formats.dbcache import DEFAULTS, read_settings, settings_of
from dicache.formats.diffusers_magcache import follows
from dicache.formats.files import as_json, check_keys, number, numbers, read_json, whole
from dicache.formats.format import Format, FormatError, Given, Losses, Read
from dicache.formats.polynomials import policy_of, read_coefficients, read_policy
from dicache.formats.polynomials import settings_of as of_policy
from dicache.formats.skip_ratios import ratios, rule, whole_mask
from dicache.formats.steps import body_plan
from dicache.schedules import FirstBlockPolicy, Schedule

MAG = {  # settings of its MagCache, and what diffusers calls them
    "mag_threshold": "threshold",
    "mag_max_skip_steps": "max_skip_steps",
    "mag_retention_ratio": "retention_ratio",
    "mag_ratios": "mag_ratios",
    "num_inference_steps": "num_inference_steps",
}
OWN_DEFAULTS = {**DEFAULTS, "Fn_compute_blocks": 1, "max_warmup_steps": 4, "residual_diff_threshold": 0.24}
OWN_DEFAULTS |= {"max_continuous_cached_steps": 3}
NO_MASK = ("steps_computation_mask", "steps_computation_policy")  # it takes none of the user's


def export(schedule: Schedule, losses: Losses, values: Mapping[str, Any]) -> str:
    if isinstance(schedule.policy, FirstBlockPolicy):
        settings = settings_of(schedule, losses)
        if "steps_computation_mask" in settings:
            losses.beyond.append(f"none would be computed always of the last steps, here {schedule.policy.last_steps}")
        return _written("cache_dit", {key: value for key, value in settings.items() if key not in NO_MASK})
    if schedule.policy is not None:
        policy = policy_of(schedule, losses, "abs")
        if policy.threshold <= 0:
            raise FormatError(f"vLLM-Omni takes thresholds above 0, found {policy.threshold:g}")
        if policy.first_steps > 1:
            losses.beyond.append(f"only the first step would be computed always, not the first {policy.first_steps}")
        if policy.last_steps:
            losses.stated.append(f"steps at the end that are always computed: {policy.last_steps}")
        return _written("tea_cache", {"rel_l1_thresh": policy.threshold, "coefficients": list(policy.coefficients)})
    made = {**rule(schedule.steps), "mag_ratios": ratios(whole_mask(schedule, losses).letters)}
    made["num_inference_steps"] = schedule.steps
    return _written("mag_cache", {name: made[theirs] for name, theirs in MAG.items()})


def _written(backend: str, config: Mapping[str, Any]) -> str:
    return as_json({"cache_backend": backend, "cache_config": dict(config)})


def read(path: Path, given: Given) -> Read:
    keys = ("cache_backend", "cache_config")
    content = check_keys(str(path), read_json(path), keys, keys)
    what, config = f"{path}: cache_config", content["cache_config"]
    if content["cache_backend"] == "cache_dit":
        return _read_dbcache(what, config, given)
    if content["cache_backend"] == "tea_cache":
        found = check_keys(what, config, ("rel_l1_thresh", "coefficients"), ("rel_l1_thresh", "coefficients"))
        policy = read_policy(
            read_coefficients(f"{what}: coefficients", found["coefficients"]),
            number(f"{what}: rel_l1_thresh", found["rel_l1_thresh"], least=0),
            "abs",
            last_steps=0,
        )
        return Read("teacache", of_policy(policy), policy=policy)
    if content["cache_backend"] != "mag_cache":
        raise FormatError(
            f"{path}: cache_backend must be tea_cache, cache_dit or mag_cache, found {content['cache_backend']!r}"
        )
    found = check_keys(what, config, MAG, ("mag_ratios", "num_inference_steps"))
    defaults = {"mag_threshold": 0.24, "mag_max_skip_steps": 5, "mag_retention_ratio": 0.1}
    settings = {theirs: {**defaults, **found}[name] for name, theirs in MAG.items()}
    if (
        not whole(what, settings["num_inference_steps"], least=1)
        == len(numbers(what, settings["mag_ratios"]))
        == given.steps
    ):
        raise FormatError(
            f"{path} is for {settings['num_inference_steps']} steps with {len(settings['mag_ratios'])} ratios, and "
            f"{given.steps} are asked for"
        )
    return Read("magcache", settings, plan=body_plan(follows(what, settings), given))


def _read_dbcache(what: str, config: Any, given: Given) -> Read:
    """Read what its cache-dit backend takes: presets by another name, and no masks."""
    settings = dict(check_keys(what, config, [*DEFAULTS, "scm_steps_mask_policy", "scm_steps_policy"]))
    if given_mask := [key for key in NO_MASK if key in settings]:
        raise FormatError(f"{what}: vLLM-Omni passes over {given_mask[0]}; it takes scm_steps_mask_policy")
    if (preset := settings.pop("scm_steps_mask_policy", None)) is not None:
        settings["steps_computation_mask"] = preset
    settings["steps_computation_policy"] = settings.pop("scm_steps_policy", "dynamic")
    return read_settings(what, settings, given, OWN_DEFAULTS)


FORMAT = Format(
    name="vllm-omni",
    engine="vLLM-Omni at commit 0027c20",
    source="vllm-project/vllm-omni: vllm_omni/diffusion/data.py, vllm_omni/diffusion/cache",
    suffix=".json",
    holds="masks of whole steps of all blocks, held; TeaCache of degree 4 or less; first-block schedules",
    loses="branches; the range that x is held in; last steps that are always computed",
    use=(
        "made = json.load(open('FILE')); Omni(model=..., **made)",
        'or: vllm serve MODEL --omni --cache-backend BACKEND --cache-config "$(jq -c .cache_config FILE)"',
        "Ask for as many steps as the schedule has: others run by the ratios that there are, without a word.",
    ),
    export=export,
    read=read,
)
