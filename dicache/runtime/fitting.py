"""Whether a schedule fits: what it was made for, against the model, the sampler and the calls that it meets."""

import warnings
from typing import Any, Literal

from torch import nn

from dicache.anatomy.clock import noise_levels, timesteps
from dicache.anatomy.fingerprint import dtype_of, fingerprint
from dicache.anatomy.overrides import modules_of, without_turn
from dicache.anatomy.spread import kind_of
from dicache.runtime.callers import is_distilled
from dicache.runtime.errors import CacheError, CacheWarning
from dicache.runtime.features import compiled, obstacle
from dicache.schedules import Schedule, ScheduleError

Fit = Literal["exact", "resample"]
REFUSED = ("model", "weights", "scheduler", "num_inference_steps", "timesteps", "noise_levels")
# What a schedule can be replayed with all the same, and what is to be expected then.
WARNED_OF = {
    "dtype": "a half precision keeps three or four digits, so that what is held is rounded to them and a decision near "
    "its limit may fall otherwise",
    "latents": "its limits, its errors and its speed-up were found at that size and will be others at this one",
    "guidance": "guidance multiplies the difference of its passes, and with it the errors of what is skipped in them",
}
BOUND = (*REFUSED, *WARNED_OF)


class Fitting:
    """Compares a schedule with what it is used for; what differs is refused, all at once, or warned of, once.

    Args:
        model: What it is replayed on.
        schedule: The schedule.
        fit: `resample` maps it to another sampler or number of steps; `exact` does not.
        allow: Names of what may differ, without a word.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, fit: Fit, allow: frozenset[str]) -> None:
        self._model = model
        self._schedule = schedule
        self._fit = fit
        self._allow = allow
        self._modules = modules_of(model)
        self._warned: set[str] = set()

    def check_model(self, scheduler: Any | None) -> None:
        """Compare the model, and the kind of sampler if there is a pipeline.

        Raises:
            ScheduleError: If one of them differs.
            CacheError: If the model cannot take any schedule.
        """
        model = self._model
        self._check_able(self._modules)
        if said := compiled(model):
            raise CacheError(said)
        differences = [*self._of_structure(), *self._of_weights()]
        if scheduler is not None and self._fit == "exact":
            differences += self._of(scheduler=type(scheduler).__name__)
        if differences:
            raise ScheduleError(
                f"{self._made_for(differences)}. Calibrate for this model, or name what may differ in "
                f"apply(..., allow=...), of {', '.join(REFUSED)}"
            )
        self._warn("dtype", dtype_of(model))

    def check_generation(
        self, parts: list[nn.Module], scheduler: Any | None, steps: int | None, guidance: float | None
    ) -> Schedule:
        """Compare the model, which may have been changed, and the sampler's steps; return what is to be replayed.

        Args:
            parts: All modules of the model.
            scheduler: Of the pipeline; None if a bare model is told its steps.
            steps: How many there will be; None if that is not known.
            guidance: Scale; None if it cannot be seen.

        Raises:
            ScheduleError: If the model or the steps differ.
            CacheError: If the model is in training mode.
        """
        self._check_able(parts)
        schedule, fit = self._schedule, self._fit
        changed = [*(self._of_structure() if parts != self._modules else ()), *self._of_weights()]
        others = [] if scheduler is None else self._of_steps(scheduler)
        if steps is not None and steps != schedule.steps:
            others = [f"{schedule.steps} steps, found {steps}"]
        if changed or (others and fit == "exact"):
            advice = []
            if changed:
                advice.append(
                    "The model was changed since the schedule was applied. Calibrate for the model as it is, or apply "
                    "again with allow=..."
                )
            if others:
                mapped = ", or pass fit='resample' to apply() to map the schedule by noise level"
                can_map = scheduler is not None and fit == "exact" and schedule.target.noise_levels
                advice.append(f"Calibrate for this sampler and number of steps{mapped if can_map else ''}")
            raise ScheduleError(f"{self._made_for([*changed, *others])}. {'. '.join(advice)}")
        if others:
            schedule = self._mapped(scheduler)
        self._check_guidance(guidance)
        self._warn("dtype", dtype_of(self._model))
        self._modules = parts  # only now: a model that was refused is compared with the same one again
        return schedule

    def check_latents(self, found: tuple[int, ...]) -> None:
        """Compare the shape of a call's latents, without the batch.

        Raises:
            ScheduleError: If they differ, and the schedule has corrections, which are of each token.
        """
        want = self._schedule.target.latents
        if want == found or want is None:
            return
        if self._schedule.corrections is not None:
            raise ScheduleError(
                f"{self._made_for(self._schedule.target.differences(latents=found))}, and corrects what it holds token "
                "by token, which cannot be done at another size. Calibrate for this size"
            )
        self._warn("latents", found)

    def _check_able(self, parts: list[nn.Module]) -> None:
        if said := obstacle(self._model, parts, self._schedule):
            raise CacheError(said)

    def _check_guidance(self, found: float | None) -> None:
        want = self._schedule.target.guidance
        if want is None or found is None:
            return
        other_passes = (want > 1) != (found > 1) and not is_distilled(self._model)
        if self._schedule.corrections is not None and other_passes:
            raise ScheduleError(
                f"{self._made_for(self._schedule.target.differences(guidance=found))}, and corrects what it holds in "
                "each of the passes that this takes. Calibrate with the guidance that is used"
            )
        self._warn("guidance", found)

    def _of_structure(self) -> list[str]:
        """Return what differs in the class of the model and in its modules; without the latter nothing is replayed."""
        model, anatomy = self._model, self._schedule.anatomy
        said = []
        if kind_of(model) != anatomy.model and "model" not in self._allow:
            said.append(f"a {anatomy.model}, found {kind_of(model)}")
        modules = dict(model.named_modules(remove_duplicate=False))
        other = set()
        for path in sorted({block.path for block in anatomy.blocks}):
            count = sum(block.path == path for block in anatomy.blocks)
            found = len(list(modules[path].children())) if path in modules else 0
            if found != count:
                said.append(f"{count} blocks in {path}, found {found}")
                other.add(path)
        named = [
            f"{block.module}.{without_turn(path)}"
            for block in anatomy.blocks
            if block.path not in other
            for path in (*(path for site in block.sites for path in site.modules), *block.norms, block.middle)
            if path
        ]
        absent = list(dict.fromkeys(path for path in named if path not in modules))
        if absent:
            more = f" and {len(absent) - 1} more modules" if len(absent) > 1 else ""
            said.append(f"a model with {absent[0]}{more}, found none")
        return said

    def _of_weights(self) -> list[str]:
        bound = self._schedule.target.weights is not None and "weights" not in self._allow
        return self._of(weights=fingerprint(self._model)) if bound else []

    def _of_steps(self, scheduler: Any) -> list[str]:
        if len(scheduler.timesteps) != self._schedule.steps:
            return [f"{self._schedule.steps} steps, found {len(scheduler.timesteps)}"]
        return self._of(
            num_inference_steps=getattr(scheduler, "num_inference_steps", None),
            timesteps=timesteps(scheduler),
            noise_levels=_levels(scheduler),
        )

    def _of(self, **found: Any) -> list[str]:
        return self._schedule.target.differences(**{k: v for k, v in found.items() if k not in self._allow})

    def _mapped(self, scheduler: Any) -> Schedule:
        levels = _levels(scheduler)
        if levels is None:
            raise ScheduleError(f"{type(scheduler).__name__} does not tell its noise levels; nothing to resample on")
        return self._schedule.resampled(levels, getattr(scheduler, "num_inference_steps", None))

    def _made_for(self, differences: list[str]) -> str:
        return f"this {self._schedule.method} schedule was made for {'; '.join(differences)}"

    def _warn(self, name: str, found: Any) -> None:
        for said in self._of(**{name: found}):
            if said not in self._warned:
                self._warned.add(said)
                warnings.warn(
                    f"{self._made_for([said])}: {WARNED_OF[name]}. Judge it with `dicache evaluate`; "
                    f"allow=({name!r},) in apply() says that it is meant",
                    CacheWarning,
                    stacklevel=4,
                )


def _levels(scheduler: Any) -> tuple[float, ...] | None:
    try:
        return noise_levels(scheduler)
    except ValueError:
        return None
