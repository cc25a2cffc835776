"""`dicache calibrate deepcache`: what a U-Net's inside has made is held at most steps."""

from pathlib import Path

import click

from dicache.cli.calibrating import output_option, planned_subject, subject_options, write_schedule
from dicache.cli.command import Command, json_option


@click.command(cls=Command)
@click.option("--interval", type=int, default=3, show_default=True, help="Steps from one full computation to the next.")
@click.option(
    "--branch",
    type=int,
    default=0,
    show_default=True,
    help="The last skip connection that is computed in between; 0 is the outermost and saves most.",
)
@click.option("--center", type=int, help="Uneven intervals: the step around which the full ones are close together.")
@click.option("--power", type=float, help="With --center: how uneven, above 1.  [default: 1.2]")
@subject_options
@output_option
@json_option
def deepcache(
    interval: int,
    branch: int,
    center: int | None,
    power: float | None,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Run only the outermost part of a U-Net at most steps, and hold what the rest has made (arXiv 2312.00858)."""
    from dicache.calibrate.deepcache import DeepCache
    from dicache.calibrate.methods import planned_schedule

    settings = DeepCache(interval, branch, center, power)
    subject = planned_subject(profile_file, model, steps)
    schedule = planned_schedule(settings, subject.anatomy, subject.target, subject.steps)
    write_schedule(schedule, "", subject.model, output, as_json)
