import json
from pathlib import Path

import pytest

from benchmarks.comparing import split
from benchmarks.pareto import in_words, varied
from benchmarks.peers import answers, grid, masks, peers
from benchmarks.tuning import Trial, best, thinned
from dicache.models.loading import load
from dicache.models.sampling import default_conditions


def test_the_best_trial_is_within_the_budget() -> None:
    trials = [Trial({"n": 1}, 50, 0.8), Trial({"n": 2}, 40, 0.5), Trial({"n": 3}, 40, 0.4), Trial({"n": 4}, 30, 0.3)]
    assert [best(trials, budget).settings["n"] for budget in (0.9, 0.5, 0.3)] == [1, 3, 4]  # type: ignore[union-attr]
    assert best(trials, 0.2) is None


def test_more_settings_begin_with_the_fewer() -> None:
    every = grid(a=range(5), b=("x", "y"))
    assert len(every) == 10
    assert thinned(every, 10) == list(every)
    few = thinned(every, 4)
    assert thinned(every, 7)[:4] == few
    assert all(each in every for each in few)
    assert few != list(every[:4])


def test_a_mask_computes_its_first_steps_and_spreads_the_others() -> None:
    found = [mask for mask in masks(10) if not isinstance(mask, str)]
    assert all(len(mask) == 10 and mask[0] == 1 for mask in found)
    assert [1, 1, 0, 0, 0, 0, 1, 0, 0, 0] in found
    assert {sum(mask) for mask in found} == {3, 4, 5, 6, 7}
    assert len({tuple(mask) for mask in found}) == len(found)


def test_every_peer_has_settings_that_json_can_hold() -> None:
    for peer in peers(20):
        assert peer.grid
        json.dumps(peer.grid)


@pytest.mark.parametrize("model", ["digits", "scenes"])
def test_no_run_is_both_tuned_on_and_judged(model: str) -> None:
    pipeline = load(model)
    (tuning, seeds), (judged, others) = split(pipeline, 300)
    assert (len(tuning), len(judged), len(set(others))) == (8, 300, 300)
    assert not set(seeds) & set(others)
    if model == "scenes":
        assert not set(tuning) & set(judged)
        assert not {*tuning, *judged} & set(default_conditions(pipeline, 32))  # those that are profiled


def test_a_table_tells_what_was_tuned() -> None:
    every = grid(order=(1, 2), mask=([1, 0, 1], [1, 1, 0]), kind=("static",))
    assert in_words(varied(every, every[0])) == "order 1, mask C.C"


def test_a_worker_that_breaks_off_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.python", lambda: Path("/bin/false"))
    with pytest.raises(RuntimeError, match=r"broke off with 1; see .*worker\.log"):
        list(answers({}, tmp_path))
