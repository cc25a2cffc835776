"""A profile, and a calibration from it, of one of two models that share the steps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

import dicache
from dicache.calibrate.adacache import AdaCache
from dicache.calibrate.teacache import TeaCache
from dicache.models.sampling import Sampling, sample
from dicache.profiler import Profile, storage
from dicache.profiler.profiling import profile_pipeline
from dicache.runtime import CacheError
from tests.runtime.test_two_models import NAMES, STEPS, TEXT, model
from tests.tiny import randomised

SAMPLING = Sampling(STEPS, 3.0, 32, 32, 5)
PROMPTS = ["a fox", "a hare", "a crow"]


class Pipeline(WanPipeline):  # type: ignore[misc] # diffusers has no types for it
    """Makes something of a prompt without a text encoder."""

    def encode_prompt(self, prompt: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        texts = [torch.randn(5, TEXT, generator=torch.Generator().manual_seed(len(text))) for text in prompts]
        return torch.stack(texts), torch.zeros(len(texts), 5, TEXT)


def pipeline() -> Any:
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = Pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=randomised(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=model(0),
        transformer_2=model(1),
        boundary_ratio=0.7,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Profile]:
    folder = tmp_path_factory.mktemp("profiles")
    made = {}
    for name in NAMES:
        file = profile_pipeline(
            pipeline(), "wan", folder / f"{name}.h5", PROMPTS, sampling=SAMPLING, component=name, progress=False
        )
        made[name] = storage.load(file)
    return made


def seen(profile: Profile) -> np.ndarray:
    """Return at which steps the model's branches were measured."""
    return np.asarray(np.isfinite(profile.arrays["sites/abs_l1"][..., 0]).all(axis=(0, 1, 3)))


def test_each_profile_has_the_steps_of_its_model_and_no_others(profiles: dict[str, Profile]) -> None:
    first, second = (seen(profiles[name]) for name in NAMES)
    assert first[0]
    assert second[-1]
    assert (first ^ second).all()
    for name, profile in profiles.items():
        assert all(run.ok for run in profile.runs)
        assert profile.provenance.settings["component"] == name
        assert np.isfinite(np.diagonal(profile.arrays["body/gram"], axis1=1, axis2=2)).all(axis=0).tolist() == list(
            seen(profile)
        )


def test_schedules_from_both_profiles_save_what_they_expect(profiles: dict[str, Profile]) -> None:
    pipe = pipeline()
    made = {name: TeaCache(target_speedup=1.2, degree=1, last_steps=0).calibrate(profiles[name]) for name in NAMES}
    for name, schedule in made.items():
        assert schedule.measured["computed_steps"] < seen(profiles[name]).sum()
        assert 1 / schedule.macs_fraction() >= 1.2
    with (
        dicache.apply(pipe, made["transformer"], component="transformer") as high,
        dicache.apply(pipe, made["transformer_2"], component="transformer_2") as low,
    ):
        for seed, prompt in enumerate(PROMPTS):  # the profile's own runs
            sample(pipe, [prompt], [seed], SAMPLING)
        for cache, name in ((high, "transformer"), (low, "transformer_2")):
            # Skipping changes what is decided by: a decision that is close may fall otherwise, as the processor rounds.
            one = 2 / cache.stats.calls  # step, in both passes
            assert cache.stats.macs_fraction == pytest.approx(made[name].macs_fraction(), abs=one)


def test_adacache_counts_the_steps_of_its_model_alone(profiles: dict[str, Profile]) -> None:
    for profile in profiles.values():
        schedule = AdaCache(preset="slow", motion="none").calibrate(profile)
        assert schedule.measured["computed_steps"] <= seen(profile).sum()


def test_a_schedule_for_one_is_refused_for_the_other(profiles: dict[str, Profile]) -> None:
    schedule = TeaCache(threshold=0.1, degree=1).calibrate(profiles["transformer"])
    with pytest.raises(dicache.ScheduleError, match="weights"):
        dicache.apply(pipeline(), schedule, component="transformer_2")


def test_which_model_is_profiled_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="two models that share its steps"):
        profile_pipeline(pipeline(), "wan", tmp_path / "wan.h5", PROMPTS, sampling=SAMPLING, progress=False)
