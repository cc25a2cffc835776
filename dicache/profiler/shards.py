"""One profile made by many processes: each writes its runs to a shard of its own, and the shards are joined.

Under a launcher such as torchrun, which tells each process its rank, the ranks of all machines need a folder in common
for the files.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import distributed

from dicache.anatomy.spread import groups_of
from dicache.models.launching import Workers
from dicache.profiler import storage
from dicache.profiler.describing import planned_runs
from dicache.profiler.profiles import ProfileError, Run
from dicache.profiler.profiling import check_runs, profile_pipeline
from dicache.runtime.apply import denoiser

AGAIN = "What all have finished is on disk; start again with --resume"


def shard_of(output: Path, part: int, count: int) -> Path:
    """Return where part 1 to `count` of a profile is written: beside it, as `p.h5.1-of-4`."""
    return output.with_name(f"{output.name}.{part}-of-{count}")


def shards_of(output: Path) -> list[Path]:
    """Return the shards that lie beside a profile, whatever its number of parts was."""
    form = re.compile(re.escape(output.name) + r"\.\d+-of-\d+")
    return sorted(file for file in output.parent.glob("*-of-*") if form.fullmatch(file.name))


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
        ProfileError: As `profile_pipeline` does.
        RanksError: If another rank has died. What all have finished is on disk.
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
    ranks = Workers(distributed.get_rank(), distributed.get_world_size(), AGAIN)
    if resume and ranks.rank == 0:
        _remove_joined(output)
    ranks.wait()
    begun = [file for file in (output, *shards_of(output)) if file.exists()]
    if begun and not resume:
        raise ProfileError(f"{begun[0]} exists; pass --resume to go on with it, or another -o")
    done = {run.key for file in begun for run in storage.header(file)[1]}
    planned = planned_runs(conditions, seed, keep_prompts)
    missing = [place for place, run in enumerate(planned) if run.key not in done]
    own = shard_of(output, ranks.rank + 1, ranks.count)
    ranks.wait()  # until all have seen what is there, before any of them writes
    if missing:
        profile_pipeline(
            pipeline,
            name,
            own,
            conditions,
            seed=seed,
            keep_prompts=keep_prompts,
            resume=True,
            progress=progress and ranks.rank == 0,
            only=[missing[i] for i in ranks.share(len(missing))],
            elsewhere=[file for file in begun if file != own],
            **options,
        )
    ranks.wait()
    if ranks.rank == 0:
        _join(output, planned)
    ranks.wait()
    return output


def _remove_joined(output: Path) -> None:
    """Remove the shards of which all is in the profile, as where ranks were killed between joining and removing."""
    with suppress(ProfileError):  # a broken one stays, and is told by all ranks
        joined = {run.key for run in storage.header(output)[1]} if output.exists() else set()
        for file in shards_of(output):
            if joined.issuperset(run.key for run in storage.header(file)[1]):
                storage.remove(file)


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
