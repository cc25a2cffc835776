"""State of one running generation, and in it a lane for each guidance pass."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dicache.anatomy.inputs import is_time, latents_of
from dicache.anatomy.nested import tensors_of
from dicache.schedules import ScheduleError
from dicache.schedules.policies import Memory

if TYPE_CHECKING:
    from dicache.runtime.executor import Executor
    from dicache.runtime.guidance import Collapse

Signature = tuple[Any, ...]
Key = tuple[str, int]  # of a lane: name of the guidance pass, and batch size
Single = Literal["undecided", "no", "halves", "shares"]


class Call:
    """What tells one call of a model from another.

    Args:
        args, kwargs: Of the call.
        names: Of the model's parameters, in their order.

    Attributes:
        given: Its arguments, by name; by place where they have none.
        tensors: The tensors among them.
        latents: Those that are denoised.
        signature: Their names, shape, dtype and device of each tensor, also in lists, words (`kv_cache_mode`), and
            what else decides the dtype and kind of what is made: what differs there is not the same pass.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str]) -> None:
        places = range(len(names), len(args))
        self.given: dict[Hashable, Any] = dict(zip((*names, *places), args, strict=False))
        self.given.update(kwargs)
        self.tensors: dict[Hashable, Tensor] = {}
        self.latents = latents_of(args, kwargs)
        self.batch: int = self.latents.shape[0]
        decides: list[Hashable] = []  # of each argument
        devices = set()
        for key, value in self.given.items():
            if value is None or isinstance(value, (str, bool)):
                decides.append(value)
            elif isinstance(value, Tensor):
                self.tensors[key] = value
                decides.append((value.shape, value.dtype, device := value.device))
                devices.add(device.type)
            else:
                inside = tuple((x.shape, x.dtype, x.device) for x in tensors_of(value))
                decides.append(inside)
                devices.update(device.type for *_, device in inside)
        self.signature: Signature = (*self.given, *decides, *_modes(devices))

    @property
    def conditions(self) -> dict[Hashable, Tensor]:
        """The tensors that may stay as they are from step to step: neither latents nor times."""
        return {key: x for key, x in self.tensors.items() if x is not self.latents and not _is_time(key, x)}


class Seen:
    """A tensor as it was when a pass was called with it: one that is written to afterwards is not the same any more.

    Args:
        tensor: It is held, so that its memory is given to no other, and copied.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, _version(tensor)
        with torch.no_grad():
            self._contents = tensor.clone()

    def same(self, other: Tensor) -> bool:
        """Whether a tensor has what this one had; where it was not written to, nothing is read from a device."""
        unwritten = self._version is not None and self._version == _version(other)
        if unwritten and (other is self._tensor or _in_place(self._tensor, other)):
            return True
        return _alike(self._contents, other) and torch.equal(self._contents, other)


@dataclass
class Lane:
    """What one guidance pass of one generation keeps.

    Attributes:
        signature: That of its calls.
        named: Whether the pipeline has a name for the pass.
        batch: Samples in its calls.
        latents: Shape of the latents in its calls.
        step: Its latest step; a lane that missed one starts afresh.
        since: The step at which it last started with nothing kept, -1 if it is to do so now.
        entries: Kept outputs by site, and kept deltas by range of blocks; those before the last one by site or range
            and how many have been computed since.
        made: Sites whose output has been kept since then.
        memory: What a policy remembers of the pass; None before its first step.
        bytes_held: Memory of the entries.
        bytes_told: What that was when it was last told.
        marks: Conditions that tell this pass from others, all of them together.
        first: Conditions of its first call.
        steady: Those of them that its second call was given too; None before that one.
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
    made: set[str] = field(default_factory=set)
    memory: Memory | None = None
    bytes_held: int = 0
    bytes_told: int = 0
    marks: dict[Hashable, Seen] = field(default_factory=dict)
    first: dict[Hashable, Seen] = field(default_factory=dict)
    steady: dict[Hashable, Seen] | None = None
    single: Single = "undecided"
    twins: list[Key] = field(default_factory=list)

    def clear(self) -> None:
        self.entries.clear()
        self.made.clear()
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
        distances: For each pass in which a policy compared something with its limit, what that was at each step; None
            where nothing was.
        collapse: Ends guidance in it, if the schedule says so.
        checked: Whether a step has ended at the timestep that the schedule has there.
    """

    steps: int
    executor: "Executor | None" = None
    step: int = -1
    lanes: dict[Key, Lane] = field(default_factory=dict)
    letters: dict[str, str] = field(default_factory=dict)
    distances: dict[str, list[float | None]] = field(default_factory=dict)
    collapse: "Collapse | None" = None
    checked: bool = False
    _calls: dict[str | None, int] = field(default_factory=dict)
    _owners: dict[str, tuple[str, int] | None] = field(default_factory=dict)

    def begin_step(self) -> None:
        self.step += 1
        self._calls.clear()
        if self.collapse is not None:
            self.collapse.begin_step()
        if self.finished:
            self.lanes.clear()

    def note(self, name: str, letter: str, distance: float | None) -> None:
        """Write down what a pass did in the step that runs."""
        self.letters[name] = self.letters.get(name, "").ljust(self.step, "-") + letter
        if distance is not None or name in self.distances:
            distances = self.distances.setdefault(name, [])
            distances += [None] * (self.step - len(distances)) + [distance]

    def answered(self) -> None:
        """Count the step that runs as one in which all passes were called, as its outputs are known."""
        for lane in self.lanes.values():
            lane.step = self.step

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
        ordinal = self._calls.get(context, 0)
        self._calls[context] = ordinal + 1
        if context is None:
            alone = ordinal == 0 and len(self.lanes) == 1 and self._is_alone(call)
            name = "0" if alone else self._pass(self._name(str(ordinal), None), call)
        else:
            name = self._name(f"{context}{ordinal or ''}", (context, ordinal))
        lane = self.lanes.get((name, call.batch))
        if lane is None:
            lane = self.lanes[name, call.batch] = Lane(call.signature, context is not None, call.batch)
            if context is None:
                self._check_places(call)
                lane.first = {key: Seen(x) for key, x in call.conditions.items()}
                self._mark(lane, call)
        elif lane.steady is None and context is None:
            lane.steady = {k: x for k, x in lane.first.items() if k in call.tensors and x.same(call.tensors[k])}
            lane.marks = {k: x for k, x in lane.marks.items() if k in lane.steady}
        if lane.signature != call.signature or lane.step != self.step - 1:
            lane.clear()
            lane.signature = call.signature
        lane.step, lane.latents = self.step, tuple(call.latents.shape)
        return name, lane

    def _name(self, wanted: str, owner: tuple[str, int] | None) -> str:
        """Return the name of a pass: the one wanted, with a stroke behind it if it is another's.

        Args:
            wanted: Place of an unnamed pass, or the pipeline's name with the place of a further pass of that name.
            owner: The pipeline's name and the place; None for the unnamed passes, which share their numbers.
        """
        while self._owners.setdefault(wanted, owner) != owner:
            wanted += "'"
        return wanted

    def _is_alone(self, call: Call) -> bool:
        """Whether a step's first call is plainly one of the only pass there is: it is given what that always was."""
        lane = self.lanes.get(("0", call.batch))
        if lane is None or lane.named or lane.steady is None or lane.step >= self.step:
            return False
        return _all_same(lane.steady, call)

    def _pass(self, name: str, call: Call) -> str:
        """Return the name of an unnamed pass: that of its place, unless its arguments are those of another.

        A pass that is left out for some steps moves the later ones up a place, one that is new moves them down.
        """
        peers = {n: lane for (n, batch), lane in self.lanes.items() if batch == call.batch and not lane.named}
        if name not in peers:
            return name
        free = {n: lane for n, lane in peers.items() if lane.step < self.step}
        places = sorted(free, key=lambda n: n != name)
        found = next((n for n in places if free[n].marks and _all_same(free[n].marks, call)), None)
        found = found or next((n for n in places if (n == name or free[n].steady) and _fits(n, peers, call)), None)
        if found is not None:
            return found
        return next(n for n in (self._name(str(place), None) for place in count()) if n not in peers)

    def _check_places(self, call: Call) -> None:
        """Refuse a pass that is new in a place where another one has been taken for it, and has reused what is its."""
        for (name, batch), lane in self.lanes.items():
            if batch != call.batch or lane.named or lane.step < self.step or lane.steady is None:
                continue
            moved = {key: x for key, x in lane.first.items() if key not in lane.steady}
            if _any_same(moved, call) and self.letters.get(name, "C").endswith("."):
                raise ScheduleError(
                    f"a guidance pass that began at step {self.step} was called in the place of another, and was taken "
                    f"for it. Name the passes: call the model inside `with model.cache_context(name)`"
                )

    def _mark(self, lane: Lane, call: Call) -> None:
        """Remember which arguments tell a new unnamed pass from the others, of this step or of those before."""
        for (_, batch), peer in self.lanes.items():
            if peer is lane or peer.named or batch != call.batch:
                continue
            known = peer.first if peer.steady is None else peer.steady
            for key in lane.first.keys() & known.keys():
                if not known[key].same(call.tensors[key]):
                    lane.marks[key], peer.marks[key] = lane.first[key], known[key]


def _modes(devices: set[str]) -> list[Hashable]:
    """Return what the dtype of an operator's result depends on besides its arguments; and whether it is an inference
    tensor, which cannot be kept for a call that is not in inference mode."""
    modes: list[Hashable] = [torch.is_inference_mode_enabled()]
    for device in sorted(devices) if len(devices) > 1 else devices:
        modes.append((device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None))
    return modes


def _any_same(seen: Mapping[Hashable, Seen], call: Call) -> bool:
    return any(key in call.tensors and x.same(call.tensors[key]) for key, x in seen.items())


def _all_same(seen: Mapping[Hashable, Seen], call: Call) -> bool:
    return all(key in call.tensors and x.same(call.tensors[key]) for key, x in seen.items())


def _fits(name: str, peers: Mapping[str, Lane], call: Call) -> bool:
    """Whether a call is given what the lane's calls have always been given; after one, nothing that marks another."""
    lane = peers[name]
    if lane.steady is not None:
        return _all_same(lane.steady, call)
    foreign = {key for key, x in lane.marks.items() if not _all_same({key: x}, call)}
    others = (peer.marks for peer in peers.values() if peer is not lane)
    return not any(_any_same({key: x for key, x in marks.items() if key in foreign}, call) for marks in others)


def _is_time(key: Hashable, tensor: Tensor) -> bool:
    return is_time(key) if isinstance(key, str) else tensor.ndim < 2


def same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are alike; where they lie in the same place, nothing is read from a device."""
    return one is two or (_alike(one, two) and (_in_place(one, two) or torch.equal(one, two)))


def _alike(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype and one.device == two.device


def _in_place(one: Tensor, two: Tensor) -> bool:
    return _alike(one, two) and one.data_ptr() == two.data_ptr() and one.stride() == two.stride()


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to; None if that is not counted."""
    return None if tensor.is_inference() else tensor._version
