"""`dicache profile`."""

import re
from pathlib import Path
from typing import Any

import click

from dicache.cli.command import Bytes, Command, Kind, Numbers, json_option, model_option, show_json
from dicache.cli.profiles import FOLDER


class Part(Kind[tuple[int, int]]):
    """One of so many parts: `3/8`."""

    name = "part"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(value), re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no part of a whole; write 1/8 to 8/8", param, ctx)
        return int(match[1]), int(match[2])


@click.command(cls=Command, interrupted="finished runs are kept; the same command with --resume goes on with them")
@model_option()
@click.option("--prompts", type=click.Path(dir_okay=False), help="A file with a prompt, or a class, a line.")
@click.option("--runs", type=click.IntRange(1), default=16, show_default=True, help="How many runs, without --prompts.")
@click.option("--steps", type=click.IntRange(2), help="Inference steps.  [default: the pipeline's]")
@click.option("--scheduler", help="Class name of another scheduler, such as DPMSolverMultistepScheduler.")
@click.option("--guidance", type=click.FloatRange(0), help="Guidance scale.  [default: the pipeline's]")
@click.option("--height", type=click.IntRange(1), help="Height in pixels.  [default: the pipeline's]")
@click.option("--width", type=click.IntRange(1), help="Width in pixels.  [default: the pipeline's]")
@click.option("--frames", type=click.IntRange(1), help="Frames of a video.  [default: the pipeline's]")
@click.option("--component", help="Where two models share the steps, as in Wan 2.2: transformer or transformer_2.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first run; the next ones count up.")
@click.option("--device", default=None, help="Device, such as cuda or cpu.  [default: cuda if there is one]")
@click.option("--dtype", help="float32, float16 or bfloat16.  [default: float32 on cpu, else bfloat16]")
@click.option("--lags", type=click.IntRange(1), default=3, show_default=True, help="Steps back to compare with.")
@click.option("--priors", is_flag=True, help="Keep the mean output of each branch at each step, for EOC.")
@click.option("--priors-for", type=click.Path(dir_okay=False), help="Keep them only where this schedule reuses.")
@click.option(
    "--decision-blocks",
    type=Numbers(least=0),
    help="Blocks that AdaCache may decide by, such as 13,20.  [default: the middle one]",
)
@click.option(
    "--first-blocks",
    type=Numbers(),
    help="How many of the first blocks to watch for FirstBlockCache, such as 1,8.  [default: 1, where it can be]",
)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Runs that are made in one call of the model."
)
@click.option("--max-memory", type=Bytes(), help="Refuse to start if more is needed, such as 8GB.")
@click.option("--no-prompts", is_flag=True, help="Write down a hash of each prompt, not the prompt.")
@click.option("--resume", is_flag=True, help="Resume a profile that was interrupted.")
@click.option(
    "--shard", type=Part(), help="Make one part of the runs, such as 1/8; `dicache profiles merge` joins them."
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The profile to write (HDF5).")
@json_option
def profile(
    model: str,
    prompts: str | None,
    runs: int,
    steps: int | None,
    scheduler: str | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    component: str | None,
    seed: int,
    device: str | None,
    dtype: str | None,
    lags: int,
    priors: bool,
    priors_for: str | None,
    decision_blocks: tuple[int, ...] | None,
    first_blocks: tuple[int, ...] | None,
    batch: int,
    max_memory: int | None,
    no_prompts: bool,
    resume: bool,
    shard: tuple[int, int] | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure a model over many runs and write a profile.

    It is written to ./profiles, where the other commands look for the newest one. Under torchrun the ranks share the
    runs, and rank 0 writes the profile.
    """
    from dicache.models.launching import device_of_rank, is_launched, part_of, workers
    from dicache.models.loading import load
    from dicache.models.names import find
    from dicache.models.sampling import Sampling, default_conditions, read_conditions
    from dicache.profiler.profiling import profile_pipeline
    from dicache.profiler.shards import profile_together, shard_of
    from dicache.schedules import Schedule

    if priors and priors_for:
        raise click.UsageError("--priors keeps all that --priors-for would; give one of them")
    if shard and is_launched():
        raise click.UsageError(
            "--shard is for processes that know nothing of one another; torchrun's ranks share anyway"
        )
    source = find(model)
    conditions = read_conditions(prompts) if prompts else None
    with workers() as ranks:
        pipeline = load(model, device=device_of_rank(device), dtype=dtype, scheduler=scheduler)
        sampling = Sampling(steps, guidance, height, width, frames).usual_for(model).resolved(pipeline)
        conditions = conditions or default_conditions(pipeline, runs)
        if output is None:
            sampler = type(pipeline.scheduler).__name__.removesuffix("Scheduler").lower()
            model_part = f"-{component}" if component else ""
            output = FOLDER / f"{source.name}{model_part}-{sampler}-{sampling.steps}.h5"
        options: dict[str, Any] = {
            "sampling": sampling,
            "seed": seed,
            "lags": lags,
            "component": component,
            "priors": Schedule.load(priors_for) if priors_for else priors,
            "decision_blocks": decision_blocks,
            "first_blocks": first_blocks,
            "batch": batch,
            "max_memory": max_memory,
            "keep_prompts": not no_prompts,
            "resume": resume,
        }
        whole = output
        if is_launched():
            profile_together(pipeline, model, whole, conditions, **options)
        elif shard:
            output, only = shard_of(whole, *shard), part_of(len(conditions), *shard)
            profile_pipeline(pipeline, model, output, conditions, only=only, **options)
        else:
            profile_pipeline(pipeline, model, output, conditions, **options)
    if ranks.rank > 0:
        return
    if as_json:
        show_json({"profile": str(output)})
    elif shard:
        click.echo(
            f"Wrote {output}. When all parts are there: dicache profiles merge {whole}.*-of-{shard[1]} -o {whole}"
        )
    else:
        given = "" if output.parent == FOLDER else f" --profile {output}"
        click.echo(f"Wrote {output}. Next: dicache calibrate teacache --target-speedup 1.8{given}")
