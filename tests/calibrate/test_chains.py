from collections.abc import Collection
from itertools import combinations, product

import numpy as np
import pytest

from dicache.calibrate.chains import GapCosts, cheapest_chains, cheapest_share, step_costs


def random_costs(rng: np.random.Generator, steps: int, memory: int) -> list[np.ndarray]:
    return [rng.random((last + 1,) * (memory - 1) + (steps - last,)) for last in range(steps)]


def cost_of(tables: list[np.ndarray], memory: int, chain: tuple[int, ...]) -> float:
    """Return the cost of a chain as the format of the tables says, gap by gap."""
    total = 0.0
    for place, last in enumerate(chain):
        end = chain[place + 1] if place + 1 < len(chain) else len(tables)
        older = [chain[place - back] + 1 if place >= back else 0 for back in range(memory - 1, 0, -1)]
        total += tables[last][(*older, end - last - 1)]
    return total


def cheapest_by_trying(
    tables: list[np.ndarray], memory: int, mandatory: Collection[int], max_gap: int | None
) -> dict[int, tuple[float, tuple[int, ...]]]:
    """Return for each number of computed steps the cheapest of all chains."""
    steps = len(tables)
    best: dict[int, tuple[float, tuple[int, ...]]] = {}
    for count in range(1, steps + 1):
        for rest in combinations(range(1, steps), count - 1):
            chain = (0, *rest)
            gaps = np.diff((*chain, steps))
            if set(mandatory) <= set(chain) and (max_gap is None or gaps.max() <= max_gap):
                found = (cost_of(tables, memory, chain), chain)
                best[count] = min(best.get(count, found), found)
    return best


@pytest.mark.parametrize("memory", [1, 2, 3, 4])
def test_dynamic_programming_finds_what_trying_all_chains_finds(memory: int) -> None:
    rng = np.random.default_rng(memory)
    for steps, warm_up, force_last, max_gap in product(range(1, 9), (1, 3), (False, True), (None, 1, 2, 4)):
        tables = random_costs(rng, steps, memory)
        mandatory = {*range(min(warm_up, steps)), *((steps - 1,) if force_last else ())}
        found = cheapest_chains(tables.__getitem__, steps, memory, mandatory=mandatory, max_gap=max_gap)
        want = cheapest_by_trying(tables, memory, mandatory, max_gap)
        assert list(found) == sorted(want)
        for count, chain in found.items():
            assert chain.steps == want[count][1]
            assert chain.cost == pytest.approx(want[count][0], rel=1e-12)


def test_any_steps_can_be_mandatory() -> None:
    tables = random_costs(np.random.default_rng(0), 8, 2)
    found = cheapest_chains(tables.__getitem__, 8, 2, mandatory={2, 5})
    want = cheapest_by_trying(tables, 2, {2, 5}, None)
    assert {count: chain.steps for count, chain in found.items()} == {
        count: steps for count, (_, steps) in want.items()
    }


def test_an_infinite_cost_forbids_a_gap_and_what_cannot_be_is_not_read() -> None:
    tables = random_costs(np.random.default_rng(1), 6, 2)
    for last, table in enumerate(tables):
        table[last > 0, :] = np.nan if last else table[0]  # from step 1 on there is an older step: entry 0 cannot be
        for older, gap in product(range(1, last + 1), range(6 - last)):
            table[older, gap] = 1.0 + gap
    tables[0][0, :] = np.inf
    tables[0][0, 2] = 1.0  # only step 3 may follow step 0
    tables[3][1, 0] = 2.0
    found = cheapest_chains(tables.__getitem__, 6, 2)
    assert {count: chain.steps for count, chain in found.items()} == {2: (0, 3), 3: (0, 3, 5), 4: (0, 3, 4, 5)}


def test_a_cost_that_is_not_a_number_is_refused_where_it_counts() -> None:
    tables = random_costs(np.random.default_rng(2), 5, 2)
    tables[2][1, 1] = np.nan  # from 0 and 2 to 4
    with pytest.raises(ValueError, match="behind step 2 have NaN"):
        cheapest_chains(tables.__getitem__, 5, 2)
    assert 4 in cheapest_chains(tables.__getitem__, 5, 2, mandatory={3})
    with pytest.raises(ValueError, match=r"behind step 0 must have the shape \(1, 5\), found \(5,\)"):
        cheapest_chains(lambda last: np.zeros(5 - last), 5, 2)


@pytest.mark.parametrize(("words", "said"), [({"steps": 0}, "1 or more"), ({"mandatory": {7}}, "no step 7")])
def test_wrong_arguments_are_refused(words: dict[str, object], said: str) -> None:
    costs: GapCosts = lambda last: np.zeros(4 - last)  # noqa: E731
    given: dict[str, object] = {"steps": 4, "memory": 1, **words}
    with pytest.raises(ValueError, match=said):
        cheapest_chains(costs, **given)  # type: ignore[arg-type]


def test_step_costs_are_what_each_step_adds_to_its_gap() -> None:
    tables = [
        np.concatenate((np.zeros((last + 1, 1)), table[:, 1:].cumsum(axis=1)), axis=1)
        for last, table in enumerate(random_costs(np.random.default_rng(3), 7, 2))
    ]
    added = step_costs(tables.__getitem__, 7, 2, [0, 3, 4])
    assert np.flatnonzero(added == 0).tolist() == [0, 3, 4]
    assert added[2] == pytest.approx(tables[0][0, 2] - tables[0][0, 1])
    assert added[5] == pytest.approx(tables[4][4, 1])  # the gap behind 4 goes on from 3, entry 4
    assert added.sum() == pytest.approx(cost_of(tables, 2, (0, 3, 4)))


def test_a_budget_is_shared_out_as_trying_all_shares_does() -> None:
    rng = np.random.default_rng(4)
    for kinds, budget in product((1, 2, 3, 4), (0, 5, 12, 20, 99)):
        options = {
            str(kind): [
                (int(take), float(cost)) for take, cost in zip(rng.integers(1, 9, 5), rng.random(5), strict=True)
            ]
            for kind in range(kinds)
        }
        shares = [
            (sum(options[kind][place][1] for kind, place in zip(options, places, strict=True)), places)
            for places in product(range(5), repeat=kinds)
            if sum(options[kind][place][0] for kind, place in zip(options, places, strict=True)) <= budget
        ]
        want = dict(zip(options, min(shares)[1], strict=True)) if shares else None
        assert cheapest_share(options, budget) == want
