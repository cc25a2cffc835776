"""State of the running generations: one for each request, and in it a lane for each guidance pass."""

import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from threading import Lock
from types import FrameType, TracebackType
from typing import Any

from torch import Tensor

Signature = tuple[Any, ...]


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
    """One run of the sampling loop."""

    steps: int
    step: int = -1
    lanes: dict[tuple[str, int], Lane] = field(default_factory=dict)
    _calls: Counter[str] = field(default_factory=Counter)

    def begin_step(self) -> None:
        self.step += 1
        self._calls.clear()
        if self.finished:
            self.lanes.clear()

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    def lane(self, context: str | None, signature: Signature) -> tuple[str, Lane]:
        """Return the name and the lane of the next call, empty if nothing in it may be used.

        The pass is known by the pipeline's name for it, else by its place among the calls of this step, and by its
        batch size: a second pass that comes and goes must not find what another has kept.
        """
        self._calls[context or ""] += 1
        ordinal = self._calls[context or ""] - 1
        name = f"{context or ''}{ordinal if ordinal or context is None else ''}"
        batch = next((part[0][0] for part in signature if part[0]), 0)
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
        self._requests.enter(sys._getframe(1), self)
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
            self.generation = None

    @contextmanager
    def named(self, context: str) -> Iterator[None]:
        """Name the guidance pass of the calls inside."""
        before, self.context = self.context, context
        try:
            yield
        finally:
            self.context = before


class Requests:
    """Finds the request that a call belongs to.

    A context variable tells threads and tasks apart. Generators that take turns in one thread share their variables,
    so the frames on the stack are looked at first: the one that entered a request is among them only while it runs.
    """

    def __init__(self) -> None:
        self.variable: ContextVar[Request | None] = ContextVar("dicache_request", default=None)
        self._frames: tuple[tuple[FrameType, Request], ...] = ()
        self._changing = Lock()
        self._alone = Request(self)

    def enter(self, frame: FrameType, request: Request) -> None:
        with self._changing:
            self._frames = (*self._frames, (frame, request))

    def leave(self, request: Request) -> None:
        with self._changing:
            last = max(i for i, (_, entered) in enumerate(self._frames) if entered is request)
            self._frames = self._frames[:last] + self._frames[last + 1 :]

    def current(self) -> Request:
        """Return the request that the caller runs in, or the one for callers that name none."""
        frames = self._frames
        if not frames:
            return self._alone
        entered = {id(frame): request for frame, request in frames}
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if id(frame) in entered:
                return entered[id(frame)]
            frame = frame.f_back
        return self.variable.get() or self._alone
