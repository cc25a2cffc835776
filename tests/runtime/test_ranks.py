"""Law 9: the ranks that a model is spread over decide alike, and one that fails leaves none of them waiting."""

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, distributed

from dicache import apply
from dicache.anatomy.spread import RanksError
from dicache.runtime.ranks import Ranks
from tests.runtime.test_decisions import Waits
from tests.spreading import in_processes
from tests.tiny import adaptive, arguments, dit, first_block, predict

RANKS = 2
STEPS = 12
THRESHOLDS = {adaptive: 0.35, first_block: 0.8}
TIMEOUT = 20.0  # seconds; a rank that waits for ever would reach it
Task = Callable[[int], Any]


def inputs() -> Iterator[dict[str, Tensor]]:
    """Yield what the model is given at each step: two samples that change at different paces."""
    first = arguments(dit(), batch=RANKS)
    noise = arguments(dit(), batch=RANKS, seed=1)["hidden_states"]
    for step in range(STEPS):
        moved = torch.tensor([0.02, 0.4]).view(-1, 1, 1, 1) * step
        timestep = torch.full_like(first["timestep"], 900 - 60 * step)
        yield {**first, "hidden_states": first["hidden_states"] + moved * noise, "timestep": timestep}


def letters(
    samples: slice, group: Any = None, fails_at: int | None = None, policy: Any = adaptive, *, offloaded: bool = False
) -> str:
    """Return what a model does on some of the samples, each step of a generation."""
    model = dit()
    if offloaded:
        cpu_offload(model, execution_device=torch.device("cpu"))
    with apply(model, policy(dit, THRESHOLDS[policy], steps=STEPS), group=group) as cache:
        cache.begin_generation()
        for step, given in enumerate(inputs()):
            cache.begin_step()
            if step == fails_at:
                given["hidden_states"] = given["hidden_states"][:, :1]  # what the patches cannot be made of
            predict(model, {name: value[samples] for name, value in given.items()})
        return cache.stats.steps["0"]


def of_rank(rank: int) -> slice:
    return slice(rank, rank + 1)


def as_one(rank: int) -> str:
    return letters(of_rank(rank), distributed.group.WORLD)


def alone(rank: int) -> str:
    return letters(of_rank(rank))


def as_one_by_first_block(rank: int) -> str:
    return letters(of_rank(rank), distributed.group.WORLD, policy=first_block)


def alone_by_first_block(rank: int) -> str:
    return letters(of_rank(rank), policy=first_block)


def with_a_failure(rank: int) -> str:
    start = time.monotonic()
    try:
        return letters(of_rank(rank), distributed.group.WORLD, fails_at=5 if rank else None)
    except RanksError as error:
        return f"{error} after {'a moment' if time.monotonic() - start < TIMEOUT / 2 else 'a long time'}"
    except Exception as error:
        return f"own {type(error).__name__}"


def with_an_early_failure(rank: int) -> str:
    """Rank 1 fails before anything was decided, and lives on."""
    start = time.monotonic()
    try:
        return letters(of_rank(rank), distributed.group.WORLD, fails_at=1 if rank else None, offloaded=True)
    except RanksError as error:
        return f"{error} after {'a moment' if time.monotonic() - start < TIMEOUT / 2 else 'a long time'}"
    except Exception as error:
        time.sleep(3)  # so that it is not its leaving that the other finds out
        return f"own {type(error).__name__}"


def with_a_late_failure(rank: int) -> str:
    """Rank 1 fails in the first pass of the last step that is decided on, behind its decision."""
    start = time.monotonic()
    model = dit()
    try:
        with apply(model, adaptive(dit, THRESHOLDS[adaptive], steps=STEPS), group=distributed.group.WORLD) as cache:
            cache.begin_generation()
            for step, given in enumerate(inputs()):
                cache.begin_step()
                for place in range(2):
                    mine = {name: value[of_rank(rank)] + place for name, value in given.items()}
                    if rank and step == STEPS - 2 and not place:
                        model.get_submodule("proj_out_2").register_forward_pre_hook(_fail)
                    predict(model, mine)
        return "done"
    except RanksError as error:
        return f"{error} after {'a moment' if time.monotonic() - start < TIMEOUT / 2 else 'a long time'}"
    except ValueError as error:
        return f"own {error}"


def _fail(*_: object) -> None:
    raise ValueError("out of luck")


def with_one_that_leaves(rank: int) -> str:
    try:
        return letters(of_rank(rank), distributed.group.WORLD) if rank else "left"
    except RanksError as error:
        return str(error)


def work(rank: int, folder: str, task: Task) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT)
    )
    distributed.barrier()  # gloo does not take it well if one leaves while others come
    Path(folder, str(rank)).write_text(task(rank))
    distributed.destroy_process_group()


def run(task: Task, folder: Path) -> list[str]:
    """Return what each rank says."""
    folder.mkdir(exist_ok=True)
    in_processes(RANKS, work, str(folder), task)
    return [(folder / str(rank)).read_text() for rank in range(RANKS)]


@pytest.mark.parametrize(
    ("policy", "together", "by_themselves"),
    [(adaptive, as_one, alone), (first_block, as_one_by_first_block, alone_by_first_block)],
)
def test_ranks_decide_as_one_model_that_is_not_spread_would(
    policy: Any, together: Task, by_themselves: Task, tmp_path: Path
) -> None:
    apart = run(by_themselves, tmp_path / "apart")
    assert apart[0] != apart[1]  # by themselves they would not
    whole = letters(slice(None), policy=policy)
    assert {"C", "."} == set(whole)
    assert run(together, tmp_path / "together") == [whole, whole]


def test_a_rank_that_fails_lets_the_others_fail_at_once(tmp_path: Path) -> None:
    waiting, failing = run(with_a_failure, tmp_path)
    assert failing.startswith("own ")
    assert waiting == "another rank has failed in this step; see its own error after a moment"


def test_a_rank_whose_model_is_offloaded_and_that_fails_at_first_lets_the_others_fail_at_once(tmp_path: Path) -> None:
    waiting, failing = run(with_an_early_failure, tmp_path)
    assert failing.startswith("own ")
    assert waiting == "another rank has failed in this step; see its own error after a moment"


def test_a_rank_that_fails_behind_its_decision_is_not_waited_for_in_another_pass(tmp_path: Path) -> None:
    waiting, failing = run(with_a_late_failure, tmp_path)
    assert failing == "own out of luck"
    assert waiting == "another rank has failed in this step; see its own error after a moment"


def test_ranks_wait_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_reduce", lambda numbers, group: numbers.mul_(RANKS))
    with Waits() as waits:
        assert Ranks([object()]).quotients(torch.tensor([[1.0, 2.0], [3.0, 4.0]])) == [0.5, 0.75]
    assert waits.count == 1


def test_a_rank_that_is_gone_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    left, waiting = run(with_one_that_leaves, tmp_path)
    assert left == "left"
    assert "rank 1 of 2 waited in vain" in waiting


def test_without_a_process_group_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_reduce", None)
    assert "." in letters(slice(None))
