"""One profile made by many processes: each writes its runs to a shard of its own, and the shards are joined.

Under a launcher such as torchrun, which tells each process its rank, the ranks of all machines need a folder in common
for the files. Elsewhere `part_of` says which runs are whose, and nothing is exchanged.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from dicache.anatomy.spread import groups_of
from dicache.profiler import storage
from dicache.profiler.profiles import ProfileError, Run
from dicache.profiler.profiling import check_runs, planned_runs, profile_pipeline
from dicache.runtime.apply import denoiser

MEETING = timedelta(minutes=10)  # within which all ranks must have started
LATE = timedelta(hours=24)  # by which a rank may be done later than another; one that has died is noticed at once


def shard_of(output: Path, part: int, count: int) -> Path:
    """Return where part 1 to `count` of a profile is written: beside it, as `p.h5.1-of-4`."""
    return output.with_name(f"{output.name}.{part}-of-{count}")


def shards_of(output: Path) -> list[Path]:
    """Return the shards that lie beside a profile, whatever its number of parts was."""
    form = re.compile(re.escape(output.name) + r"\.\d+-of-\d+")
    return sorted(file for file in output.parent.glob("*-of-*") if form.fullmatch(file.name))


def part_of(runs: int, part: int, count: int) -> range:
    """Return the places of the runs of part 1 to `count`: every `count`th, so that no part ends much later."""
    return range(part - 1, runs, count)


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def device_of_rank(device: str | None) -> str | None:
    """Return the GPU that is this rank's of those of its machine, where it is to be one."""
    wants_gpu = device == "cuda" or (device is None and torch.cuda.is_available())
    return f"cuda:{os.environ['LOCAL_RANK']}" if wants_gpu and "LOCAL_RANK" in os.environ else device


@contextmanager
def ranks() -> Iterator[int]:
    """Meet the other ranks, if a launcher has started several, and part from them in the end.

    Yields:
        The rank of this process; 0 if it is alone.

    Raises:
        ProfileError: If the others do not come.
    """
    if not is_launched():
        yield 0
        return
    try:
        distributed.init_process_group("gloo", timeout=MEETING)
    except (RuntimeError, ValueError) as error:
        raise ProfileError(
            f"rank {os.environ.get('RANK', '?')} of {os.environ['WORLD_SIZE']} did not find the others ({error}); "
            "needed all of them, and RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them"
        ) from error
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()


def profile_together(
    pipeline: Any,
    name: str,
    output: Path,
    conditions: Sequence[str],
    *,
    seed: int = 0,
    keep_prompts: bool = True,
    resume: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Call `profile_pipeline` in all ranks of the process group: each makes a share of the runs that are missing.

    Args:
        pipeline: A diffusers pipeline, the same in all ranks.
        name: Of the model, for titles.
        output: The HDF5 file, in a folder that all ranks see. The shards lie beside it until they are joined.
        conditions: Prompts or classes, one a run, of all ranks.
        seed: Of the first run; each run has the next one.
        keep_prompts: Whether to write prompts down, or what they hash to.
        resume: Go on with the file and with the shards that are there, of whatever number of ranks.
        progress: Whether rank 0 shows the need and a bar on standard error.
        options: As of `profile_pipeline`.

    Returns:
        The file, once rank 0 has written it.

    Raises:
        ProfileError: As `profile_pipeline` does, or if another rank has died.
    """
    if groups_of(denoiser(pipeline, options.get("component"))):  # a rank is no worker, but a part of the model
        return profile_pipeline(
            pipeline,
            name,
            output,
            conditions,
            seed=seed,
            keep_prompts=keep_prompts,
            resume=resume,
            progress=progress,
            **options,
        )
    rank, count = distributed.get_rank(), distributed.get_world_size()
    begun = [file for file in (output, *shards_of(output)) if file.exists()]
    if begun and not resume:
        raise ProfileError(f"{begun[0]} exists; pass --resume to go on with it, or another -o")
    done = {run.key for file in begun for run in storage.header(file)[1]}
    planned = planned_runs(conditions, seed, keep_prompts)
    missing = [place for place, run in enumerate(planned) if run.key not in done]
    own = shard_of(output, rank + 1, count)
    _wait()  # until all have seen what is there, before any of them writes
    if missing:
        profile_pipeline(
            pipeline,
            name,
            own,
            conditions,
            seed=seed,
            keep_prompts=keep_prompts,
            resume=True,
            progress=progress and rank == 0,
            only=[missing[i] for i in part_of(len(missing), rank + 1, count)],
            elsewhere=[file for file in begun if file != own],
            **options,
        )
    _wait()
    if rank == 0:
        _join(output, planned)
    _wait()
    return output


def _join(output: Path, planned: Sequence[Run]) -> None:
    """Join the shards of a profile, and remove them."""
    shards = shards_of(output)
    files = [output, *shards] if output.exists() else shards
    runs = storage.merge(files, output)
    if absent := {run.key for run in planned} - {run.key for run in runs}:
        raise ProfileError(
            f"{output} holds {len(runs)} runs, {len(absent)} are missing: the ranks need a folder in common. Bring the "
            "shards of all machines together, and join them with `dicache profiles merge`"
        )
    for file in shards:
        storage.remove(file)
    check_runs(output)


def _wait() -> None:
    """Wait until all ranks are here."""
    try:
        distributed.monitored_barrier(timeout=LATE)
    except RuntimeError as error:
        raise ProfileError(
            f"rank {distributed.get_rank()} of {distributed.get_world_size()} waited in vain for the others: one of "
            "them has failed, see its own error. What all have finished is on disk; start again with --resume"
        ) from error
