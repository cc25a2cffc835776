"""Requests: several generations that take turns on one model, and how a call finds its own."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from threading import Lock, get_ident
from types import FrameType, TracebackType
from typing import Any
from weakref import WeakSet

from dicache.runtime.generation import Generation

_GENERATOR = CO_GENERATOR | CO_ASYNC_GENERATOR


class Request:
    """The state of one generation among several that share a model. Enter it around the calls that belong to it.

    It may be entered again and again, once around each step, or held for the whole generation, in threads, in tasks
    and in generators that take turns.
    """

    def __init__(self, requests: "Requests") -> None:
        self._requests = requests
        self._tokens: list[Token[Request | None]] = []
        self.generation: Generation | None = None
        self.scheduler: int | None = None  # identity of that of the loop which has begun the generation
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

    Attributes:
        several: Whether there ever was another than the one of callers that name none.
    """

    def __init__(self) -> None:
        self.variable: ContextVar[Request | None] = ContextVar("dicache_request", default=None)
        self._entries: tuple[_Entry, ...] = ()
        self._changing = Lock()
        self._made: WeakSet[Request] = WeakSet()
        self.several = False
        self._alone = Request(self)
        self._made.add(self._alone)

    def new(self) -> Request:
        request = Request(self)
        with self._changing:
            self.several = True
            self._made.add(request)
        return request

    def unlock(self) -> None:
        """Go on in a process that was forked, in which no other thread runs."""
        self._changing = Lock()

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
        running = [self._alone.generation]
        if self.several:
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
