"""Files of other projects: what they mean, and that what is wrong, unknown or hostile in them is refused."""

import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dicache.calibrate.magcache import MagCache
from dicache.calibrate.pab import Pab
from dicache.formats import FormatError, Given, find, imported
from dicache.formats.files import read_json
from dicache.schedules import FirstBlockPolicy, Schedule, Target, TeaCachePolicy
from tests.toys import written

BLOCKS, STEPS = 10, 8
ANATOMY = written(BLOCKS)
FIVE = [1.0, 2.0, 3.0, 4.0, 5.0]


def read(folder: Path, name: str, content: Any, steps: int = STEPS, **settings: Any) -> Schedule:
    path = folder / "file"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return imported(path, find(name), Given("toy", ANATOMY, Target(), steps, settings))


def row(schedule: Schedule, site: str = "5.attn") -> str:
    return schedule.table()[site]


def test_cache_dit_settings_have_its_defaults(tmp_path: Path) -> None:
    made = read(tmp_path, "cache-dit", "cache_config: {residual_diff_threshold: 0.12}")
    assert made.policy == FirstBlockPolicy(0.12, first=8, first_steps=8)
    static = "cache_config: {steps_computation_mask: fast, steps_computation_policy: static, Fn_compute_blocks: 1}"
    assert row(read(tmp_path, "cache-dit", static)) == "CCCSCSSC"
    assert row(read(tmp_path, "cache-dit", static), "0.attn") == "C" * STEPS


def test_vllm_omni_has_defaults_of_its_own(tmp_path: Path) -> None:
    content = {"cache_backend": "cache_dit", "cache_config": {"residual_diff_threshold": 0.2}}
    assert read(tmp_path, "vllm-omni", content).policy == FirstBlockPolicy(0.2, max_continuous=3, first_steps=4)
    content = {"cache_backend": "tea_cache", "cache_config": {"rel_l1_thresh": 0.2, "coefficients": FIVE}}
    made = read(tmp_path, "vllm-omni", content).policy
    assert isinstance(made, TeaCachePolicy)
    assert (made.rescale(-0.9), made.last_steps) == (made.rescale(0.0), 0)
    assert made.negative == "abs"


def test_xdit_puts_a_taylor_expansion_and_a_mask_onto_what_does_not_say_otherwise(tmp_path: Path) -> None:
    mask = {"Fn_compute_blocks": 1, "steps_computation_mask": [1, 0] * 4, "steps_computation_policy": "static"}
    foretold = read(tmp_path, "xdit", mask)
    held = read(tmp_path, "xdit", {**mask, "enable_taylorseer": False})
    assert row(foretold) == row(held) == "CS" * 4
    assert foretold.plan is not None
    assert held.plan is not None
    assert (foretold.plan.rules[0].order, held.plan.rules[0].order) == (1, 0)


def test_smoothcache_names_are_modules_or_branches_and_a_block_goes_before_all(tmp_path: Path) -> None:
    rows = {"attn1": [1, 0, 1, 0, 1, 0, 1, 0], "attn1-5": [1, 1, 0, 0, 1, 1, 1, 1], "mlp": [1, 1, 1, 1, 0, 0, 0, 0]}
    made = read(tmp_path, "smoothcache", rows)
    assert (row(made), row(made, "4.attn"), row(made, "4.mlp")) == ("CCRRCCCC", "CRCRCRCR", "CCCCRRRR")


def test_a_mask_is_a_list_or_digits_of_blocks_or_branches(tmp_path: Path) -> None:
    for content in ([1, 0, 0, 1, 0, 0, 1, 1], "10010011", "1 0 0 1\n0 0 1 1\n", "1,0,0,1,0,0,1,1"):
        assert row(read(tmp_path, "mask", content)) == "CSSCSSCC"
    assert row(read(tmp_path, "mask", "10010011", hold="branches")) == "CRRCRRCC"


def test_magcache_ratios_are_played_through_by_the_rule_that_is_given(tmp_path: Path) -> None:
    ratios = [1.0, 1.1, 1.02, 1.0, 0.99, 1.0, 0.9, 0.8]
    settings: dict[str, Any] = {"threshold": 0.06, "max_skip": 2, "retention": 0.2}
    made = read(tmp_path, "magcache-ratios", ratios, **settings)
    assert row(made).replace("S", ".") == MagCache(0.06, 2, 0.2).simulate(ratios)
    turns = [1.0, 1.0, *[value for ratio in ratios[1:] for value in (ratio, 2.0)]]
    made = read(tmp_path, "magcache-ratios", turns, **settings)
    assert made.table("cond")["5.attn"] == row(read(tmp_path, "magcache-ratios", ratios, **settings))
    assert made.table("uncond")["5.attn"] == "C" * STEPS
    assert made.table("uncond") == read(tmp_path, "magcache-ratios", [ratios, turns[1::2]], **settings).table("uncond")
    with pytest.raises(FormatError, match="does not say the max skip of MagCache's rule; give --max-skip"):
        read(tmp_path, "magcache-ratios", ratios, threshold=0.06)


def test_lightx2v_reads_what_its_configurations_hold_besides(tmp_path: Path) -> None:
    ratios = [1.0, 1.0, 1.0, 1.5, 1.0, 1.0, 1.0, 1.0]
    content = {
        "infer_steps": STEPS,
        "cpu_offload": False,
        "feature_caching": "Mag",
        "magcache_K": 2,
        "magcache_thresh": 0.12,
        "magcache_retention_ratio": 0.3,
        "magcache_ratios": [ratios, ratios],
    }
    # From step int(8 * 0.3) = 2 on: 2 is skipped, 3 by its ratio not, then two in a row at most.
    assert row(read(tmp_path, "lightx2v", content)) == "CCSCSSCS"
    with pytest.raises(FormatError, match="Wan, whose polynomials are of the time embedding"):
        read(tmp_path, "lightx2v", {"feature_caching": "Tea", "coefficients": [FIVE, FIVE], "teacache_thresh": 0.2})


def test_sglang_counts_boundaries_in_steps_or_shares_of_them(tmp_path: Path) -> None:
    def policy(**content: Any) -> TeaCachePolicy:
        made = read(tmp_path, "sglang-teacache", {"coefficients": FIVE, "teacache_thresh": 0.2, **content}).policy
        assert isinstance(made, TeaCachePolicy)
        return made

    assert (policy().first_steps, policy().last_steps) == (5, 1)
    assert policy(teacache_thresh=0).threshold == 0  # all is computed; and not that none is said
    shares = policy(start_skipping=0.25, end_skipping=0.5)
    assert (shares.first_steps, shares.last_steps) == (2, 4)
    with pytest.raises(FormatError, match="use_ret_steps is for Wan"):
        policy(use_ret_steps=True)
    with pytest.raises(FormatError, match="two models that share the steps"):
        policy(expert_coefficients={"high": FIVE, "low": FIVE})


def test_diffusers_broadcast_is_planned_by_the_samplers_timesteps(tmp_path: Path) -> None:
    kwargs = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": [100, 800]}
    content = {"class": "PyramidAttentionBroadcastConfig", "kwargs": kwargs}
    assert read(tmp_path, "diffusers-pab", content).plan == Pab({"attn": 2}).plan(ANATOMY, STEPS)


def test_a_published_router_is_read_as_calibrate_l2c_reads_it(tmp_path: Path) -> None:
    routers = {f"{i}.prob": torch.full((2 * BLOCKS,), 4.0 if i == 2 else -4.0) for i in range(STEPS)}
    torch.save({"routers": routers, "opt": {}, "args": None}, tmp_path / "router.pt")
    made = imported(tmp_path / "router.pt", find("l2c-router"), Given("toy", ANATOMY, Target(), STEPS))
    assert row(made) == "CRCRCCCR"  # index 2 counts from the last step
    all_computed = Given("toy", ANATOMY, Target(), STEPS, settings={"threshold": 0.0})
    assert row(imported(tmp_path / "router.pt", find("l2c-router"), all_computed)) == STEPS * "C"
    assert made.measured["imported"]["format"] == "l2c-router"


WRONG: dict[str, tuple[str, Any, str]] = {
    "a misspelt key": (
        "cache-dit",
        "cache_config: {enable_sperate_cfg: true}",
        "unknown key 'enable_sperate_cfg'",
    ),
    "an unknown section": ("cache-dit", "cache_confg: {}", "unknown key 'cache_confg'"),
    "a setting without a counterpart": (
        "cache-dit",
        "cache_config: {enable_dmd: true}",
        "no counterpart of enable_dmd: True",
    ),
    "an object that Python would build": (
        "cache-dit",
        "cache_config: !!python/object/apply:os.system ['true']",
        "is not plain YAML",
    ),
    "too few blocks": ("cache-dit", "cache_config: {Fn_compute_blocks: 10}", "this Toy has 10"),
    "a mask of another length": ("mask", [1, 0, 1], "is for 3 steps, but 8 are asked for"),
    "a mask that begins with nothing": ("mask", [0] + [1] * 7, "does not compute the first step"),
    "a mask of words": ("mask", "compute", "must hold 0 and 1 only"),
    "true is no number": ("smoothcache", {"attn1": [True] * 8}, "must hold 0 and 1 only, found True"),
    "an unknown component": ("smoothcache", {"attn7": [1] * 8}, "Toy has no attn7; it has attn1, attn, ff, mlp"),
    "not JSON": ("smoothcache", "{'attn1': [1]}", "is not JSON"),
    "not a number": ("teacache-coefficients", "[NaN, 1, 2, 3, 4]", "needed a finite number"),
    "four coefficients": ("teacache-coefficients", [1, 2, 3, 4], "must be 5 numbers, highest power first"),
    "another class": ("diffusers-magcache", {"class": "FasterCacheConfig", "kwargs": {}}, "needed MagCacheConfig"),
    "no ratios": ("diffusers-magcache", {"class": "MagCacheConfig", "kwargs": {}}, "needed mag_ratios"),
    "a pattern that may take for ever": (
        "diffusers-taylorseer",
        {"class": "TaylorSeerCacheConfig", "kwargs": {"cache_identifiers": ["(a+)+b"]}},
        "a group that repeats",
    ),
    "a pattern for nothing": (
        "diffusers-taylorseer",
        {"class": "TaylorSeerCacheConfig", "kwargs": {"cache_identifiers": ["nothing"]}},
        "none of its cache_identifiers matches",
    ),
    "a request of other fields": ("sglang-dpcache", {"schema": "sglang-dpcache-schedule-v1"}, "no predictor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str, tmp_path: Path) -> None:
    name, content, said = WRONG[case]
    with pytest.raises(FormatError) as refused:
        read(tmp_path, name, content, threshold=0.2)
    assert said in str(refused.value)


def test_a_file_that_is_missing_too_large_or_not_text_is_refused(tmp_path: Path) -> None:
    given = Given("toy", ANATOMY, Target(), STEPS)
    large, binary = tmp_path / "large", tmp_path / "binary"
    large.write_bytes(b"1" * (5 << 20))
    binary.write_bytes(b"\xff\xfe\x00")
    for path, said in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "is a folder"),
        (large, "larger"),
        (binary, "text"),
    ):
        with pytest.raises(FormatError, match=said):
            imported(path, find("mask"), given)


def test_what_a_file_says_of_its_sampler_binds_the_schedule(tmp_path: Path) -> None:
    timesteps = tuple(float(900 - 100 * i) for i in range(STEPS))
    given = Target(scheduler="DDIMScheduler", timesteps=tuple(t + 50 for t in timesteps), noise_levels=(0.0,) * STEPS)
    request = dict.fromkeys(
        ("pipeline", "checkpoint", "quality", "attention_backend", "scheduler_config_sha256"), "x"
    ) | {
        "num_inference_steps": STEPS,
        "height": 8,
        "width": 8,
        "guidance_scale": 4.5,
        "do_classifier_free_guidance": True,
        "dtype": "bfloat16",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "timesteps": list(timesteps),
        "sigmas": [0.5] * (STEPS + 1),
    }
    content = {
        "schema": "sglang-dpcache-schedule-v2",
        "schedule_method": "exact-pair-state-dp",
        "predictor": {
            "name": "final-feature-linear-extrapolation",
            "order": 1,
            "arithmetic": "feature-dtype-elementwise-v1",
        },
        "objective": "pact-mean-abs-final-feature-predicted-steps-only-v1",
        "source_commit": "abc",
        "request": request,
        "mandatory_full_steps": [0, 1, 2],
        "force_last_full": False,
        "max_gap": 3,
        "num_full_steps": 4,
        "full_steps": [0, 1, 2, 5],
        "calibrated_cost": 0.1,
        "calibration": {"manifest_sha256": "0" * 64, "num_samples": 16},
    }
    path = tmp_path / "dp.json"
    path.write_text(json.dumps(content))
    made = imported(path, find("sglang-dpcache"), Given("toy", ANATOMY, given, STEPS))
    assert row(made) == "CCCSSCSS"
    assert made.target == replace(
        given,
        dtype="bfloat16",
        scheduler="FlowMatchEulerDiscreteScheduler",
        num_inference_steps=STEPS,
        timesteps=timesteps,
        noise_levels=None,
        guidance=4.5,
    )
    path.write_text(json.dumps({**content, "max_gap": 2}))
    with pytest.raises(FormatError, match="further apart than its max_gap of 2"):
        imported(path, find("sglang-dpcache"), Given("toy", ANATOMY, given, STEPS))


@pytest.mark.parametrize(
    ("text", "said"),
    [("[" + "9" * 5000 + "]", "a whole number of 5000 digits"), ("[" * 5000, "deep"), ("[NaN]", "finite")],
)
def test_json_is_limited_as_that_of_schedules_is(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(FormatError, match=said):
        read_json(file)


def test_yaml_that_repeats_itself_inside_is_refused_at_once(tmp_path: Path) -> None:
    names = "abcdefgh"
    lists = [f"&a [{', '.join('x' * 10)}]"]
    lists += [f"&{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in pairwise(names)]
    file = tmp_path / "bomb.yaml"
    file.write_text(f"cache_config:\n  Fn_compute_blocks: [{', '.join(lists)}]")  # of 10^8 words, if it is written out
    since = time.process_time()
    with pytest.raises(FormatError, match="Fn_compute_blocks must be a whole number") as error:
        imported(file, find("cache-dit"), Given("toy", ANATOMY, Target(), STEPS))
    assert len(str(error.value)) < 300
    assert time.process_time() - since < 2  # and not a minute
