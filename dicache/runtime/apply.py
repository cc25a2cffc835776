"""Attach a schedule to a pipeline or a model."""

import os
from collections.abc import Collection
from typing import Any, get_args

from torch import nn

from dicache.anatomy.fingerprint import fingerprint
from dicache.anatomy.overrides import without_turn
from dicache.runtime.cache import Cache, CacheError, Fit
from dicache.runtime.features import compiled, obstacle
from dicache.runtime.ranks import Ranks, group_of
from dicache.schedules import Schedule, ScheduleError

DENOISERS = ("transformer", "unet", "prior")  # what diffusers' pipelines call the model in their sampling loop
SECOND = ("transformer_2",)  # and what they call one that takes turns with the first
BOUND = ("model", "weights", "dtype", "latents", "scheduler", "num_inference_steps", "timesteps", "noise_levels")


def apply(
    target: Any,
    schedule: Schedule | str | os.PathLike[str],
    *,
    fit: Fit = "exact",
    allow: Collection[str] = (),
    component: str | None = None,
    group: Any | None = None,
) -> Cache:
    """Attach a schedule to a pipeline or a bare model, and return the cache that replays it.

    All that the schedule says it was made for is compared, and any difference is refused: what cannot be seen yet,
    the steps of the sampler and the size of the latents, when the first generation begins.

    Args:
        target: A diffusers pipeline, or the transformer itself. With a bare model, call the cache's
            `begin_generation()` before the sampling loop and `begin_step()` in each of its turns.
        schedule: A schedule or its file.
        fit: `exact` refuses another number of steps or other timesteps; `resample` maps the schedule to them by
            noise level.
        allow: Names of what may differ from what the schedule was made for, such as `dtype`.
        component: Name of the model in the pipeline, where it has two that share its steps, such as `transformer_2` of
            Wan 2.2. Each is given a schedule of its own.
        group: Process group of `torch.distributed` that the model's tokens or samples are spread over, so that all its
            ranks decide alike on what is skipped; they must call the model for the same steps. Where diffusers has
            spread the model (`enable_parallelism`), its own group is taken. A plan decides nothing, and needs none.

    Raises:
        ScheduleError: If the schedule cannot be read or was made for something else.
        CacheError: If the model cannot take a schedule as it is.
    """
    if not isinstance(schedule, Schedule):
        schedule = Schedule.load(schedule)
    if fit not in get_args(Fit):
        raise ValueError(f"fit must be exact or resample, found {fit!r}")
    if unknown := sorted(set(allow) - set(BOUND)):
        raise ValueError(f"allow names {unknown[0]!r}; what may be allowed to differ is {', '.join(BOUND)}")
    model = denoiser(target, component)
    pipeline = None if model is target else target
    allowed = frozenset(allow) | ({"num_inference_steps"} if "timesteps" in allow else set())
    _check(model, pipeline, schedule, fit, allowed)
    ranks = Ranks(group_of(model) if group is None else group, next(model.parameters()).device)
    return Cache(model, schedule, pipeline, fit, allowed, ranks)


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


def _check(model: nn.Module, pipeline: Any | None, schedule: Schedule, fit: Fit, allow: frozenset[str]) -> None:
    if said := obstacle(model, schedule) or compiled(model):
        raise CacheError(said)
    differences = []
    if type(model).__name__ != schedule.anatomy.model and "model" not in allow:
        differences.append(f"a {schedule.anatomy.model}, found {type(model).__name__}")
    else:
        differences += _missing_modules(model, schedule)
    found: dict[str, Any] = {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    if schedule.target.weights is not None and not differences:
        found["weights"] = fingerprint(model)
    if pipeline is not None and fit == "exact":
        found["scheduler"] = type(pipeline.scheduler).__name__
    differences += schedule.target.differences(**{k: v for k, v in found.items() if k not in allow})
    if differences:
        raise ScheduleError(
            f"this {schedule.method} schedule was made for {'; '.join(differences)}. "
            "Calibrate for this model, or name what may differ in apply(..., allow=...)"
        )


def _missing_modules(model: nn.Module, schedule: Schedule) -> list[str]:
    modules = dict(model.named_modules())
    paths = [
        f"{block.module}.{without_turn(path)}"
        for block in schedule.anatomy.blocks
        for path in (*(path for site in block.sites for path in site.modules), *block.norms, block.middle)
        if path
    ]
    absent = [path for path in paths if path not in modules]
    said = [f"a model with {absent[0]}, found none"] if absent else []
    lists = {block.path for block in schedule.anatomy.blocks}
    for path in sorted(lists):
        count = sum(block.path == path for block in schedule.anatomy.blocks)
        found = len(list(modules[path].children())) if path in modules else 0
        if found != count:
            said.append(f"{count} blocks in {path}, found {found}")
    return said[-1:]
