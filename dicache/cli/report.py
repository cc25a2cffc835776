"""`dicache report`: a profile and schedules on one page."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dicache.cli.calibrating import subject_of_profile
from dicache.cli.command import Command, json_option, show_json
from dicache.cli.searching import fresh_seeds

if TYPE_CHECKING:
    from dicache.figures.report.achieved import Ran
    from dicache.profiler import Profile
    from dicache.schedules import Schedule


@click.command(cls=Command)
@click.argument("profile_file", metavar="PROFILE", type=click.Path(path_type=Path))
@click.argument("files", metavar="[SCHEDULE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", default="report.html", show_default=True, type=click.Path(dir_okay=False, path_type=Path)
)
@click.option(
    "--evaluated",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A file of `dicache evaluate --json`, or a schedule that a search found; repeatable.",
)
@click.option(
    "--images", type=click.IntRange(0), default=4, show_default=True, help="Images to make with each schedule."
)
@click.option("--prompts", type=click.Path(dir_okay=False), help="A file with a prompt, or a class, a line.")
@click.option("--seed", type=int, default=1000, show_default=True, help="Seed of the first image.")
@click.option("--model", help="Where the model is, if not where the profile says.")
@click.option("--device", default=None, help="Device, such as cuda or cpu.  [default: cuda if there is one]")
@json_option
def report(
    profile_file: Path,
    files: tuple[Path, ...],
    output: Path,
    evaluated: tuple[Path, ...],
    images: int,
    prompts: str | None,
    seed: int,
    model: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Write what a profile measured, and what schedules make of it, as one HTML file.

    It needs nothing but a browser: no network, no other file. With schedules the model of the profile is run, to show
    images beside the uncached ones and what was achieved beside what was planned; --images 0 leaves that out.
    """
    from dicache.figures.pareto import read_series
    from dicache.figures.report import check, save
    from dicache.figures.report import report as page_of
    from dicache.profiler.needing import byte_size
    from dicache.profiler.storage import load
    from dicache.schedules import Schedule

    profile = load(profile_file)
    schedules = [(file.stem, Schedule.load(file)) for file in files]
    if len({name for name, _ in schedules}) < len(schedules):
        schedules = [(str(file), schedule) for file, (_, schedule) in zip(files, schedules, strict=True)]
    measured = read_series(evaluated) if evaluated else None
    check(profile, schedules)
    ran = _run(profile, schedules, images, prompts, seed, model, device) if schedules and images else None
    page = page_of(profile, schedules, file=str(profile_file), measured=measured, ran=ran)
    save(page, output)
    size = output.stat().st_size
    if as_json:
        show_json({"report": str(output), "bytes": size, "schedules": [name for name, _ in schedules]})
        return
    click.echo(f"Wrote {output}, {byte_size(size)}")


def _run(
    profile: "Profile",
    schedules: "list[tuple[str, Schedule]]",
    count: int,
    prompts: str | None,
    seed: int,
    model: str | None,
    device: str | None,
) -> "Ran":
    """Run the profile's model on seeds that the profile does not have."""
    from dicache.figures.report.achieved import run
    from dicache.models.loading import load
    from dicache.models.names import ModelError
    from dicache.models.sampling import default_conditions, read_conditions

    subject = subject_of_profile(profile.provenance, profile.runs)
    name, target = model or subject.model, subject.target
    try:
        pipeline = load(name, device=device, dtype=target.dtype, scheduler=target.scheduler)
    except ModelError as error:
        raise ModelError(
            f"the images are made by running the model of the profile, and it cannot be loaded: {error}. Say where it "
            "is with --model, or leave the images out with --images 0"
        ) from None
    conditions = read_conditions(prompts)[:count] if prompts else default_conditions(pipeline, count)
    seeds = fresh_seeds(subject, seed, len(conditions))
    return run(pipeline, schedules, conditions, seeds, subject.sampling.usual_for(name))
