"""`dicache calibrate deepcache`: what a U-Net's inside has made is held at most steps."""

from pathlib import Path
from typing import Any

import click

from dicache.cli.calibrating import output_option, plan_and_write, search_with_target_options, subject_options
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
@search_with_target_options
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
    **searching: Any,
) -> None:
    """Run only the outermost part of a U-Net at most steps, and hold what the rest has made (arXiv 2312.00858)."""
    from dicache.calibrate.deepcache import DeepCache, DeepCacheSpace

    settings = DeepCache(interval, branch, center, power)
    plan_and_write(settings, DeepCacheSpace, searching, profile_file, model, steps, output, as_json)
