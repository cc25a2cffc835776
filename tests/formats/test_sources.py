"""Exports to engines that are not installed here, held against what their sources say: names, types, limits and rules.

The tables are of the files and commits that each converter names.
"""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from dicache.formats import export, find
from dicache.schedules import FirstBlockPolicy, Plan, Rule, Schedule, Target, TeaCachePolicy
from tests.toys import written

ANATOMY, STEPS, LETTERS = written(6), 10, "CC.C..C..."
WANTED = [0, 1, 3, 6]
NUMBER = (int, float)

TEACACHE_PARAMS = {  # SGLang
    "cache_type": str,
    "teacache_thresh": NUMBER,
    "start_skipping": NUMBER,
    "end_skipping": NUMBER,
    "coefficients": list,
    "use_ret_steps": bool,
    "expert_coefficients": dict,
    "expert_thresh": dict,
}
DIFFUSION_CACHE_CONFIG = {  # vLLM-Omni
    "rel_l1_thresh": NUMBER,
    "coefficients": list,
    "mag_threshold": NUMBER,
    "mag_max_skip_steps": int,
    "mag_retention_ratio": NUMBER,
    "mag_ratios": list,
    "mag_calibrate": bool,
    "Fn_compute_blocks": int,
    "Bn_compute_blocks": int,
    "max_warmup_steps": int,
    "max_cached_steps": int,
    "residual_diff_threshold": NUMBER,
    "max_continuous_cached_steps": int,
    "enable_taylorseer": bool,
    "taylorseer_order": int,
    "scm_steps_mask_policy": str,
    "scm_steps_policy": str,
    "num_inference_steps": int,
}
DB_CACHE_PRESET = {  # xDiT
    "Fn_compute_blocks": int,
    "Bn_compute_blocks": int,
    "residual_diff_threshold": NUMBER,
    "max_warmup_steps": int,
    "max_cached_steps": int,
    "scm_policy": (str, type(None)),
    "enable_taylorseer": bool,
    "enable_separate_cfg": bool,
    "enable_encoder_calibrator": bool,
}
DB_CACHE_CONFIG = {  # of cache-dit, which xDiT passes further keys to
    "max_continuous_cached_steps": int,
    "num_inference_steps": int,
    "steps_computation_mask": list,
    "steps_computation_policy": str,
}
LIGHTX2V_MAG = {
    "feature_caching": str,
    "magcache_calibration": bool,
    "magcache_K": int,
    "magcache_thresh": NUMBER,
    "magcache_retention_ratio": NUMBER,
    "magcache_ratios": list,
}
LIGHTX2V_TEA = {"feature_caching": str, "coefficients": list, "use_ret_steps": bool, "teacache_thresh": NUMBER}


def body(letters: str = LETTERS, **rule: Any) -> Schedule:
    return Schedule("drawn", {}, ANATOMY, Target(), STEPS, Plan(STEPS, (Rule("skip", letters, **rule),)))


def tea(**fields: Any) -> Schedule:
    policy = TeaCachePolicy(0.25, (0.0, 1.0, 2.0, 3.0, 0.5), (0.0, 1.0), **fields)
    return Schedule("teacache", {}, ANATOMY, Target(), STEPS, policy=policy)


def made(schedule: Schedule, name: str, **values: Any) -> Any:
    return json.loads(export(schedule, find(name), values=values).text)


def conforms(content: Mapping[str, Any], kinds: Mapping[str, Any]) -> bool:
    return all(isinstance(value, kinds[key]) for key, value in content.items())


def test_sglang_takes_the_fields_of_its_teacache_params() -> None:
    content = made(tea(first_steps=3), "sglang-teacache")
    assert conforms(content, TEACACHE_PARAMS)
    assert type(content["start_skipping"]) is type(content["end_skipping"]) is int  # a float would be a share


def test_vllm_omni_takes_the_fields_of_its_cache_config() -> None:
    for schedule, backend in (
        (tea(last_steps=0), "tea_cache"),
        (body(), "mag_cache"),
        (Schedule("first-block", {}, ANATOMY, Target(), STEPS, policy=FirstBlockPolicy(0.2)), "cache_dit"),
    ):
        content = made(schedule, "vllm-omni")
        assert content["cache_backend"] == backend
        assert conforms(content["cache_config"], DIFFUSION_CACHE_CONFIG)


@pytest.mark.parametrize(
    "schedule",
    [body(blocks="1-5"), Schedule("first-block", {}, ANATOMY, Target(), STEPS, policy=FirstBlockPolicy(0.2))],
)
def test_xdit_takes_the_fields_of_its_preset_and_those_of_cache_dit(schedule: Schedule) -> None:
    content = made(schedule, "xdit")
    assert conforms(content, {**DB_CACHE_PRESET, **DB_CACHE_CONFIG})
    assert content["scm_policy"] is None  # else the mask of a preset is laid over it
    assert content["enable_taylorseer"] is False  # left out, it is on


def test_lightx2v_takes_its_keys() -> None:
    assert conforms(made(body(), "lightx2v"), LIGHTX2V_MAG)
    assert conforms(made(tea(), "lightx2v"), LIGHTX2V_TEA)


def test_the_node_of_comfyui_takes_two_digits_of_a_share() -> None:
    for first, last in ((1, 1), (3, 0), (2, 4)):
        content = made(tea(first_steps=first, last_steps=last), "comfyui-teacache")
        assert 0 < content["rel_l1_thresh"] <= 10
        shares = content["start_percent"], content["end_percent"]
        assert all(0 <= share <= 1 and round(share, 2) == share for share in shares)
        skipping = [i for i in range(STEPS) if shares[0] <= i / STEPS <= shares[1]]
        assert skipping == list(range(0 if first == 1 else first, STEPS - last))
        assert len(content["coefficients"]) == 5


def follow_lightx2v(content: Mapping[str, Any], generations: int) -> list[list[int]]:
    """Return what LightX2V computes for the guided pass, by its rule; it counts anew when a generation begins."""
    found = []
    for _ in range(generations):
        ratio, steps, error, computed = 1.0, 0, 0.0, []
        for step in range(STEPS):
            skip = False
            if step >= int(STEPS * content["magcache_retention_ratio"]):
                ratio *= content["magcache_ratios"][0][step]
                steps += 1
                error += abs(1 - ratio)
                skip = error < content["magcache_thresh"] and steps <= content["magcache_K"]
                if not skip:
                    ratio, steps, error = 1.0, 0, 0.0
            if not skip:
                computed.append(step)
        found.append(computed)
    return found


def follow_vllm_omni(config: Mapping[str, Any], generations: int) -> list[list[int]]:
    """Return what vLLM-Omni computes, by its rule; what it has kept is gone when its own count of steps is full."""
    found = []
    for _ in range(generations):
        ratio, steps, error, kept, computed = 1.0, 0, 0.0, False, []
        for step in range(STEPS):
            skip = False
            if step >= int(config["mag_retention_ratio"] * config["num_inference_steps"] + 0.5):
                ratio *= config["mag_ratios"][step]
                steps += 1
                error += abs(1.0 - ratio)
                skip = kept and error <= config["mag_threshold"] and steps <= config["mag_max_skip_steps"]
                if not skip:
                    ratio, steps, error = 1.0, 0, 0.0
            if not skip:
                computed.append(step)
                kept = True
        found.append(computed)
    return found


def test_the_rules_of_lightx2v_and_vllm_omni_compute_the_steps_of_the_plan_in_two_generations() -> None:
    assert follow_lightx2v(made(body(), "lightx2v"), 2) == [WANTED] * 2
    assert follow_vllm_omni(made(body(), "vllm-omni")["cache_config"], 2) == [WANTED] * 2


def test_an_artefact_of_dpcache_passes_the_checks_of_sglang() -> None:
    target = Target(scheduler="Euler", timesteps=tuple(float(900 - i) for i in range(STEPS)), guidance=4.0)
    schedule = Schedule("dp", {}, ANATOMY, target, STEPS, body(predictor="taylor", order=1).plan, measured={"runs": 3})
    others: dict[str, Any] = {"height": 512, "width": 512, "sigmas": [0.5] * (STEPS + 1), "quality": "auto"}
    for key in ("pipeline", "checkpoint", "scheduler_config_sha256"):
        others[key] = "x"
    found = made(schedule, "sglang-dpcache", **others)
    required = {
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
    }
    assert required <= found.keys()
    assert found["source_commit"]
    digest = found["calibration"]["manifest_sha256"]
    assert len(digest) == 64
    assert set(digest) <= set("0123456789abcdef")
    assert found["calibration"]["num_samples"] == 3
    request = found["request"]
    assert (len(request["timesteps"]), len(request["sigmas"])) == (request["num_inference_steps"], STEPS + 1)
    assert request["dtype"] == "bfloat16"
    assert type(request["do_classifier_free_guidance"]) is bool
    mandatory, full = found["mandatory_full_steps"], found["full_steps"]
    assert mandatory == list(range(len(mandatory)))
    assert len(mandatory) >= 2
    assert full == WANTED
    assert full[: len(mandatory)] == mandatory
    assert found["num_full_steps"] == len(full)
    assert found["force_last_full"] is False
