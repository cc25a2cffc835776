"""`dicache calibrate METHOD`: turn a profile into a schedule."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from dicache.cli.calibrating import (
    output_option,
    plan_space,
    planned_subject,
    search_and_write,
    share_of,
    subject_options,
    target_options,
    write_schedule,
)
from dicache.cli.command import Group, json_option
from dicache.cli.searching import Searching, search_options


@click.group(cls=Group)
def calibrate() -> None:
    """Decide from a profile what need not be computed, and write that as a schedule."""


@calibrate.command()
@click.option("--interval", type=int, help="Steps from one computation to the next; 2 or 3 is usual.")
@target_options
@click.option(
    "--anchor",
    type=click.Choice(["end", "start"]),
    default="end",
    show_default=True,
    help="Step from which the interval is counted.",
)
@click.option("--branches", help="Kinds of branch to reuse, separated by commas: attn,mlp.  [default: all]")
@click.option("--from", "first", type=click.IntRange(0), default=0, show_default=True, help="First step to reuse.")
@click.option("--to", "last", type=click.IntRange(0), help="Last step to reuse.  [default: the last]")
@subject_options
@search_options
@output_option
@json_option
def fora(
    interval: int | None,
    target_speedup: float | None,
    max_macs: float | None,
    anchor: Any,
    branches: str | None,
    first: int,
    last: int | None,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
    **searching: Any,
) -> None:
    """Recompute every branch every few steps (arXiv 2407.01425).

    With --target-speedup or --max-macs it takes the smallest interval that saves so many MACs. With --search it tries
    intervals, anchors and branches on real runs; what is given on the command line is kept.
    """
    from dicache.calibrate import CalibrationError
    from dicache.calibrate.fora import USUAL_INTERVAL, Fora, ForaSpace
    from dicache.calibrate.methods import planned_schedule

    search, share = Searching(**searching), share_of(target_speedup, max_macs)
    kinds = tuple(part.strip() for part in branches.split(",")) if branches else ()
    if search.wanted:
        settings = Fora(interval or USUAL_INTERVAL, anchor, kinds, first, last)
        space = plan_space(ForaSpace, settings)
        return search_and_write(search, "fora", space, profile_file, model, steps, output, as_json, share)
    if (interval is None) == (share is None):
        raise click.UsageError("give one of --interval, --target-speedup and --max-macs")
    settings = Fora(1 if interval is None else interval, anchor, kinds, first, last)
    subject = planned_subject(profile_file, model, steps)
    for tried in range(1, subject.steps) if interval is None else (interval,):
        settings = replace(settings, interval=tried)
        schedule = planned_schedule(settings, subject.anatomy, subject.target, subject.steps)
        if share is None or schedule.macs_fraction() <= share:
            return write_schedule(schedule, "", subject.model, output, as_json)
    assert share is not None
    raise CalibrationError(
        f"fora: a speed-up of {1 / share:g} cannot be reached in {subject.steps} steps; with an interval of "
        f"{settings.interval} it is {1 / schedule.macs_fraction():.3g}"
    )
