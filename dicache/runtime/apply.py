"""Attach a schedule to a pipeline or a model."""

import os
from collections.abc import Collection, Mapping
from typing import Any, get_args

import torch
from torch import nn

from dicache.runtime.cache import Cache
from dicache.runtime.compiled import Compiling
from dicache.runtime.errors import CacheError
from dicache.runtime.fitting import BOUND, Fit, Fitting
from dicache.runtime.ranks import Ranks
from dicache.runtime.storing import Store
from dicache.schedules import Schedule

DENOISERS = ("transformer", "unet", "prior")  # what diffusers' pipelines call the model in their sampling loop
SECOND = ("transformer_2",)  # and what they call one that takes turns with the first


def apply(
    target: Any,
    schedule: Schedule | str | os.PathLike[str],
    *,
    fit: Fit = "exact",
    allow: Collection[str] = (),
    component: str | None = None,
    group: Any | None = None,
    store_dtype: torch.dtype | None = None,
    store_on_cpu: bool = False,
    compile: bool | str | Mapping[str, Any] = False,  # noqa: A002
) -> Cache:
    """Attach a schedule to a pipeline or a bare model, and return the cache that replays it.

    All that the schedule says it was made for is compared: now, and what cannot be seen yet or may have been changed,
    when a generation begins. Another model, other weights and another sampler or number of steps are refused, with a
    list of what differs. Another precision, size or guidance triggers one warning that says what to expect. Guidance is
    seen where a pipeline's call is running that was given it.

    Args:
        target: A diffusers pipeline, or the transformer itself. With a bare model, call the cache's
            `begin_generation()` before the sampling loop and `begin_step()` in each of its turns.
        schedule: A schedule or its file.
        fit: `exact` refuses another number of steps or other timesteps; `resample` maps the schedule to them by
            noise level.
        allow: Names of what may differ from what the schedule was made for, without refusal or warning: of `model`,
            `weights`, `scheduler`, `num_inference_steps`, `timesteps`, `noise_levels`, `dtype`, `latents`, `guidance`.
        component: Name of the model in the pipeline, where it has two that share its steps, such as `transformer_2` of
            Wan 2.2. Each is given a schedule of its own.
        group: Process group of `torch.distributed` that the model's tokens or samples are spread over, so that all its
            ranks decide alike on what is skipped; they must call the model for the same steps. Where diffusers has
            spread the model (`enable_parallelism`), or its weights are in shards (`DTensor`), the groups are known
            without it. A plan decides nothing, and needs none.
        store_dtype: In which what is kept is stored until it is read, where that is smaller than its own: float16,
            bfloat16, float8_e4m3fn or float8_e5m2. It halves or quarters the memory held, and rounds what is reused.
        store_on_cpu: Whether what is kept lies in main memory until it is read. On a CUDA device it is copied beside
            the model's work, and back again while what is read before it is at work.
        compile: Whether the model's steps are compiled by `torch.compile(fullgraph=True)`, each kind of step to one
            graph: settings of it (`backend`, `mode`, `options`, `dynamic`), True for its own, or `cudagraphs`, by which
            each graph is also captured on the CUDA device. The first generation compiles.

    Raises:
        ScheduleError: If the schedule cannot be read or was made for something else.
        CacheError: If the model cannot take a schedule as it is.
        ValueError: If a setting is none of those above.

    Warns:
        CacheWarning: If the precision, size or guidance is another one.
    """
    if not isinstance(schedule, Schedule):
        schedule = Schedule.load(schedule)
    if fit not in get_args(Fit):
        raise ValueError(f"fit must be exact or resample, found {fit!r}")
    if unknown := sorted(set(allow) - set(BOUND)):
        raise ValueError(f"allow names {unknown[0]!r}; what may be allowed to differ is {', '.join(BOUND)}")
    model = denoiser(target, component)
    compiling = Compiling.asked(compile, model)
    pipeline = None if model is target else target
    allowed = frozenset(allow) | ({"num_inference_steps"} if "timesteps" in allow else set())
    fitting = Fitting(model, schedule, fit, allowed)
    fitting.check_model(None if pipeline is None else pipeline.scheduler)
    ranks = Ranks(() if group is None else (group,))
    store = None if store_dtype is None and not store_on_cpu else Store(store_dtype, on_cpu=store_on_cpu)
    return Cache(model, schedule, pipeline, fitting, ranks, store, compiling)


def denoiser(target: Any, component: str | None = None) -> nn.Module:
    """Return the model that a pipeline calls at each step, or the bare model itself.

    Args:
        target: A pipeline or a model.
        component: Name of the model in the pipeline; needed where it has two.

    Raises:
        CacheError: If there is none, or more than one and no name.
    """
    if isinstance(target, nn.Module):
        return target
    known = (*DENOISERS, *SECOND)
    found = [name for name in known if isinstance(getattr(target, name, None), nn.Module)]
    if component is not None and component not in found:
        raise CacheError(
            f"{type(target).__name__} has no model {component!r} that it calls at its steps; it has "
            f"{', '.join(found) or 'none'}"
        )
    if not found or not hasattr(target, "scheduler"):
        raise CacheError(
            f"{type(target).__name__} is neither a torch module nor a pipeline with a scheduler and one of "
            f"{', '.join(DENOISERS)}; pass the model itself and use begin_generation() and begin_step()"
        )
    if component is None and any(name in found for name in SECOND):
        raise CacheError(
            f"{type(target).__name__} has two models that share its steps, {' and '.join(found)}, and a schedule is "
            "for one of them: say for which with component=..., and apply another schedule to the other"
        )
    model: nn.Module = getattr(target, component or found[0])
    return model
