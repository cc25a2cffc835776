"""Other projects' caches attached to a bare DiT, each with settings that make it skip what a plan of ours skips.

Needs the environment of `benchmarks.peers`. A peer is attached anew for each generation, since several carry their
state over into the next one; that is not timed.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import Any

import diffusers.hooks as hooks
import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK
from torch import Tensor

from benchmarks.loops import plain
from benchmarks.peers_worker import EVERY_BRANCH, broadcast, first_block_cache, mag_cache, taylorseer_cache

NEVER = 10**6  # an interval that no generation reaches
Attach = Callable[[Any, int], AbstractContextManager[None]]  # to a model, for a number of steps


def computing() -> dict[str, Attach]:
    """Return peers that compute everything."""
    return {
        "diffusers PAB": lambda model, steps: _diffusers(broadcast, _pab(), model),
        "diffusers TaylorSeer": lambda model, steps: _diffusers(taylorseer_cache, _taylorseer(1, steps), model),
        "diffusers FBC": lambda model, steps: _diffusers(first_block_cache, hooks.FirstBlockCacheConfig(0.0), model),
        "diffusers MagCache": lambda model, steps: _diffusers(mag_cache, _magcache(steps, most=0), model),
        "cache-dit SCM": lambda model, steps: cache_dit(model, "C" * steps),
        "SmoothCache": lambda model, steps: smooth_cache(model, "C" * steps),
    }


def branches(interval: int) -> dict[str, Attach]:
    """Return peers that compute attention and MLP in each `interval`th step."""
    return {
        "diffusers TaylorSeer": lambda model, steps: _diffusers(taylorseer_cache, _taylorseer(interval), model),
        "SmoothCache": lambda model, steps: smooth_cache(model, letters(interval, steps)),
    }


def bodies(interval: int) -> dict[str, Attach]:
    """Return peers that compute the blocks in each `interval`th step, some of them the first block in all."""
    most = interval - 1
    return {
        "diffusers MagCache": lambda model, steps: _diffusers(mag_cache, _magcache(steps, most), model),
        "diffusers FBC": lambda model, steps: alternating(model, letters(interval, steps)),
        "cache-dit SCM": lambda model, steps: cache_dit(model, letters(interval, steps)),
    }


def letters(interval: int, steps: int) -> str:
    """Return a letter a step, `C` for each `interval`th one from the first on."""
    return "".join("C" if step % interval == 0 else "." for step in range(steps))


def loop(model: Any, steps: int, attach: Attach) -> Iterator[Tensor]:
    """Run a model with a peer attached."""
    with attach(model, steps):
        yield from plain(model, steps)


def _diffusers(attach: Callable[[Any], Any], config: Any, model: Any) -> AbstractContextManager[None]:
    attached: AbstractContextManager[None] = attach(config)(SimpleNamespace(transformer=model), None)
    return attached


def _pab() -> Any:
    return hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: 900,  # outside of the range in which it skips
    )


def _taylorseer(interval: int, warm_up: int = 1) -> Any:
    return hooks.TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=warm_up,
        max_order=0,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=EVERY_BRANCH,
    )


def _magcache(steps: int, most: int) -> Any:
    return hooks.MagCacheConfig(
        threshold=9.0, max_skip_steps=most, retention_ratio=0.0, num_inference_steps=steps, mag_ratios=[1.0] * steps
    )


@contextmanager
def alternating(model: Any, computes: str) -> Iterator[None]:
    """Attach FirstBlockCache; its own decision is taken and paid for, and then not heeded."""
    with _diffusers(first_block_cache, hooks.FirstBlockCacheConfig(0.1), model):
        block = model.transformer_blocks[0]
        hook = HookRegistry.check_if_exists_or_initialize(block).get_hook(_FBC_LEADER_BLOCK_HOOK)
        own, wanted = hook._should_compute_remaining_blocks, iter(computes)

        def decide(residual: Tensor) -> bool:
            own(residual)
            return next(wanted) == "C"

        hook._should_compute_remaining_blocks = decide
        yield


@contextmanager
def cache_dit(model: Any, computes: str) -> Iterator[None]:
    import cache_dit as package

    config = package.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=0,
        num_inference_steps=len(computes),
        steps_computation_mask=[int(letter == "C") for letter in computes],
        steps_computation_policy="static",
    )
    package.enable_cache(model, cache_config=config)
    try:
        yield
    finally:
        package.disable_cache(model)


@contextmanager
def smooth_cache(model: Any, computes: str) -> Iterator[None]:
    """Attach SmoothCache to attention and MLP; it prints a line for each of their calls, into nothing here."""
    with redirect_stdout(StringIO()):
        from SmoothCache import SmoothCacheHelper

    mask = [int(letter == "C") for letter in computes]
    kind = type(model.transformer_blocks[0])
    helper = SmoothCacheHelper(model, kind, ["attn1", "ff"], {"attn1": mask, "ff": mask})
    vars(sys.modules[SmoothCacheHelper.__module__])["print"] = lambda *_: None
    helper.enable()
    try:
        yield
    finally:
        helper.disable()
