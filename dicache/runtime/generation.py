"""State of the running generations: one for each request, and in it a lane for each guidance pass."""

import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from threading import Lock, get_ident
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import Tensor

if TYPE_CHECKING:
    from dicache.runtime.executor import Executor

Signature = tuple[Any, ...]
_GENERATOR = CO_GENERATOR | CO_ASYNC_GENERATOR


@dataclass
class Lane:
    """What one guidance pass of one generation keeps.

    Attributes:
        signature: Shape, dtype and device of the tensors of its calls.
        step: Its latest step; a lane that missed one starts afresh.
        entries: Kept outputs by site, and kept deltas by range of blocks.
        accumulated: The policy's sum.
        bytes_held: Memory of the entries.
    """

    signature: Signature
    step: int = -1
    entries: dict[Hashable, Any] = field(default_factory=dict)
    accumulated: float = 0.0
    bytes_held: int = 0

    def clear(self) -> None:
        self.entries.clear()
        self.accumulated = 0.0
        self.bytes_held = 0


@dataclass
class Generation:
    """One run of the sampling loop.

    Attributes:
        steps: How many it has.
        executor: Replays the schedule in it.
        step: The one that runs, -1 before the first.
        lanes: By name of the guidance pass and batch size.
    """

    steps: int
    executor: "Executor | None" = None
    step: int = -1
    lanes: dict[tuple[str, int], Lane] = field(default_factory=dict)
    letters: dict[str, str] = field(default_factory=dict)
    _calls: Counter[str] = field(default_factory=Counter)

    def begin_step(self) -> None:
        self.step += 1
        self._calls.clear()
        if self.finished:
            self.lanes.clear()

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    def lane(self, context: str | None, batch: int, signature: Signature) -> tuple[str, Lane]:
        """Return the name and the lane of the next call, empty if nothing in it may be used.

        The pass is known by the pipeline's name for it, else by its place among the calls of this step, and by its
        batch size: a second pass that comes and goes must not find what another has kept.
        """
        self._calls[context or ""] += 1
        ordinal = self._calls[context or ""] - 1
        name = f"{context or ''}{ordinal if ordinal or context is None else ''}"
        lane = self.lanes.get((name, batch))
        if lane is None:
            lane = self.lanes[name, batch] = Lane(signature)
        elif lane.signature != signature or lane.step != self.step - 1:
            lane.clear()
            lane.signature = signature
        lane.step = self.step
        return name, lane


def signature_of(args: Iterable[Any], kwargs: dict[str, Any]) -> Signature:
    """Return shape, dtype and device of every tensor among the arguments of a call."""
    return tuple(
        (value.shape, value.dtype, value.device) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)
    )


class Request:
    """The state of one generation among several that share a model. Enter it around the calls that belong to it.

    It may be entered again and again, once around each step, or held for the whole generation, in threads, in tasks
    and in generators that take turns.
    """

    def __init__(self, requests: "Requests") -> None:
        self._requests = requests
        self._tokens: list[Token[Request | None]] = []
        self.generation: Generation | None = None
        self.context: str | None = None

    def __enter__(self) -> "Request":
        self._requests.enter(_entering_frame(), self)
        self._tokens.append(self._requests.variable.set(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._requests.leave(self)
        try:
            self._requests.variable.reset(self._tokens.pop())
        except ValueError:  # entered in another context, such as a generator that another task finishes
            self._requests.variable.set(None)
        if kind is not None:
            self.free()

    def free(self) -> None:
        """Forget the generation and all that it keeps."""
        if self.generation is not None:
            self.generation.lanes.clear()
        self.generation = None

    @contextmanager
    def named(self, context: str) -> Iterator[None]:
        """Name the guidance pass of the calls inside."""
        before, self.context = self.context, context
        try:
            yield
        finally:
            self.context = before


@dataclass(frozen=True)
class _Entry:
    """Where a request was entered."""

    frame: FrameType
    thread: int
    task: Any
    request: Request


class Requests:
    """Finds the request that a call belongs to.

    The frame that entered a request is on the stack while the request runs, and is not while a generator that holds it
    waits for its turn. Work that was started inside a request, in another thread or task, has it as a context variable.
    """

    def __init__(self) -> None:
        self.variable: ContextVar[Request | None] = ContextVar("dicache_request", default=None)
        self._entries: tuple[_Entry, ...] = ()
        self._changing = Lock()
        self._made: WeakSet[Request] = WeakSet()
        self._alone = self.new()

    def new(self) -> Request:
        request = Request(self)
        with self._changing:
            self._made.add(request)
        return request

    def enter(self, frame: FrameType, request: Request) -> None:
        with self._changing:
            self._entries = (*self._entries, _Entry(frame, get_ident(), _current_task(), request))

    def leave(self, request: Request) -> None:
        with self._changing:
            last = max(i for i, entry in enumerate(self._entries) if entry.request is request)
            self._entries = self._entries[:last] + self._entries[last + 1 :]

    def current(self) -> Request:
        """Return the request that the caller runs in, or the one for callers that name none."""
        entries = self._entries
        if not entries:
            return self._alone
        entered = {id(entry.frame): entry.request for entry in entries}
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if id(frame) in entered:
                return entered[id(frame)]
            frame = frame.f_back
        inherited = self.variable.get()
        here = (get_ident(), _current_task())
        if inherited is None or any(e.request is inherited and (e.thread, e.task) == here for e in entries):
            return self._alone  # what this thread and task itself entered is waiting for its turn
        return inherited

    def bytes_held(self) -> int:
        """Return the memory of what all generations keep."""
        with self._changing:
            running = [request.generation for request in self._made]
        return sum(lane.bytes_held for generation in running if generation for lane in generation.lanes.values())

    def free(self) -> None:
        """Forget all generations, also of requests that somebody still holds."""
        with self._changing:
            made = list(self._made)
        for request in made:
            request.free()


def _entering_frame() -> FrameType:
    """Return the frame of whoever enters a request, past exit stacks and context managers that do it for them."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        _in_contextlib(frame) or (frame.f_code.co_flags & _GENERATOR and _in_contextlib(frame.f_back))
    ):
        frame = frame.f_back
    return frame


def _in_contextlib(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == "contextlib"


def _current_task() -> Any:
    asyncio = sys.modules.get("asyncio")
    try:
        return asyncio.current_task() if asyncio else None
    except RuntimeError:  # no loop runs in this thread
        return None
