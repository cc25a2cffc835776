"""The step clock: which denoising step a call of the model belongs to."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

Then = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]  # told the result and the arguments of a call


class StepClock:
    """Watches one scheduler instance: `set_timesteps` begins a generation, `step` ends a step.

    A step is what lies between two calls of `step`: solvers such as Heun repeat timesteps and call
    the model more often than there are inference steps, so neither a timestep nor a count of calls tells.

    Only the instance is changed; `detach` restores it.

    Args:
        scheduler: A diffusers scheduler.
        on_generation: Called with the scheduler when a generation begins, before its first step.
        on_step: Called when a step has ended.

    Attributes:
        timestep: What `step` was told in its latest call.
        latents: What it gave.
        model_output: What it was given: the model's outputs as guidance has combined them.
    """

    def __init__(self, scheduler: Any, on_generation: Callable[[Any], None], on_step: Callable[[], None]) -> None:
        self.scheduler = scheduler
        self.timestep: Any = None
        self.latents: Any = None
        self.model_output: Any = None
        set_timesteps, step = scheduler.set_timesteps, scheduler.step
        signature = inspect.signature(step)

        def began(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            on_generation(scheduler)

        def ended(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.latents = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", None)
            given = signature.bind(*args, **kwargs).arguments  # some take more before the timestep
            self.model_output = given.get("model_output", next(iter(given.values()), None))
            self.timestep = given.get("timestep")
            on_step()

        self._watched = (
            _Watched(scheduler, "set_timesteps", set_timesteps, began),
            _Watched(scheduler, "step", step, ended),
        )
        scheduler.set_timesteps, scheduler.step = self._watched

    def place(self, timestep: Any) -> int | None:
        """Return which of the scheduler's timesteps this is, if it is a view of them, as their iteration gives.

        It is told by where it lies, so that nothing is read from a device, and a timestep that is repeated is told from
        the one before. None for anything else.
        """
        whole = self.scheduler.timesteps
        if not isinstance(timestep, Tensor) or not isinstance(whole, Tensor) or timestep.dtype != whole.dtype:
            return None
        one = all(size == 1 or stride == 0 for size, stride in zip(timestep.shape, timestep.stride(), strict=True))
        if not one or not len(whole) or timestep.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return None
        place, rest = divmod(int(timestep.storage_offset()) - int(whole.storage_offset()), whole.stride(0) or 1)
        return place if not rest and 0 <= place < len(whole) else None

    def detach(self) -> None:
        """Give the scheduler its own methods back."""
        for watched in self._watched:
            watched.then = None
            # Another clock may have been wound up on top of this one: then its wrapper stays, and only passes calls on.
            method: Any = vars(self.scheduler).get(watched.name)
            own = True
            while isinstance(method, _Watched) and method.then is None:
                own, method = method.own, method.__wrapped__
            if own and method is not None:
                vars(self.scheduler)[watched.name] = method
            else:
                vars(self.scheduler).pop(watched.name, None)


class _Watched:
    """A scheduler's method that tells when it has been called."""

    def __init__(self, scheduler: Any, name: str, method: Callable[..., Any], then: Then) -> None:
        self.scheduler = scheduler
        self.name = name
        self.then: Then | None = then
        self.own = name in vars(scheduler)  # whether the instance had a method of its own before
        self.__wrapped__ = method  # pipelines read the signature to see which arguments the method takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.__wrapped__(*args, **kwargs)
        if self.then is not None:
            self.then(result, args, kwargs)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Some pipelines copy their scheduler: the copy must step itself, unwatched, and not the original.
        return getattr(type(self.scheduler), self.name).__get__(memo[id(self.scheduler)])


def timesteps(scheduler: Any) -> tuple[float, ...]:
    """Return the timestep of each step, as the scheduler's own `timesteps` has them."""
    return tuple(float(t) for t in np.asarray(scheduler.timesteps.cpu(), dtype=np.float64))


def noise_levels(scheduler: Any) -> tuple[float, ...]:
    """Return the natural logarithm of the noise-to-signal ratio at each step, falling from the first to the last.

    It is the one axis on which samplers of different step counts and conventions can be compared: rectified flows
    have signal 1 - sigma, the variance-exploding form has signal 1, the others have the square root of alpha-bar.

    Raises:
        ValueError: If the scheduler has neither sigmas nor alphas.
    """
    steps = len(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= steps:
        ratio = np.asarray(sigmas.cpu() if hasattr(sigmas, "cpu") else sigmas, dtype=np.float64)[:steps]
        config = getattr(scheduler, "config", None)  # one of your own may have none
        if "FlowMatch" in type(scheduler).__name__ or getattr(config, "use_flow_sigmas", False):
            ratio = ratio / np.maximum(1 - ratio, 1e-6)
    elif getattr(scheduler, "alphas_cumprod", None) is not None:
        index = np.asarray(scheduler.timesteps.cpu()).astype(np.int64)
        alpha = np.asarray(scheduler.alphas_cumprod.cpu(), dtype=np.float64)[index]
        ratio = np.sqrt((1 - alpha) / alpha)
    else:
        raise ValueError(f"{type(scheduler).__name__} tells neither sigmas nor alphas; its noise levels are not known")
    return tuple(round(float(level), 6) for level in np.log(np.maximum(ratio, 1e-6)))
