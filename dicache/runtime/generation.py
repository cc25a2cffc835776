"""State of one running generation, and in it a lane for each guidance pass."""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dicache.anatomy.inputs import latents_of
from dicache.schedules.policies import Memory

if TYPE_CHECKING:
    from dicache.runtime.executor import Executor
    from dicache.runtime.guidance import Collapse

Signature = tuple[Any, ...]
Key = tuple[str, int]  # of a lane: name of the guidance pass, and batch size
Single = Literal["undecided", "no", "halves", "shares"]


class Call:
    """What tells one call of a model from another.

    Attributes:
        given: Its arguments, by name or place.
        tensors: The tensors among them.
        latents: Those that are denoised.
        signature: Shape, dtype and device of each tensor, and what else decides the dtype and kind of what is made.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.given: dict[Hashable, Any] = dict((*enumerate(args), *kwargs.items()))
        self.tensors: dict[Hashable, Tensor] = {
            k: value for k, value in self.given.items() if isinstance(value, Tensor)
        }
        self.latents = latents_of(args, kwargs)
        tensors = tuple((x.shape, x.dtype, x.device) for x in self.tensors.values())
        self.signature: Signature = (*tensors, *_modes({device.type for *_, device in tensors}))

    @property
    def batch(self) -> int:
        return len(self.latents)


@dataclass
class Lane:
    """What one guidance pass of one generation keeps.

    Attributes:
        signature: Shape, dtype and device of the tensors of its calls.
        named: Whether the pipeline has a name for the pass.
        batch: Samples in its calls.
        latents: Shape of the latents in its calls.
        step: Its latest step; a lane that missed one starts afresh.
        since: The step at which it last started with nothing kept, -1 if it is to do so now.
        entries: Kept outputs by site, and kept deltas by range of blocks; those before the last one by site or range
            and how many have been computed since.
        memory: What a policy remembers of the pass; None before its first step.
        bytes_held: Memory of the entries.
        marks: Arguments that told this pass from the others of its first step.
        latest: Arguments of its call in the step that runs.
        single: Whether guidance has collapsed in it: `halves`, its batch holds both passes and the first half of it is
            computed; `shares`, it is one of two passes of which one is computed; `no`, it is alone.
        twins: Of the lanes called in its latest step, those that look like the other pass of the same samples.
    """

    signature: Signature
    named: bool
    batch: int = 1
    latents: tuple[int, ...] = ()
    step: int = -1
    since: int = -1
    entries: dict[Hashable, Any] = field(default_factory=dict)
    memory: Memory | None = None
    bytes_held: int = 0
    marks: dict[Hashable, Tensor] = field(default_factory=dict)
    latest: dict[Hashable, Tensor] = field(default_factory=dict)
    single: Single = "undecided"
    twins: list[Key] = field(default_factory=list)

    def clear(self) -> None:
        self.entries.clear()
        self.single = "undecided"
        self.since = -1
        self.memory = None
        self.bytes_held = 0


@dataclass
class Generation:
    """One run of the sampling loop.

    Attributes:
        steps: How many it has.
        executor: Replays the schedule in it.
        step: The one that runs, -1 before the first.
        lanes: By name of the guidance pass and batch size.
        letters: For each pass, a letter a step: `C` all computed, `.` not all, `-` not called.
        distances: For each pass, what a policy compared with its limit at each step; None where nothing was.
        collapse: Ends guidance in it, if the schedule says so.
    """

    steps: int
    executor: "Executor | None" = None
    step: int = -1
    lanes: dict[Key, Lane] = field(default_factory=dict)
    letters: dict[str, str] = field(default_factory=dict)
    distances: dict[str, list[float | None]] = field(default_factory=dict)
    collapse: "Collapse | None" = None
    _calls: Counter[str] = field(default_factory=Counter)

    def begin_step(self) -> None:
        self.step += 1
        self._calls.clear()
        for lane in self.lanes.values():
            lane.latest = {}
        if self.collapse is not None:
            self.collapse.begin_step()
        if self.finished:
            self.lanes.clear()

    def note(self, name: str, letter: str, distance: float | None) -> None:
        """Write down what a pass did in the step that runs."""
        self.letters[name] = self.letters.get(name, "").ljust(self.step, "-") + letter
        distances = self.distances.setdefault(name, [])
        distances += [None] * (self.step - len(distances)) + [distance]

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    @property
    def called(self) -> bool:
        """Whether the model was called in the step that runs."""
        return bool(self._calls)

    def lane(self, context: str | None, call: Call) -> tuple[str, Lane]:
        """Return the name and the lane of the next call, empty if nothing in it may be used.

        The pass is known by the pipeline's name for it, else by its place among the calls of this step, and by its
        batch size: a second pass that comes and goes must not find what another has kept.
        """
        self._calls[context or ""] += 1
        ordinal = self._calls[context or ""] - 1
        name = f"{context or ''}{ordinal if ordinal or context is None else ''}"
        if context is None:
            name = self._pass(name, call)
        lane = self.lanes.get((name, call.batch))
        if lane is None:
            lane = self.lanes[name, call.batch] = Lane(call.signature, context is not None, call.batch)
            self._mark(lane, call)
        elif lane.signature != call.signature or lane.step != self.step - 1:
            lane.clear()
            lane.signature = call.signature
        lane.step, lane.latents = self.step, tuple(call.latents.shape)
        if context is None:
            lane.latest = call.tensors
        return name, lane

    def _pass(self, name: str, call: Call) -> str:
        """Return the name of an unnamed pass: that of its place, unless its arguments are those of another.

        A pass that is left out for some steps moves the later ones up a place.
        """
        peers = {n: lane for (n, batch), lane in self.lanes.items() if batch == call.batch and not lane.named}
        mine = peers.get(name)
        if len(peers) < 2 or (mine is not None and _any_same(mine.marks, call.tensors)):
            return name
        return next((n for n, lane in peers.items() if _any_same(lane.marks, call.tensors)), name)

    def _mark(self, lane: Lane, call: Call) -> None:
        """Remember which arguments tell a new unnamed pass from the others of this step."""
        for (_, batch), peer in self.lanes.items():
            if lane.named or peer.named or batch != call.batch or not peer.latest:
                continue
            for key in call.tensors.keys() & peer.latest.keys():
                if not same(call.tensors[key], peer.latest[key]):
                    lane.marks[key], peer.marks[key] = call.tensors[key], peer.latest[key]


def _modes(devices: Iterable[str]) -> Iterator[Hashable]:
    """Return what the dtype of an operator's result depends on besides its arguments; and whether it is an inference
    tensor, which cannot be kept for a call that is not in inference mode."""
    yield torch.is_inference_mode_enabled()
    for device in sorted(devices):
        enabled = torch.is_autocast_enabled(device)
        yield device, torch.get_autocast_dtype(device) if enabled else None


def _any_same(marks: Mapping[Hashable, Tensor], tensors: Mapping[Hashable, Tensor]) -> bool:
    return any(key in tensors and same(mark, tensors[key]) for key, mark in marks.items())


def same(one: Tensor, two: Tensor) -> bool:
    return one is two or (one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two))
