"""Run other projects' caches on a bundled model; `benchmarks.peers` starts this in an environment that has them.

Each peer is shown at its best: its state is made anew for every generation, because several of them carry it over into
the next image and spoil that; what its rule decides from the latents it decides for one image at a time, as for a
single user's; and where a pipeline does not enter the context that diffusers' hooks ask for, it is entered here. What
runs is the peers' own code; what it computes is counted by operator, as dicache's own runs are in its tests.

A job comes as a JSON file, and an answer a line goes out: what was made, as a file, and its share of the
multiply-accumulates; or why it does not run.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from functools import partial, wraps
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any

import diffusers.hooks as hooks
import numpy as np
import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, _FBC_LEADER_BLOCK_HOOK
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.mag_cache import _MAG_CACHE_BLOCK_HOOK, _MAG_CACHE_LEADER_BLOCK_HOOK
from diffusers.hooks.pyramid_attention_broadcast import _PYRAMID_ATTENTION_BROADCAST_HOOK
from diffusers.hooks.taylorseer_cache import _TAYLORSEER_CACHE_HOOK

from dicache.anatomy.macs import TOTAL, MacCounter
from dicache.evaluate.timing import interleaved, speedup
from dicache.models.loading import load
from dicache.models.sampling import Sampling, sample
from dicache.models.schedulers import is_flow

BLOCKS = r"(?:transformer_blocks|single_transformer_blocks|temporal_transformer_blocks)\.\d+"
EVERY_BRANCH = [rf"{BLOCKS}\.(?:attn\d?|ff|ff_context|proj_mlp|proj_out)"]  # TaylorSeer's own choice is attention alone
FLOW_TIMESTEPS = 1000  # a model of rectified flow is told timesteps of 0 to 1
LOOK_AFTER, MARGIN = 2, 0.1  # images, and how far above the largest budget a trial is not gone on with
Attached = Callable[[Any, "Bench"], AbstractContextManager[None]]


class Bench:
    """A pipeline, how it is called, and what one generation of it costs."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.pipeline = load(request["model"])
        self.sampling = Sampling(**request["sampling"])
        self.calibration = request["calibration"]
        self._ratios: list[float] = []
        self._costs: dict[int, tuple[float, float]] = {}

    @property
    def steps(self) -> int:
        assert self.sampling.steps is not None
        return self.sampling.steps

    def made(self, conditions: Sequence[str], seeds: Sequence[int]) -> tuple[np.ndarray, float]:
        """Return images, and the multiply-accumulates of all that was called for them."""
        counter = MacCounter()
        with counter:
            images = sample(self.pipeline, conditions, seeds, self.sampling)
        return images, float(counter.macs[TOTAL])

    def share(self, macs: float, conditions: Sequence[str], seeds: Sequence[int]) -> float:
        """Return the denoiser's share of its uncached multiply-accumulates; what encodes and decodes is taken off."""
        count = len(conditions)
        if count not in self._costs:
            counter, holder = MacCounter(), torch.nn.ModuleDict({"denoiser": self.pipeline.transformer})
            with counter.mark(holder, ["denoiser"]), counter:
                sample(self.pipeline, conditions, seeds, self.sampling)
            uncached = float(counter.macs["denoiser"])
            self._costs[count] = uncached, counter.macs[TOTAL] - uncached
        denoiser, others = self._costs[count]
        return (macs - others) / denoiser

    def ratios(self) -> list[float]:
        """Return MagCache's ratios by diffusers' own calibration, which prints them; of two passes the first's."""
        if not self._ratios:
            config = hooks.MagCacheConfig(calibrate=True, num_inference_steps=self.steps)
            with redirect_stdout(StringIO()) as said, mag_cache(config)(self.pipeline, self):
                sample(self.pipeline, self.calibration["conditions"], self.calibration["seeds"], self.sampling)
            self._ratios = json.loads(re.findall(r"\[[\d., e-]+\]", said.getvalue())[0])
        return self._ratios


def hooked(apply: Callable[..., None], names: Sequence[str]) -> Callable[[Any], Attached]:
    """Return how a kind of diffusers' hooks is put onto a model, with a configuration, and taken off."""

    def configured(config: Any) -> Attached:
        @contextmanager
        def attached(pipeline: Any, _: Bench) -> Iterator[None]:
            registry = HookRegistry.check_if_exists_or_initialize(pipeline.transformer)
            try:
                apply(pipeline.transformer, config)
                registry.invalidate_child_registries_cache()
                _set_cache_context(pipeline.transformer, CacheContext("batched"))
                yield
            finally:
                for name in names:
                    registry.remove_hook(name, recurse=True)
                registry.invalidate_child_registries_cache()

        return attached

    return configured


first_block_cache = hooked(hooks.apply_first_block_cache, (_FBC_LEADER_BLOCK_HOOK, _FBC_BLOCK_HOOK))
mag_cache = hooked(hooks.apply_mag_cache, (_MAG_CACHE_LEADER_BLOCK_HOOK, _MAG_CACHE_BLOCK_HOOK))
taylorseer_cache = hooked(hooks.apply_taylorseer_cache, (_TAYLORSEER_CACHE_HOOK,))
broadcast = hooked(hooks.apply_pyramid_attention_broadcast, (_PYRAMID_ATTENTION_BROADCAST_HOOK,))


def first_block(settings: Mapping[str, Any]) -> Attached:
    return first_block_cache(hooks.FirstBlockCacheConfig(settings["threshold"]))


def magcache(settings: Mapping[str, Any]) -> Attached:
    def attached(pipeline: Any, bench: Bench) -> AbstractContextManager[None]:
        ratios = bench.ratios()
        config = hooks.MagCacheConfig(num_inference_steps=bench.steps, mag_ratios=ratios, **settings)
        return mag_cache(config)(pipeline, bench)

    return attached


def taylorseer(settings: Mapping[str, Any]) -> Attached:
    lite = settings["modules"] == "lite"
    which = {"use_lite_mode": True} if lite else {"cache_identifiers": EVERY_BRANCH}
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=settings["interval"],
        disable_cache_before_step=settings["warm_up"],
        max_order=settings["order"],
        taylor_factors_dtype=torch.float32,
        **which,
    )

    def attached(pipeline: Any, bench: Bench) -> AbstractContextManager[None]:
        if lite and not hasattr(pipeline.transformer, "proj_out"):
            kind = type(pipeline.transformer).__name__
            raise NotImplementedError(f"foretells the output of proj_out, which {kind} has not, and gives zeros")
        return taylorseer_cache(config)(pipeline, bench)

    return attached


def pab(settings: Mapping[str, Any]) -> Attached:
    @contextmanager
    def attached(pipeline: Any, bench: Bench) -> Iterator[None]:
        told = [0.0]

        scale = FLOW_TIMESTEPS if is_flow(pipeline.scheduler) else 1

        def listen(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            told[0] = scale * float(torch.as_tensor(kwargs["timestep"]).flatten()[0])

        window = tuple(settings["window"])
        config = hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=settings["attn"],
            temporal_attention_block_skip_range=settings["temporal"],
            cross_attention_block_skip_range=settings["cross"],
            spatial_attention_timestep_skip_range=window,
            temporal_attention_timestep_skip_range=window,
            cross_attention_timestep_skip_range=window,
            current_timestep_callback=lambda: told[0],
        )
        listening = pipeline.transformer.register_forward_pre_hook(listen, with_kwargs=True)
        try:
            with broadcast(config)(pipeline, bench):
                yield
        finally:
            listening.remove()

    return attached


def cache_dit(settings: Mapping[str, Any]) -> Attached:
    @contextmanager
    def attached(pipeline: Any, bench: Bench) -> Iterator[None]:
        import cache_dit as package

        given: dict[str, Any] = dict(settings)
        calibrators = {
            "none": None,
            "taylor 1": package.TaylorSeerCalibratorConfig(taylorseer_order=1),
            "taylor 2": package.TaylorSeerCalibratorConfig(taylorseer_order=2),
            "foca": package.FoCaCalibratorConfig(),
            "dmd": package.DMDCalibratorConfig(),
        }
        calibrator = calibrators[given.pop("calibrator")]
        mask = given.get("steps_computation_mask")
        if isinstance(mask, str):
            given["steps_computation_mask"] = package.steps_mask(total_steps=bench.steps, mask_policy=mask)
        # Its adapter for Flux takes guidance as embedded; these pipelines call the model twice a step for it.
        separate = True if "true_cfg_scale" in signature(type(pipeline).__call__).parameters else None
        config = package.DBCacheConfig(num_inference_steps=bench.steps, enable_separate_cfg=separate, **given)
        package.enable_cache(pipeline, cache_config=config, calibrator_config=calibrator)
        try:
            yield
        finally:
            package.disable_cache(pipeline)

    return attached


def tgate(settings: Mapping[str, Any]) -> Attached:
    @contextmanager
    def attached(pipeline: Any, _: Bench) -> Iterator[None]:
        from tgate.PixArt_Alpha import tgate as gated

        kind = type(pipeline)
        if kind.__name__ != "PixArtAlphaPipeline":
            raise NotImplementedError(f"the tgate package has no loader for {kind.__name__}")
        call = wraps(kind.__call__)(lambda self, **given: gated(self, **settings, **given))
        pipeline.__class__ = type(kind.__name__, (kind,), {"__call__": call})
        try:
            yield
        finally:
            pipeline.__class__ = kind
            for module in pipeline.transformer.modules():
                if type(module).__name__ == "Attention":  # what it patched stays patched otherwise
                    vars(module).pop("forward", None)
                    vars(module).pop("cache", None)

    return attached


PEERS: Mapping[str, Callable[[Mapping[str, Any]], Attached]] = {
    "first_block": first_block,
    "magcache": magcache,
    "taylorseer": taylorseer,
    "pab": pab,
    "cache_dit": cache_dit,
    "tgate": tgate,
}


def run(bench: Bench, job: Mapping[str, Any]) -> dict[str, Any]:
    """Return what came of one job; the images lie in its file."""
    attached = PEERS[job["peer"]](job["settings"])
    conditions, seeds, size = job["conditions"], job["seeds"], job["batch"]
    images, shares = [], []
    try:
        for start in range(0, len(conditions), size):
            batch = conditions[start : start + size], seeds[start : start + size]
            with attached(bench.pipeline, bench):
                made, macs = bench.made(*batch)
            images.append(made)
            shares += [bench.share(macs, *batch)] * len(batch[0])
            if len(shares) == LOOK_AFTER and (share := float(np.mean(shares))) > job["most"] + MARGIN:
                return {"key": job["key"], "error": f"not gone on with: {share:.3f} of the MACs in {LOOK_AFTER} images"}
    except Exception as error:  # whatever another project's code may raise: it is told in the table
        said = (str(error).strip().splitlines() or [""])[0]
        return {"key": job["key"], "error": f"{type(error).__name__}: {said}"}
    np.save(job["file"], np.concatenate(images))
    return {"key": job["key"], "macs_fraction": float(np.mean(shares))}


def time(bench: Bench, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the speed-up of each, the median over interleaved rounds of single images."""
    condition, seed = [bench.calibration["conditions"][0]], [bench.calibration["seeds"][0]]

    def ready(attached: Callable[[], AbstractContextManager[None]]) -> Any:
        @contextmanager
        def variant() -> Iterator[Callable[[], object]]:
            with attached():
                yield lambda: sample(bench.pipeline, condition, seed, bench.sampling)

        return variant

    variants = {"uncached": ready(nullcontext)}
    for job in request["timed"]:
        variants[job["key"]] = ready(partial(PEERS[job["peer"]](job["settings"]), bench.pipeline, bench))
    seconds = interleaved(variants, request["rounds"])
    return {key: speedup(seconds["uncached"], each) for key, each in seconds.items() if key != "uncached"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # several peers print; what they say is no answer
    torch.set_grad_enabled(False)
    request = json.loads(Path(sys.argv[1]).read_text())
    bench = Bench(request)
    for job in request["jobs"]:
        print(json.dumps(run(bench, job)), file=answers, flush=True)
    if request["timed"]:
        print(json.dumps({"speedups": time(bench, request)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
