"""Guidance that collapses on the way: from some step on, one of the two passes is computed and stands for both."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dicache.anatomy.inputs import is_time
from dicache.anatomy.nested import each, tensors_of
from dicache.anatomy.watching import parameters_of
from dicache.runtime.generation import Call, Key, Lane, same
from dicache.runtime.stats import bytes_of
from dicache.runtime.storing import Store, Stored
from dicache.schedules import ScheduleError

# What to do with a call: run it as it is, run the first half of its batch, run it with what the leader of the two
# passes keeps, or return what the other pass has given.
Action = Literal["whole", "half", "lead", "answer"]
WHOLE: Action = "whole"

# Arguments that have a row for each token, and none for each sample; sizes, called time_ids, are of samples.
TABLES = re.compile(r"rope|rotary|(^|_)(?<!time_)ids$")


class Collapse:
    """Ends the guidance of one generation.

    Which calls are the two passes is not told by the pipeline. Two calls of a step, or two halves of a batch, are taken
    for them if they have the same latents at the same time, and differ in something else, a text or a class. This is
    looked at when guidance collapses, and not at the first step, where samples of equal seeds have the same latents
    too: what the model gave for them since then has driven them apart, while the passes of guidance share one sample.

    Args:
        start: The step from which on one pass is computed. A pass that keeps nothing by then is computed once more.
        model: Whose calls they are.
        store: Where what is kept was put, if it was.

    Attributes:
        leader: Of two passes that are called one after the other, the lane whose kept outputs both go on from.
        answer: What the one of them that was called first has given in this step.
    """

    def __init__(self, start: int, model: nn.Module, store: Store | None = None) -> None:
        self.leader: Key = ("", 0)
        self.answer: Any = None
        self._start = start
        self._store = store
        self._names = parameters_of(model)
        self._calls: list[tuple[Key, Call]] = []  # of the step that runs, of passes that are not decided on
        self._asked: Call | None = None  # the call that the answer was given to
        self._sure = False  # whether the two had the same latents also after they were taken for the passes of guidance

    def begin_step(self) -> None:
        """Forget the calls of the step before."""
        self._calls.clear()
        self._asked = self.answer = None

    def ran(self, call: Call, out: Any) -> None:
        """Remember what one of the two passes has given; a copy, since pipelines may change theirs in place."""
        self._asked, self.answer = call, each([out], lambda tensors: tensors[0].clone())

    def action(self, key: Key, lanes: Mapping[Key, Lane], call: Call, step: int) -> Action:
        """Return what to do with a call.

        Args:
            key: Of its lane.
            lanes: All of the generation.
            call: The call.
            step: The step that runs.

        Raises:
            ScheduleError: If there are more than two passes, or what they keep has no mean.
        """
        lane = lanes[key]
        if step < self._start - 1:
            return WHOLE
        if lane.single == "shares" and self._asked is not None:
            if not self._sure and self._are_two(call, self._asked) is None:
                raise ScheduleError(
                    f"two calls of step {step - 1} had the same latents and were taken for the passes of guidance, but "
                    f"at step {step} their latents differ. Give samples of one generation different seeds"
                )
            self._sure = True
            return "answer"
        if lane.single == "shares":
            leader = lanes.get(self.leader)
            if leader is not None and leader.single == "shares" and leader.since >= 0:
                return "lead"
            lane.clear()  # what the two have shared is gone
        if lane.single == "undecided" and self._asked is not None and self._are_two(call, self._asked):
            lane.single = "shares"  # a pass that comes, or comes back, after guidance has collapsed
            return "answer"
        if lane.single == "undecided" and step >= self._start and lane.since >= 0:
            self._decide(key, lanes, call)
        if lane.single == "undecided":
            self._look_for_twins(key, lanes, call)
        actions: dict[str, Action] = {"halves": "half", "shares": "lead"}
        return actions.get(lane.single, WHOLE)

    def _look_for_twins(self, key: Key, lanes: Mapping[Key, Lane], call: Call) -> None:
        lanes[key].twins = []
        for other, before in self._calls:
            if self._are_two(call, before):
                lanes[key].twins.append(other)
                lanes[other].twins.append(key)
        self._calls.append((key, call))

    def _decide(self, key: Key, lanes: Mapping[Key, Lane], call: Call) -> None:
        """Find out what a pass that has kept outputs is, and take the mean if it is one of guidance."""
        lane = lanes[key]
        twins = [other for other in lane.twins if other in lanes]
        halves = self._has_two(call)
        if len(twins) + halves > 1 or any(lanes[other].batch != lane.batch for other in twins):
            raise ScheduleError(
                f"this schedule lets two passes of guidance collapse into one from step {self._start} on, but the "
                "model is called for the same latents more than twice a step. Calibrate without a collapse, such as "
                "tgate --after-gate guided"
            )
        if halves:
            self._keep_means(lane, [lane], lambda x: _mean_of_halves(x, call.batch))
            lane.single = "halves"
        elif not twins:
            lane.single = "no"
        else:
            other = lanes[twins[0]]
            lane.single = "shares"
            if other.single == "shares":
                lane.entries.clear()
            else:
                self._share(lane, other)
                self.leader = key
            other.bytes_held = 0
        lane.bytes_held = bytes_of(lane.entries)

    def _share(self, lane: Lane, other: Lane) -> None:
        if lane.entries.keys() != other.entries.keys():
            raise ScheduleError(
                f"guidance is to collapse at step {self._start}, but one of its passes began later than the other and "
                "has kept fewer outputs. Calibrate for a later step"
            )
        self._keep_means(lane, [lane, other], _mean)
        lane.since = max(lane.since, other.since)
        other.clear()
        other.single = "shares"
        self._sure = False

    def _keep_means(self, lane: Lane, passes: Sequence[Lane], mean: Callable[[Sequence[Tensor]], Tensor]) -> None:
        """Put in the place of what a pass has kept its mean over the passes."""
        for key, entry in lane.entries.items():
            kept = [one.entries[key] for one in passes]
            if self._store is None or not isinstance(entry, Stored):
                lane.entries[key] = each(kept, mean)
            else:
                lane.entries[key] = self._store.put(each([self._store.get(one) for one in kept], mean))

    def _are_two(self, one: Call, other: Call) -> bool | None:
        """Whether two calls are two passes for the same samples; None if their samples or times are not the same."""
        rows = min(one.batch, other.batch)
        if max(one.batch, other.batch) not in (rows, 2 * rows) or not same(one.latents[:rows], other.latents[:rows]):
            return None
        differ = one.batch != other.batch or one.tensors.keys() != other.tensors.keys()
        for key in one.given.keys() & other.given.keys():
            if one.given[key] is one.latents:
                continue
            alike = _all_same(tensors_of(one.given[key]), tensors_of(other.given[key]))
            if not alike and is_time(str(key)) and one.batch == other.batch:
                return None
            differ = differ or not alike
        return differ

    def _has_two(self, call: Call) -> bool:
        """Whether the batch of a call holds two passes for the same samples."""
        if call.batch % 2 or not _same_parts(call.latents, 2):
            return False
        differ = False
        for key, value in call.given.items():
            for tensor in _of_samples(str(key), value, call.batch):
                alike = tensor is call.latents or _same_parts(tensor, 2)
                if not alike and is_time(str(key)):
                    return False
                differ = differ or not alike
        if differ and call.batch % 3 == 0 and _same_parts(call.latents, 3):
            raise ScheduleError(
                f"guidance is to collapse, but whether a batch of {call.batch} equal latents holds two passes or three "
                "cannot be known. Give samples of one generation different seeds"
            )
        return differ

    def first_half(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call for the first half of its batch: views of them."""

        def half(name: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {inner: half(inner, part) for inner, part in value.items()}
            if TABLES.search(name):
                return value
            return each([value], lambda x: x[0][: batch // 2] if _is_of_samples(x[0], batch) else x[0])

        places = map(str, range(len(self._names), len(args)))
        named = [half(name, value) for name, value in zip((*self._names, *places), args, strict=False)]
        return tuple(named), {name: half(name, value) for name, value in kwargs.items()}


def twice(out: Any, batch: int) -> Any:
    """Return a model's output for both halves of a batch, each of them what was given for one.

    Args:
        out: A tensor, (batch / 2, ...), or several in a tuple, a dictionary or an output class of diffusers.
        batch: Of the two together.

    Raises:
        ScheduleError: If a tensor is not one row a sample.
    """

    def doubled(tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        if tensor.ndim == 0 or len(tensor) != batch // 2:
            raise ScheduleError(
                f"guidance has collapsed, but the model gave a tensor of shape {tuple(tensor.shape)} for a batch of "
                f"{batch // 2}, which cannot stand for {batch}"
            )
        return torch.cat((tensor, tensor))

    return each([out], doubled)


def _of_samples(name: str, value: Any, batch: int) -> Iterator[Tensor]:
    """Go through the tensors in an argument that have a row for each sample."""
    if isinstance(value, dict):
        for inner, part in value.items():
            yield from _of_samples(inner, part, batch)
    elif not TABLES.search(name):
        yield from (tensor for tensor in tensors_of(value) if _is_of_samples(tensor, batch))


def _is_of_samples(tensor: Tensor, batch: int) -> bool:
    return tensor.ndim > 0 and len(tensor) == batch


def _same_parts(tensor: Tensor, parts: int) -> bool:
    first, *others = tensor.chunk(parts)
    return all(torch.equal(first, other) for other in others)


def _all_same(one: Iterator[Tensor], other: Iterator[Tensor]) -> bool:
    mine, theirs = list(one), list(other)
    return len(mine) == len(theirs) and all(map(same, mine, theirs))


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    one, other = tensors
    if one.shape != other.shape:
        raise ScheduleError(
            f"guidance cannot collapse: its passes have kept outputs of the shapes {tuple(one.shape)} and "
            f"{tuple(other.shape)}, which have no mean"
        )
    if not any(one.stride()):  # a view of zero, which takes no memory
        return one
    return torch.add(one, other).div_(2)


def _mean_of_halves(tensors: Sequence[Tensor], batch: int) -> Tensor:
    (tensor,) = tensors
    if tensor.ndim == 0 or len(tensor) % batch:
        raise ScheduleError(
            f"guidance cannot collapse: an output of shape {tuple(tensor.shape)} was kept of a batch of {batch}, and "
            "which part of it is of which pass cannot be told"
        )
    first, second = tensor.chunk(2)
    return _mean((first, second))
