"""The cheapest chain of computed steps, exactly, where a gap's cost depends on the last few steps before it."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Key = tuple[int, ...]
NONE = -1  # in the place of a computed step where there are fewer of them

GapCosts = Callable[[int], np.ndarray]
"""From the last computed step to what the gaps behind it cost, by the computed steps before it and by the next one.

With a memory of m it returns for a step c of S an array of m - 1 axes of c + 1 entries, the oldest step first, then one
of S - c. Entry 0 of an older axis is for no such step, entry i + 1 for step i; of the last axis, entry 0 is for a next
step c + 1, the last entry for none before the end. Infinite forbids a gap. What cannot be, such as older steps that do
not rise, is not read.
"""


@dataclass(frozen=True)
class Chain:
    """Which steps are computed, and what the gaps between them cost in all."""

    steps: tuple[int, ...]
    cost: float


def cheapest_chains(
    costs: GapCosts, steps: int, memory: int, *, mandatory: Collection[int] = (), max_gap: int | None = None
) -> dict[int, Chain]:
    """Return the cheapest chain for every number of computed steps that is possible.

    It is dynamic programming over the last `memory` computed steps, so that nothing is approximated: to keep one
    predecessor for each step only, which SGLang's file says of DPCache's own code, is not exact where the cost asks for
    more of them. The work grows as `steps ** (memory + 2)`, three of these axes in array operations, and the bytes held
    as one power less: 0.1 s for 100 steps and a memory of 2, 1 s and half a gigabyte for 3.

    Args:
        costs: Of the gaps; asked once for each step.
        steps: Of a generation, at least 1. The first is always computed.
        memory: On how many of the last computed steps the cost of a gap depends: 1 for holding, n + 1 for a Taylor
            expansion of order n.
        mandatory: Steps that are computed.
        max_gap: Most steps from a computed one to the next, or to the end; 1 computes all.

    Returns:
        By the number of computed steps, in rising order. Of chains that cost the same, one and always the same.

    Raises:
        ValueError: If an argument, the shape of a cost or a cost that is asked for (NaN) is wrong.

    References:
        DPCache, arXiv 2602.22654, section 3.3; made exact over pairs of steps in SGLang's runtime/cache/dpcache.py.
    """
    if steps < 1 or memory < 1 or (max_gap is not None and max_gap < 1):
        raise ValueError(f"steps, memory and max_gap must be 1 or more, found {steps}, {memory} and {max_gap}")
    if wrong := sorted(step for step in mandatory if not 0 <= step < steps):
        raise ValueError(f"there is no step {wrong[0]} that could be mandatory; the steps are 0 to {steps - 1}")
    table = _Table(costs, steps, memory, _reaches(steps, mandatory, max_gap))
    return dict(table.chains())


def step_costs(costs: GapCosts, steps: int, memory: int, computed: Sequence[int]) -> np.ndarray:
    """Return what each step adds to the cost of any chain, (steps,), 0 where it is computed.

    Args:
        costs: As for `cheapest_chains`, where a gap costs what its steps add up to, from 0 for none.
        steps: Of a generation.
        memory: As for `cheapest_chains`.
        computed: The computed steps, rising from 0.
    """
    padded = (NONE,) * (memory - 1) + tuple(computed)
    found = np.zeros(steps)
    for place, (last, end) in enumerate(zip(computed, (*computed[1:], steps), strict=True)):
        older = padded[place : place + memory - 1]
        found[last + 1 : end] = np.diff(costs(last)[tuple(step + 1 for step in older)][: end - last])
    return found


def _reaches(steps: int, mandatory: Collection[int], max_gap: int | None) -> list[int]:
    """Return how far the next computed step, or the end at `steps`, may lie behind each step."""
    needed = sorted({*mandatory, steps})
    nearest = [next(step for step in needed if step > last) for last in range(steps)]
    return [min(step - last, max_gap or steps) for last, step in enumerate(nearest)]


class _Table:
    """What the cheapest chain up to each state costs, for each number of computed steps.

    A state is the last steps computed: (oldest, *key, last). The costs of those that share a key lie in one array,
    (last, number computed, oldest + 1), so that the minimum over the oldest is taken for all next steps and numbers at
    once. With a memory of 1 the table keeps one step more than is needed.
    """

    def __init__(self, costs: GapCosts, steps: int, memory: int, reaches: Sequence[int]) -> None:
        self._steps, self._reaches = steps, reaches
        self._single = memory == 1
        self._memory = max(memory, 2)
        self._best: dict[Key, np.ndarray] = {}
        self._costs: list[np.ndarray] = []
        self._states_of((NONE,) * (self._memory - 2))[0, 1, 0] = 0.0
        for last in range(steps):
            self._costs.append(self._checked(costs(last), last))
            for key in self._keys_before(last):
                self._extend(key, last)

    def chains(self) -> Iterator[tuple[int, Chain]]:
        """Yield the cheapest chain for each number of computed steps."""
        ends = {
            (key, last): self._onward(key, last, self._steps)  # (number computed, oldest + 1)
            for last in range(self._steps)
            if last + self._reaches[last] >= self._steps
            for key in self._keys_before(last)
        }
        for count in range(1, self._steps + 1):
            found = [(table[count].min(), at) for at, table in ends.items() if count < len(table)]
            cost, (key, last) = min(found, default=(np.inf, ((), 0)))
            if cost < np.inf:
                oldest = int(ends[key, last][count].argmin()) - 1
                yield count, Chain(self._walked_back(count, oldest, key, last), float(cost))

    def _keys_before(self, last: int) -> list[Key]:
        """Return the keys of all states that end in a step."""
        return [key for key, table in self._best.items() if np.isfinite(table[last]).any()]

    def _checked(self, cost: np.ndarray, last: int) -> np.ndarray:
        memory = 1 if self._single else self._memory
        shape = (last + 1,) * (memory - 1) + (self._steps - last,)
        if cost.shape != shape:
            raise ValueError(f"the costs behind step {last} must have the shape {shape}, found {cost.shape}")
        return np.broadcast_to(cost, (last + 1, len(cost))) if self._single else cost

    def _states_of(self, key: Key) -> np.ndarray:
        """Return the costs of the states with this key, infinite where there is no chain yet."""
        if key not in self._best:
            behind = key[0] if key else self._steps - 1  # the oldest lies before it
            most = min(behind + 1 + len(key), self._steps)  # of computed steps, with the last
            self._best[key] = np.full((self._steps, most + 1, max(behind, 0) + 1), np.inf)
        return self._best[key]

    def _gaps_behind(self, key: Key, last: int) -> np.ndarray:
        """Return what the gaps behind states cost, (oldest + 1, next)."""
        behind = (key or (last,))[0]
        at: tuple[Any, ...] = (slice(max(behind, 0) + 1), *(step + 1 for step in key))
        return np.asarray(self._costs[last][at])

    def _onward(self, key: Key, last: int, end: int) -> np.ndarray:
        """Return what states cost with the gap up to one next step, (number computed, oldest + 1)."""
        gaps = self._gaps_behind(key, last)[:, end - last - 1]
        so_far = self._best[key][last][:, : len(gaps)]
        return np.asarray(np.add(so_far, gaps, out=np.full(so_far.shape, np.inf), where=np.isfinite(so_far)))

    def _extend(self, key: Key, last: int) -> None:
        """Enter what chains cost that go on from some states."""
        gaps = self._gaps_behind(key, last)[:, : self._reaches[last]]  # (oldest + 1, next)
        so_far = self._best[key][last][:, : len(gaps)]  # (number computed, oldest + 1)
        possible = np.isfinite(so_far).any(axis=0)
        so_far, gaps = so_far[:, possible], gaps[possible]
        if np.isnan(gaps).any():
            raise ValueError(f"the costs behind step {last} have NaN where a chain is possible")
        if reach := min(self._reaches[last], self._steps - 1 - last):
            cost = (so_far[:, :, None] + gaps[:, :reach]).min(axis=1).T  # (next, number computed)
            tail = (*key, last)
            later = self._states_of(tail[1:])[last + 1 : last + 1 + reach, 1:, tail[0] + 1]
            most = min(cost.shape[1], later.shape[1])
            later[:, :most] = cost[:, :most]

    def _walked_back(self, count: int, oldest: int, key: Key, last: int) -> tuple[int, ...]:
        """Return the computed steps of the cheapest chain of `count` steps that ends in a state."""
        chain = [last]
        while count > 1:
            end, before = last, (oldest, *key)  # the state before; its own oldest is to be found
            key, last, count = before[:-1], before[-1], count - 1
            oldest = int(self._onward(key, last, end)[count].argmin()) - 1
            chain.append(last)
        return tuple(reversed(chain))


def cheapest_share(options: Mapping[str, Sequence[tuple[int, float]]], budget: int) -> dict[str, int] | None:
    """Choose one option of each kind so that they cost least together, within a budget, exactly.

    Args:
        options: For each kind, pairs of what an option takes of the budget and its cost.
        budget: What all may take together.

    Returns:
        For each kind, the place of its option; None if nothing fits. Of choices that cost the same, one that
            takes least.
    """
    taken, cost = np.zeros(1, dtype=np.int64), np.zeros(1)
    chosen = np.zeros((1, 0), dtype=np.int64)  # (choices, kinds so far)
    for pairs in options.values():
        takes, costs = np.array([take for take, _ in pairs], dtype=np.int64), np.array([cost for _, cost in pairs])
        if not len(pairs):
            return None
        taken, cost = (taken[:, None] + takes).ravel(), (cost[:, None] + costs).ravel()
        order = np.lexsort((cost, taken))
        order = order[taken[order] <= budget]
        if not len(order):
            return None
        # Of those that take no less, only one that costs less than all before it can be part of the best.
        before = np.concatenate(([np.inf], np.minimum.accumulate(cost[order])[:-1]))
        order = order[cost[order] < before]
        taken, cost = taken[order], cost[order]
        chosen = np.column_stack((chosen[order // len(pairs)], order % len(pairs)))
    best = int(cost.argmin())
    return dict(zip(options, chosen[best].tolist(), strict=True))
