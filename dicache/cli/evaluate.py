"""`dicache evaluate`: quality and speed of schedules."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dicache.cli.command import INTERVAL, Command, json_option, model_option, page_width, show_json, table

if TYPE_CHECKING:
    from dicache.evaluate.evaluation import Result
    from dicache.evaluate.quality import Mean

METRICS = ("psnr", "ssim", "accuracy", "frechet")
NETWORKS = ("lpips", "clip", "fid", "is")  # by networks of others, whose weights have to be there


@click.command(cls=Command, interrupted="uncached images are kept once all are made; the same command makes the others")
@model_option()
@click.option(
    "--schedule",
    "files",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Schedule to judge; repeatable.",
)
@click.option("--prompts", type=click.Path(dir_okay=False), help="A file with a prompt, or a class, a line.")
@click.option("--runs", type=click.IntRange(1), default=16, show_default=True, help="Images, without --prompts.")
@click.option("--scheduler", help="Guidance scale that the schedules were made for.  [default: the pipeline's]")
@click.option("--guidance", type=click.FloatRange(0), help="Guidance scale.  [default: the pipeline's]")
@click.option("--height", type=click.IntRange(1), help="Height in pixels.  [default: the pipeline's]")
@click.option("--width", type=click.IntRange(1), help="Width in pixels.  [default: the pipeline's]")
@click.option("--frames", type=click.IntRange(1), help="Frames of a video.  [default: the pipeline's]")
@click.option("--seed", type=int, default=1000, show_default=True, help="Seed of the first image.")
@click.option(
    "--metrics",
    help=f"Separated by commas: {','.join(METRICS)}; {','.join(NETWORKS)} by networks whose weights have to be there. "
    " [default: those of the first that the model has]",
)
@click.option("--real", type=click.Path(file_okay=False, path_type=Path), help="Folder of real images, for fid.")
@click.option("--clip-model", help="Hub id or folder of the model of clip.  [default: openai/clip-vit-large-patch14]")
@click.option(
    "--timing-rounds",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Rounds of single images to time; 0 times nothing.",
)
@click.option(
    "--references",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where uncached runs are kept.  [default: the user's cache]",
)
@click.option(
    "--images", type=click.Path(file_okay=False, path_type=Path), help="Write what was made here, a folder a schedule."
)
@click.option("--device", default=None, help="Device, such as cuda or cpu.  [default: cuda if there is one]")
@click.option("--dtype", help="float32, float16 or bfloat16.  [default: float32 on cpu, else bfloat16]")
@json_option
def evaluate(
    model: str,
    files: tuple[Path, ...],
    prompts: str | None,
    runs: int,
    scheduler: str | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    seed: int,
    metrics: str | None,
    real: Path | None,
    clip_model: str | None,
    timing_rounds: int,
    references: Path | None,
    images: Path | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Judge schedules against the uncached run of the same seeds, and against fewer steps at the same cost.

    Under torchrun the ranks share the images, and rank 0 times and tells.
    """
    from dicache.evaluate.evaluation import evaluate as judge
    from dicache.evaluate.evaluation import is_reserved
    from dicache.evaluate.networks import CLIP_MODEL, DISTANCES, SCORES, Request
    from dicache.evaluate.references import default_folder
    from dicache.models.images import save_png
    from dicache.models.judges import judges_of
    from dicache.models.launching import device_of_rank, workers
    from dicache.models.loading import load
    from dicache.models.names import ModelError
    from dicache.models.sampling import Sampling, default_conditions, read_conditions
    from dicache.schedules import Schedule, ScheduleError

    wanted = [part.strip() for part in metrics.split(",")] if metrics else list(METRICS)
    if unknown := sorted(set(wanted) - {*METRICS, *NETWORKS}):
        raise ModelError(f"unknown metric {unknown[0]!r}; known: {', '.join((*METRICS, *NETWORKS))}")
    schedules = [(file.stem, Schedule.load(file)) for file in files]
    if len({name for name, _ in schedules}) < len(schedules) or any(is_reserved(name) for name, _ in schedules):
        schedules = [(str(file), schedule) for file, (_, schedule) in zip(files, schedules, strict=True)]
    counts = {schedule.target.num_inference_steps or schedule.steps for _, schedule in schedules}
    if len(counts) > 1:
        raise ScheduleError(f"the schedules are for {sorted(counts)} steps; evaluate those of one step count together")
    given = read_conditions(prompts) if prompts else None
    with workers() as ranks:
        pipeline = load(model, device=device_of_rank(device), dtype=dtype, scheduler=scheduler)
        conditions = given or default_conditions(pipeline, runs)
        judges = {name: f for name, f in judges_of(model, pipeline, conditions).items() if name in wanted}
        request = Request(conditions, real, clip_model or CLIP_MODEL)
        judges |= {name: SCORES[name](request) for name in wanted if name in SCORES}
        distances = {name: DISTANCES[name](request) for name in wanted if name in DISTANCES}
        if metrics and (absent := [m for m in wanted if m not in ("psnr", "ssim", *judges, *distances)]):
            raise ModelError(f"{model} has no judge for {', '.join(absent)}; the bundled models have")
        uncached, results, fewer = judge(
            pipeline,
            schedules,
            conditions,
            sampling=Sampling(counts.pop(), guidance, height, width, frames).usual_for(model),
            seed=seed,
            judges=judges,
            distances=distances,
            timing_rounds=timing_rounds,
            references=references or default_folder(),
            workers=ranks,
        )
    if ranks.rank > 0:
        return
    if images:
        for result in (uncached, *results, *fewer):
            folder = images / re.sub(r"[^\w.-]+", "-", result.name).strip("-")
            for number, image in enumerate(result.images):
                save_png(image, folder / f"{number:04}.png")
    if as_json:
        show_json(
            {
                "model": model,
                "prompts": conditions,
                "results": [result.to_json() for result in results],
                "fewer_steps": [result.to_json() for result in fewer],
                "uncached": uncached.to_json(),
            }
        )
        return
    click.echo(results_table([uncached, *results, *fewer], page_width()))
    for (_, schedule), result in zip(schedules, results, strict=True):
        if schedule.policy is not None and (foreseen := schedule.measured.get("computed_steps")) is not None:
            each = result.computed_each or (result.computed_steps,)
            click.echo(
                f"{result.name}: {foreseen:g} steps foreseen on its profile's runs, {result.computed_steps:.1f} "
                f"computed here, {min(each):g} to {max(each):g} an image"
            )


def results_table(results: "Sequence[Result]", width: int | None = None) -> str:
    """Return results as text, one a line; intervals are the 95 % bootstrap ones over prompts.

    The gain is the PSNR minus that of fewer steps at the same cost, image by image. The width is as `table` takes it.
    """
    judged, distances = list(results[0].judged), list(results[0].distances)
    gains = any(result.psnr_gain is not None for result in results)
    header = ["", "steps", "computed", "MACs", "speed-up", "PSNR dB", INTERVAL, *(["gain", INTERVAL] * gains)]
    header += ["SSIM", *distances, *judged]
    rows = []
    for result in results:
        same = result.name == "uncached"
        rows.append(
            [
                result.name,
                str(result.steps),
                f"{result.computed_steps:.1f}",
                f"{result.macs_fraction:.3f}",
                "-" if result.speedup is None else f"{result.speedup:.2f}",
                "-" if same else f"{result.psnr.mean:.1f}",
                "-" if same else f"{result.psnr.low:.1f} to {result.psnr.high:.1f}",
                *(_gain(result.psnr_gain) if gains else ()),
                "-" if same else f"{result.ssim.mean:.4f}",
                *("-" if same else f"{result.distances[name].mean:.4f}" for name in distances),
                *(f"{result.judged[name]:.3f}" for name in judged),
            ]
        )
    return table(header, rows, width)


def _gain(gain: "Mean | None") -> tuple[str, str]:
    return ("-", "-") if gain is None else (f"{gain.mean:+.1f}", f"{gain.low:+.1f} to {gain.high:+.1f}")
