"""Models that are spread over two processes, by diffusers' context and tensor parallelism and by FSDP2, on CPUs.

diffusers looks for an accelerator, and for tensor parallelism has a list of those that it knows: the processes here are
told that a CPU is one. What is tested is then done by diffusers' own hooks and by gloo.
"""

import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from dicache import apply
from dicache.anatomy import survey
from dicache.anatomy.fingerprint import fingerprint
from dicache.anatomy.spread import groups_of
from dicache.profiler import ProfileError, storage
from dicache.profiler.profiling import profile_pipeline
from tests.features.test_offloading import by_blocks, by_leaves, dispatched
from tests.profiler.test_two_models import PROMPTS, SAMPLING
from tests.spreading import (
    POLICIES,
    ROUNDING,
    STEPS,
    Told,
    attempted,
    in_processes,
    laws,
    made,
    pipeline_of_one,
    plan_of,
    replayed,
)
from tests.tiny import adaptive, flux

apply_context_parallel = pytest.importorskip("diffusers.hooks.context_parallel").apply_context_parallel
parallel = pytest.importorskip("diffusers.models._modeling_parallel", reason="this diffusers spreads no models")
if not hasattr(parallel, "TensorParallelConfig"):
    pytest.skip("this diffusers spreads no weights", allow_module_level=True)

RANKS, TIMEOUT = 2, 60.0


def by_tokens(model: Any) -> None:
    model.enable_parallelism(config=parallel.ContextParallelConfig(ulysses_degree=RANKS))


def by_weights(model: Any) -> None:
    model.enable_parallelism(config=parallel.TensorParallelConfig(tp_degree=RANKS))


def by_fsdp(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)  # of the whole model as one, whose weights are not in shards any more after a call
    model.requires_grad_(False)


WAYS = {"tokens": by_tokens, "weights": by_weights, "fsdp": by_fsdp}
MODELS = {"tokens": ("flux", "wan"), "weights": ("flux", "flux2"), "fsdp": ("flux",)}
CASES = [(way, name) for way, names in MODELS.items() for name in names]


def spread(way: str, name: str) -> Told:
    """Compare a model that is spread with the same one whole."""
    model, inputs = made(name)
    whole, weights = survey(model, inputs), fingerprint(model)
    schedule = plan_of(whole, weights)
    wanted = {"plan": replayed(model, schedule, inputs)}
    if name == "flux":
        for policy, (schedule_of, threshold) in POLICIES.items():
            wanted[policy] = replayed(model, schedule_of(flux, threshold, steps=STEPS), inputs)
    WAYS[way](model)
    found = {"plan": replayed(model, schedule, inputs)}
    for policy, (schedule_of, threshold) in POLICIES.items() if name == "flux" else ():
        found[policy] = replayed(model, schedule_of(flux, threshold, steps=STEPS), inputs)
    return {
        "weights": fingerprint(model) == weights,
        "groups": len(groups_of(model)),
        "letters": {key: (letters, found[key][0]) for key, (letters, _) in wanted.items()},
        "errors": {key: float((found[key][1] - out).abs().max() / out.abs().max()) for key, (_, out) in wanted.items()},
        "laws": laws(model, inputs, survey(model, inputs)),
    }


def profiled(folder: Path, rank: int) -> Told:
    """Profile a video model whose tokens are shared out, in two goes; the ranks have folders of their own."""
    mine = folder / f"rank{rank}"
    mine.mkdir()

    def go(pipe: Any, file: Path, **options: Any) -> str:
        try:
            profile_pipeline(pipe, "wan", file, PROMPTS, sampling=SAMPLING, progress=False, **options)
        except ProfileError as error:
            return str(error)
        return "done"

    pipe = pipeline_of_one()
    by_tokens(pipe.transformer)
    said = {
        "first": go(pipe, mine / "p.h5", only=[0]),
        "again": go(pipe, mine / "p.h5"),
        "rest": go(pipe, mine / "p.h5", resume=True),
        "priors": go(pipe, mine / "q.h5", priors=True),
        "elsewhere": go(pipe, Path("/proc/q.h5")) if rank == 0 else go(pipe, mine / "q.h5"),
        "files": sorted(file.name for file in mine.iterdir()),
    }
    if rank == 0:
        said["whole"] = go(pipeline_of_one(), folder / "whole.h5")
    return said


def begin(rank: int, folder: str, timeout: float = TIMEOUT) -> None:
    """Meet the other rank, and tell diffusers that a CPU is an accelerator."""
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1
    from diffusers.hooks import tensor_parallel

    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=RANKS, timeout=timedelta(seconds=timeout)
    )


def work(rank: int, folder: str) -> None:
    begin(rank, folder)
    said: Told = {f"{way} {name}": attempted(lambda: spread(way, name)) for way, name in CASES}  # noqa: B023
    said["profile"] = attempted(lambda: profiled(Path(folder), rank))
    Path(folder, f"{rank}.json").write_text(json.dumps(said))
    distributed.destroy_process_group()


def fail(rank: int, folder: str) -> None:
    """Rank 1 fails inside of a block of which all ranks have a part."""
    begin(rank, folder, timeout=20.0)
    model, inputs = made("flux")
    by_weights(model)
    since, said = time.monotonic(), "nothing"

    def broken(*_: object) -> None:
        raise ValueError("out of luck")

    try:
        with torch.no_grad(), apply(model, adaptive(flux, 0.0, steps=STEPS)) as cache:
            cache.begin_generation()
            for step in range(STEPS):
                cache.begin_step()
                if rank and step == 2:
                    model.get_submodule("transformer_blocks.1.ff").register_forward_pre_hook(broken)
                model(**inputs.kwargs)
    except (ValueError, RuntimeError) as error:
        said = f"{type(error).__name__} {'at once' if time.monotonic() - since < 10 else 'late'}"
    Path(folder, f"{rank}.txt").write_text(said)


def in_ranks(act: Callable[[int, str], None], folder: Path) -> None:
    in_processes(RANKS, act, str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def said(folder: Path) -> list[Told]:
    """What each rank says of all cases: it takes a while until a process has begun."""
    in_ranks(work, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def of_case(said: list[Told], case: str) -> Iterator[Told]:
    for told in said:
        assert "failed" not in told[case], told[case]["failed"]
        yield told[case]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_the_laws_hold_of_a_model_that_is_spread(said: list[Told], way: str, name: str) -> None:
    for told in of_case(said, f"{way} {name}"):
        assert set(told["laws"].values()) == {"kept"}, "\n".join(x for x in told["laws"].values() if x != "kept")
        assert told["groups"] == 1


@pytest.mark.parametrize(("way", "name"), CASES)
def test_a_schedule_of_the_whole_model_does_the_same_to_it_spread(said: list[Told], way: str, name: str) -> None:
    for told in of_case(said, f"{way} {name}"):
        assert told["weights"], "its weights are taken for others"
        for wanted, found in told["letters"].values():
            assert wanted == found
            assert {"C", "."} == set(wanted)
        assert all(error < ROUNDING for error in told["errors"].values()), told["errors"]


def test_a_rank_that_fails_inside_of_the_model_says_why_and_the_other_does_not_wait_for_ever(tmp_path: Path) -> None:
    in_ranks(fail, tmp_path)
    waiting, failing = ((tmp_path / f"{rank}.txt").read_text() for rank in range(RANKS))
    assert failing == "ValueError at once"
    assert waiting == "RuntimeError at once"  # of the model's own exchange, whose other end is gone


def test_hooks_that_come_while_a_generation_is_broken_off_do_not_break_the_model() -> None:
    model, inputs = made("wan")
    with torch.no_grad():
        want = model(**inputs.kwargs)[0]
        cache = apply(model, plan_of(survey(model, inputs), fingerprint(model)))
        cache.begin_generation()
        cache.begin_step()
        model(**inputs.kwargs)
        plan = {"blocks.0": {"hidden_states": parallel.ContextParallelInput(split_dim=1, expected_dims=9)}}
        apply_context_parallel(model, parallel.ContextParallelConfig(ulysses_degree=2), plan)  # splits nothing
        cache.begin_step()
        assert torch.equal(model(**inputs.kwargs)[0], want)  # all is reused, of the same inputs
        cache.detach()
        assert torch.equal(model(**inputs.kwargs)[0], want)


@pytest.mark.parametrize("feature", [dispatched, by_leaves, by_blocks])
def test_a_profile_of_a_model_that_is_offloaded_is_that_of_the_model(feature: Any, tmp_path: Path) -> None:
    made = []
    for place, spreads in enumerate((lambda model: None, feature)):
        pipe = pipeline_of_one()
        spreads(pipe.transformer)
        file = tmp_path / f"{place}.h5"
        profile_pipeline(pipe, "wan", file, PROMPTS[:2], sampling=SAMPLING, progress=False)
        made.append(storage.load(file))
    one, two = made
    assert one.provenance.differences(two.provenance) == []
    for name, values in one.arrays.items():
        np.testing.assert_array_equal(values, two.arrays[name], err_msg=name)


def test_a_profile_of_a_model_whose_tokens_are_shared_is_that_of_the_whole(said: list[Told], folder: Path) -> None:
    first, second = of_case(said, "profile")
    for told in (first, second):
        assert told["first"] == told["rest"] == "done"
        assert "p.h5 exists, with 1 runs; pass --resume" in told["again"]
        assert "--priors keeps whole outputs" in told["priors"]
        assert "/proc/q.h5 cannot be written" in told["elsewhere"]  # what one of them finds, all say
    assert first["files"] == ["p.h5"]
    assert second["files"] == []  # one of them writes
    one, two = storage.load(folder / "rank0" / "p.h5"), storage.load(folder / "whole.h5")
    assert one.runs == two.runs
    for name, want in two.arrays.items():
        if name == "motion/between_frames":
            assert np.isnan(one.arrays[name]).all()
            continue
        sketched = name == "body/branches"  # by other signs
        np.testing.assert_allclose(one.arrays[name], want, rtol=0.2 if sketched else 2e-3, atol=1e-5, err_msg=name)
