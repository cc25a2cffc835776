"""`dicache calibrate METHOD`: turn a profile into a schedule."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from dicache.cli.calibrating import (
    output_option,
    planned_subject,
    profile_option,
    share_of,
    subject_of,
    subject_of_profile,
    subject_options,
    target_options,
    write_schedule,
)
from dicache.cli.command import Group, json_option
from dicache.cli.profiles import newest
from dicache.cli.searching import Searching, given_options, search_for, search_options


@click.group(cls=Group)
def calibrate() -> None:
    """Decide from a profile what need not be computed, and write that as a schedule."""


@calibrate.command()
@click.option("--interval", type=int, help="Steps from one computation to the next; 2 or 3 is usual.")
@target_options
@click.option("--anchor", type=click.Choice(["end", "start"]), default="end", show_default=True, help="Counted from.")
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
    """Recompute every branch each few steps (arXiv 2407.01425).

    With --target-speedup or --max-macs it takes the smallest interval that saves so many MACs. With --search it tries
    intervals, anchors and branches on real runs; what is given on the command line is kept.
    """
    from dicache.calibrate import CalibrationError
    from dicache.calibrate.fora import USUAL_INTERVAL, Fora, ForaSpace
    from dicache.calibrate.methods import planned_schedule

    search, share = Searching(**searching), share_of(target_speedup, max_macs)
    kinds = tuple(part.strip() for part in branches.split(",")) if branches else ()
    if search.wanted:
        goal = search.goal(share)
        subject = subject_of(profile_file, model, steps, search.device)
        settings = Fora(interval or USUAL_INTERVAL, anchor, kinds, first, last)
        space = ForaSpace(subject.anatomy, subject.target, subject.steps, settings, given_options())
        output = output or Path("fora.json")
        return write_schedule(*search_for(subject, space, goal, search, output), subject.model, output, as_json)
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


@calibrate.command()
@click.option("--threshold", type=float, help="Of the accumulated relative change, such as 0.1.")
@target_options
@click.option("--degree", type=int, default=4, show_default=True, help="Of the polynomial.")
@click.option(
    "--fit-to",
    type=click.Choice(["output", "body", "residual"]),
    default="output",
    show_default=True,
    help="What is foretold.",
)
@click.option(
    "--foretell",
    type=click.Choice(["input", "steps"]),
    default="input",
    show_default=True,
    help="From the modulated input at run time, or by the median of each step, which gives a fixed plan.",
)
@click.option(
    "--negative",
    type=click.Choice(["clamp", "abs", "reference"]),
    default="clamp",
    show_default=True,
    help="Where the polynomial is negative: nothing is added, its magnitude is, or it is subtracted as published.",
)
@profile_option
@search_options
@output_option
@json_option
def teacache(
    threshold: float | None,
    target_speedup: float | None,
    max_macs: float | None,
    degree: int,
    fit_to: Any,
    foretell: Any,
    negative: Any,
    profile_file: Path | None,
    output: Path | None,
    as_json: bool,
    **searching: Any,
) -> None:
    """Skip the body until its foretold change adds up to a threshold (arXiv 2411.19108).

    Without --threshold, --target-speedup and --max-macs, it aims at 1.8 times fewer MACs. With --search it tries
    thresholds and fits (--foretell, --fit-to, --degree) on real runs; what is given on the command line is kept.
    """
    from dicache.calibrate.teacache import USUAL_SPEEDUP, TeaCache, TeaCacheSpace
    from dicache.profiler.storage import load

    search, share = Searching(**searching), share_of(target_speedup, max_macs)
    if search.wanted and threshold is not None:
        raise click.UsageError("--search finds the threshold; leave --threshold out")
    speedup = target_speedup if share is None or target_speedup is not None else 1 / share
    if threshold is None and speedup is None:
        speedup = USUAL_SPEEDUP
        share = None if search.wanted and search.min_psnr is not None else 1 / speedup
    settings = TeaCache(threshold, speedup, degree, fit_to, foretell, negative)
    file = profile_file or newest()
    profile = load(file)
    model = profile.provenance.model
    if not search.wanted:
        return write_schedule(settings.calibrate(profile), "", model, output, as_json)
    goal = search.goal(share)
    space = TeaCacheSpace(profile, settings, given_options(), goal.max_macs)
    subject = subject_of_profile(profile.provenance, profile.runs)
    output = output or Path("teacache.json")
    return write_schedule(*search_for(subject, space, goal, search, output), model, output, as_json)
