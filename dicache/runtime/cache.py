"""A schedule attached to a model."""

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from threading import RLock, get_ident
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from dicache.anatomy.clock import StepClock
from dicache.anatomy.overrides import modules_of, or_own
from dicache.anatomy.spread import RanksError, groups_of
from dicache.anatomy.watching import parameters_of
from dicache.runtime.callers import guidance_scale, loop_scheduler
from dicache.runtime.compiled import Compiling
from dicache.runtime.errors import CacheError, CacheWarning
from dicache.runtime.executor import Executor, Forward, Installer
from dicache.runtime.executors import executor_of
from dicache.runtime.features import compiled
from dicache.runtime.fitting import Fitting
from dicache.runtime.generation import Call, Generation
from dicache.runtime.guidance import WHOLE, Collapse, twice
from dicache.runtime.naming import PassNames
from dicache.runtime.ranks import Ranks
from dicache.runtime.requests import Request, Requests
from dicache.runtime.stats import Stats
from dicache.runtime.storing import Store
from dicache.schedules import Schedule

_MARK = "_dicache"
_ATTACHED: "WeakSet[Cache]" = WeakSet()


class Cache:
    """A schedule at work on a model, until `detach()` or the end of the `with` block.

    Made by `dicache.apply`. Calls of the model are serialised: requests may take turns, each with its own state.

    Attributes:
        schedule: What is replayed.
        stats: Planned and achieved work.
        known: Asked before each call of the model, with the step: what it returns is taken for the model's output, and
            the call is not made; None makes it. For runs that begin as another has; a pass that is first called at a
            later step begins there.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        pipeline: Any | None,
        fitting: Fitting,
        ranks: Ranks,
        store: Store | None = None,
        compiling: Compiling | None = None,
    ) -> None:
        if _MARK in model.__dict__:
            raise CacheError(
                f"a {model.__dict__[_MARK].schedule.method} schedule is already attached to this "
                f"{type(model).__name__}; call its detach() first"
            )
        self.schedule = schedule
        self.stats = Stats(planned_macs_fraction=schedule.macs_fraction())
        self._model = model
        self._pipeline = pipeline
        self._fitting = fitting
        self._ranks = ranks
        self._given_groups = bool(ranks.groups)
        self._store = store
        self._compiling = compiling
        self.known: Callable[[int], Any] | None = None
        self._warned = False
        self._lock = RLock()
        self._requests = Requests()
        parts = {} if pipeline is None else vars(pipeline)
        self._component = next((name for name, part in parts.items() if part is model), None)
        self._parameters = parameters_of(model)
        self._installer = Installer(model)
        self._found: Forward | None = None  # what stood on the model in place of its class's forward
        self._entrance: Forward | None = None  # what stands there now
        self._calling: int | None = None  # the thread that is inside the model's call
        self._clock: StepClock | None = None
        self._attached = True
        _ATTACHED.add(self)
        self._executors: dict[tuple[float, ...] | None, Executor] = {}
        self._planned: dict[tuple[float, ...] | None, tuple[float, str]] = {}
        vars(model)[_MARK] = self  # before whatever else hangs on the model, so that a copy meets its refusal first
        self._names = PassNames(model, lambda name: self._requests.current().named(name))
        try:
            self._executors[schedule.target.noise_levels] = self._make_executor(schedule)
            self._stand_in_front()
            if pipeline is not None:
                self._clock = StepClock(pipeline.scheduler, self._on_set_timesteps, self._on_step)
        except BaseException:
            self.detach()
            raise

    def _make_executor(self, schedule: Schedule) -> Executor:
        return executor_of(
            schedule, self._model, self._installer, self.stats, self._ranks, self._store, self._compiling
        )

    # The life of a generation

    def begin_generation(self, steps: int | None = None) -> None:
        """Say that a bare model's sampling loop begins. Not needed with a pipeline.

        Args:
            steps: How many steps it will have, to be compared with the schedule; None trusts the caller.

        Raises:
            ScheduleError: If the schedule is for another number of steps, or the model was changed.
        """
        self._check_attached()
        self._requests.current().free()
        self._begin(None, steps, None)

    def begin_step(self) -> None:
        """Say that the next step of a bare model's sampling loop begins.

        Raises:
            CacheError: If no generation has begun, or it has no step left.
        """
        self._check_attached()
        generation = self._requests.current().generation
        if generation is None:
            raise CacheError("begin_step() without a generation; call begin_generation() before the sampling loop")
        if generation.step + 1 >= generation.steps:
            raise CacheError(
                f"the schedule has {generation.steps} steps and all of them have begun; "
                "call begin_generation() before the next sampling loop"
            )
        generation.begin_step()

    def request(self) -> Request:
        """Return the state of one of several generations that take turns on this model; enter it around its calls."""
        self._check_attached()
        return self._requests.new()

    def kept(self) -> dict[Any, Any]:
        """Return what the generation of the caller keeps, by site or range of blocks; of several passes, the last's."""
        generation = self._requests.current().generation
        lanes = generation.lanes.values() if generation is not None else ()
        return {key: value for lane in lanes for key, value in lane.entries.items()}

    def detach(self) -> None:
        """Give the model and the scheduler their own methods back, and free all that is kept.

        A call of the model that another thread is in is waited for.
        """
        with self._lock:
            self._detach()

    def _detach(self) -> None:
        if not self._attached:
            return
        self._attached = False
        self._installer.leave()
        if self._entrance is not None and vars(self._model).get("forward") is self._entrance:
            if self._found is None:
                del vars(self._model)["forward"]
            else:
                vars(self._model)["forward"] = self._found
        if self._clock is not None:
            self._clock.detach()
        self._names.detach()
        if self._model.__dict__.get(_MARK) is self:
            del self._model.__dict__[_MARK]
        self._requests.free()
        self._executors.clear()
        self.stats.bytes_held = self.stats.bytes_of_corrections = 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheError(
            f"a {type(self._model).__name__} with a schedule attached cannot be copied or pickled; call the cache's "
            "detach() first, and dicache.apply on the copy"
        )

    def _unlock(self) -> None:
        """Go on in a process that was forked, where no other thread is there to finish what it had begun."""
        self._lock, self._calling = RLock(), None
        self._requests.unlock()

    def __enter__(self) -> "Cache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    # What the clock says

    def _on_set_timesteps(self, scheduler: Any) -> None:
        self._requests.current().free()
        second = getattr(self._pipeline, "transformer_2", None) is self._model
        self._begin(scheduler, None, guidance_scale(second))

    def _on_step(self) -> None:
        generation = self._requests.current().generation
        if generation is not None and not generation.finished:
            assert self._clock is not None
            self._check_step(generation, self._clock)
            generation.begin_step()
            if generation.finished:
                self.stats.held(self._requests.bytes_held())

    def _check_step(self, generation: Generation, clock: StepClock) -> None:
        """Refuse a loop whose steps are not those of the schedule, as its scheduler was told when they ended."""
        place, known = clock.place(clock.timestep), clock.scheduler.timesteps
        if place is not None and not generation.letters:  # of a model that was not called yet
            generation.step = place
        wrong = place is not None and place != generation.step
        if place is None and not generation.checked and clock.timestep is not None:
            found, want = float(clock.timestep), float(known[generation.step])
            wrong = abs(found - want) > 1e-3 * max(1.0, abs(want))
        generation.checked = True
        if wrong:
            at, of = f"{float(clock.timestep):g}", f"{float(known[generation.step]):g}"
            self._requests.current().free()
            raise CacheError(
                f"the sampling loop has ended a step at timestep {at}, where step {generation.step} of the schedule, "
                f"at {of}, was due: which of its steps this is cannot be known beforehand. Pass the model itself to "
                "apply(), and use begin_generation() and begin_step()"
            )

    def _begin(self, scheduler: Any | None, steps: int | None, guidance: float | None) -> None:
        parts = modules_of(self._model)  # of a large model this takes a while
        schedule = self._fitting.check_generation(parts, scheduler, steps, guidance)
        levels = schedule.target.noise_levels
        with self._lock:
            self._calling = None  # an interrupt may have come before it was said that a call had ended
            self._installer.uninstall()
            self._check_component()
            if self._compiling is not None and (said := compiled(self._model)):
                raise CacheError(f"the schedule compiles the model's steps, and {said}")
            if self._installer.outdated(parts):
                self._follow_the_model()
            self._stand_in_front()
            if schedule.policy is not None and not self._given_groups:
                self._ranks.groups, self._ranks.of_model = groups_of(self._model, parts), True
            if levels not in self._executors:
                self._executors[levels] = self._make_executor(schedule)
        generation = Generation(schedule.steps, self._executors[levels])
        if schedule.collapse_guidance_from is not None:
            generation.collapse = Collapse(schedule.collapse_guidance_from, self._model, self._store)
        if self._pipeline is not None:
            generation.begin_step()
        request = self._requests.current()
        request.free()
        request.generation = generation
        request.scheduler = None if self._pipeline is None else id(loop_scheduler())
        self.stats.held(self._requests.bytes_held())
        self.stats.generations += 1
        if levels not in self._planned:
            self._planned[levels] = schedule.macs_fraction(), schedule.expected_steps
        self.stats.planned_macs_fraction, self.stats.planned_steps = self._planned[levels]
        self.stats.steps, self.stats.distances = generation.letters, generation.distances

    def _check_component(self) -> None:
        """Refuse a pipeline whose model was exchanged since the schedule was applied."""
        part = self._model if self._component is None else getattr(self._pipeline, self._component, None)
        if getattr(part, "_orig_mod", part) is not self._model:  # torch.compile(model) holds it as that
            raise CacheError(
                f"the pipeline's {self._component} was replaced after the schedule was applied, by a "
                f"{type(part).__name__}; call this cache's detach(), then dicache.apply again"
            )

    def _follow_the_model(self) -> None:
        """Go on with a model that others have put hooks on, or whose modules they have exchanged, since it was seen."""
        self._installer.leave()
        self._executors.clear()
        self._installer = Installer(self._model)

    # What the model does

    def _stand_in_front(self) -> None:
        """Put the cache in front of whatever stands in place of the model's forward.

        Hooks that others put on the model afterwards wrap the cache, and may take it off with them: pipelines that
        offload a model take their hook off and on again after each generation. At the next generation the cache is in
        front again, and a place that it had before, inside of a hook, only passes calls on.
        """
        namespace = vars(self._model)
        if self._entrance is not None and namespace.get("forward") is self._entrance:
            return
        found: Forward | None = namespace.get("forward")
        own = or_own(self._model, found)

        @wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # only with fullgraph=True does this reach anybody
                raise CacheError(
                    "a schedule acts between the calls of a model, which are no part of one graph; compile it without "
                    "fullgraph=True, or block by block with compile_repeated_blocks()"
                )
            if not self._attached or self._calling == get_ident():
                return own(*args, **kwargs)
            return self._call(*args, **kwargs)

        self._found, self._forward, self._entrance = found, own, forward
        namespace["forward"] = forward

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        request = self._requests.current()
        generation = request.generation
        if self._pipeline is None:
            if generation is None or generation.step < 0:
                raise CacheError(
                    "a bare model must be told its steps: call begin_generation() before the sampling loop and "
                    "begin_step() in each of its turns"
                )
        elif self._clock is not None and self._pipeline.scheduler is not self._clock.scheduler:
            raise CacheError(
                "the pipeline's scheduler was replaced after the schedule was applied; "
                "set the scheduler first, then call dicache.apply"
            )
        elif generation is None or generation.finished or request.scheduler != id(loop_scheduler()):
            return self._plainly(args, kwargs)  # outside a sampling loop, or in that of another pipeline
        assert generation is not None
        if torch.is_grad_enabled() and self._learns(args, kwargs):
            raise CacheError(
                f"the {type(self._model).__name__} is called with gradients enabled, and what is reused has none of "
                "the call that reuses it; call it inside torch.no_grad() or torch.inference_mode()"
            )
        if self.known is not None and (output := self.known(generation.step)) is not None:
            generation.answered()
            return output
        with self._lock:  # after all other calls
            self._installer.rewind()
            self._calling = get_ident()
            try:
                return self._replay(generation, request.context, args, kwargs)
            finally:
                self._calling = None

    def _plainly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:
            self._installer.rewind()
            self._calling = get_ident()
            try:
                self._installer.uninstall()
                return self._forward(*args, **kwargs)
            finally:
                self._calling = None

    def _learns(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return any(tensor.requires_grad for tensor in (*given, *self._model.parameters()))

    def _replay(
        self, generation: Generation, context: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        executor, stats = generation.executor, self.stats
        assert executor is not None
        call = Call(args, kwargs, self._parameters)
        if self._clock is not None and not generation.called and generation.step == 0:
            generation.step = self._first_step(self._clock, call)
        name, lane = generation.lane(context, call)
        runs = (name, call.batch)  # whose kept outputs the call goes on from
        collapse, action = generation.collapse, WHOLE
        try:
            self._fitting.check_latents(tuple(call.latents.shape[1:]))
            if collapse is not None:
                action = collapse.action(runs, generation.lanes, call, generation.step)
                runs = collapse.leader if action == "lead" else runs
                lane = generation.lanes[runs]
            if collapse is not None and action == "answer":
                out = collapse.answer
            else:
                executor.prepare(lane, runs[0], generation)
                if collapse is not None and action == "half":
                    args, kwargs = collapse.first_half(args, kwargs, call.batch)
                    out = twice(executor.run(self._forward, args, kwargs), call.batch)
                else:
                    out = executor.run(self._forward, args, kwargs)
                self._installer.check_turns()
                executor.finish(lane)
            if collapse is not None and action == "lead":
                collapse.ran(call, out)
        except BaseException as error:
            self._installer.restore()
            if isinstance(error, Exception) and not isinstance(error, RanksError):
                with suppress(RanksError):  # what failed here is what has to be told
                    executor.fail(generation)
            lane.clear()  # half a step is of no use to the next one
            raise
        finally:
            executor.leave()
        if lane.bytes_held != lane.bytes_told or collapse is not None or self._requests.several:
            stats.held(self._requests.bytes_held())
            lane.bytes_told = lane.bytes_held
        if generation.step == generation.steps - 1:  # nothing comes after it, whatever a policy has kept
            lane.clear()
            stats.held(self._requests.bytes_held())
            self._installer.uninstall()
        stats.calls += 1
        stats.collapsed_passes += action in ("half", "answer")
        letter = executor.letter if action == WHOLE else "."
        generation.note(name, letter, executor.distance)
        policy = self.schedule.policy
        if generation.step == generation.steps - 1 and policy is not None and not self._warned:
            said = policy.misfit(generation.letters[name], generation.distances.get(name, ()))
            self._warned = said is not None
            if said is not None:
                warnings.warn(said, CacheWarning, stacklevel=2)
        return out

    def _first_step(self, clock: StepClock, call: Call) -> int:
        """Return the step that a sampling loop begins with: image-to-image begins in the middle."""
        begin = getattr(clock.scheduler, "begin_index", None)
        if begin is not None:
            return int(begin)
        places = (clock.place(tensor) for tensor in call.tensors.values())
        return next((place for place in places if place is not None), 0)

    def _check_attached(self) -> None:
        if not self._attached:
            raise CacheError("this cache is detached; call dicache.apply again")


def _unlock_all() -> None:
    for cache in _ATTACHED:
        cache._unlock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_unlock_all)
