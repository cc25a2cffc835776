"""`dicache generate`: make images, with or without a schedule."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import click

from dicache.cli.command import Command, json_option, model_option, show_json

LONGEST = 40  # characters of a prompt in a file's name


@click.command(cls=Command, interrupted="what was written stays; the same command makes all images again")
@model_option()
@click.option("--schedule", "schedule_file", type=click.Path(path_type=Path), help="Replay this schedule.")
@click.option("--prompt", "prompts", multiple=True, help="A text; may be given several times.")
@click.option("--class", "classes", multiple=True, help="A class by number or name; may be given several times.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first image; the next ones count up.")
@click.option(
    "--num-images", type=click.IntRange(1), default=1, show_default=True, help="Images of each prompt or class."
)
@click.option("--steps", type=click.IntRange(1), help="Inference steps.  [default: the schedule's or the pipeline's]")
@click.option("--scheduler", help="Another scheduler, by class or short name, such as dpm or ddim.")
@click.option("--guidance", type=click.FloatRange(0), help="Guidance scale.  [default: the pipeline's]")
@click.option("--height", type=click.IntRange(1), help="Height in pixels.  [default: the pipeline's]")
@click.option("--width", type=click.IntRange(1), help="Width in pixels.  [default: the pipeline's]")
@click.option("--frames", type=click.IntRange(1), help="Frames of a video.  [default: the pipeline's]")
@click.option("--device", default=None, help="Device, such as cuda or cpu.  [default: cuda if there is one]")
@click.option("--dtype", help="float32, float16 or bfloat16.  [default: float32 on cpu, else the model's]")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder.")
@json_option
def generate(
    model: str,
    schedule_file: Path | None,
    prompts: tuple[str, ...],
    classes: tuple[str, ...],
    seed: int,
    num_images: int,
    steps: int | None,
    scheduler: str | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    device: str | None,
    dtype: str | None,
    output: Path,
    as_json: bool,
) -> None:
    """Make images and write them as PNG."""
    from contextlib import nullcontext

    from dicache.models.images import save_png
    from dicache.models.loading import load
    from dicache.models.names import ModelError
    from dicache.models.sampling import Sampling, sample, takes_classes
    from dicache.runtime import apply
    from dicache.schedules import Schedule

    if bool(prompts) == bool(classes):
        raise click.UsageError("give either --prompt or --class")
    schedule = Schedule.load(schedule_file) if schedule_file else None
    pipeline = load(model, device=device, dtype=dtype, scheduler=scheduler)
    if takes_classes(pipeline) != bool(classes):
        wanted = "--class" if takes_classes(pipeline) else "--prompt"
        raise ModelError(f"{model} is conditioned on a {wanted[2:]}; give {wanted}")
    if steps is None and schedule is not None:
        steps = schedule.target.num_inference_steps
    sampling = Sampling(steps, guidance, height, width, frames).usual_for(model)
    files: list[str] = []
    names = _file_names(prompts or classes)
    with apply(pipeline, schedule) if schedule else nullcontext() as cache:
        for condition in prompts or classes:
            for number in range(seed, seed + num_images):
                image = sample(pipeline, [condition], [number], sampling)[0]
                files.append(str(save_png(image, output / f"{names[condition]}-{number}.png")))
    fraction = cache.stats.macs_fraction if cache else 1.0
    if as_json:
        show_json({"images": files, "macs_fraction": fraction})
        return
    count = "1 picture" if len(files) == 1 else f"{len(files)} pictures"
    click.echo(f"Wrote {count} to {output}, with {fraction:.3f} of the MACs")


def _file_names(conditions: Sequence[str]) -> dict[str, str]:
    """Return what the files of each prompt or class begin with: its words, and a mark where these do not tell it."""
    words = {condition: re.sub(r"\W+", "-", condition.lower()).strip("-") for condition in conditions}
    names = {}
    for condition, whole in words.items():
        names[condition] = whole[:LONGEST].strip("-") or "image"
        if names[condition] != whole or list(words.values()).count(whole) > 1:
            names[condition] += f"-{hashlib.sha256(condition.encode()).hexdigest()[:6]}"
    return names
