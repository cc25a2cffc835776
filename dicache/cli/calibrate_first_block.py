"""`dicache calibrate first-block`: skip what lies behind the first blocks, decided at run time."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicache.cli.calibrating import (
    output_option,
    plan_space,
    planned_subject,
    profile_and_write,
    search_and_write,
    share_of,
    subject_options,
    target_options,
    write_schedule,
)
from dicache.cli.command import Command, json_option
from dicache.cli.searching import Searching, search_options

if TYPE_CHECKING:
    from dicache.schedules import Schedule


@click.command("first-block", cls=Command)
@click.option("--threshold", type=float, help="Limit of the relative change of what the first blocks add, such as 0.1.")
@target_options
@click.option("--first", type=int, default=1, show_default=True, help="Blocks at the start that always run (Fn).")
@click.option("--last", type=int, default=0, show_default=True, help="Blocks at the end that always run (Bn).")
@click.option("--max-continuous", type=int, help="Most steps skipped in a row.  [default: no limit]")
@click.option("--max-cached", type=int, help="Most steps skipped in a generation.  [default: no limit]")
@click.option("--warm-up", type=int, default=1, show_default=True, help="Steps at the start that are computed.")
@click.option("--last-steps", type=int, default=0, show_default=True, help="Steps at the end that are computed.")
@click.option(
    "--at-threshold",
    type=click.Choice(["compute", "reuse"]),
    default="compute",
    show_default=True,
    help="What a change equal to the threshold does: compute as in ParaAttention and cache-dit, reuse as in diffusers.",
)
@subject_options
@search_options
@output_option
@json_option
def first_block(
    threshold: float | None,
    target_speedup: float | None,
    max_macs: float | None,
    first: int,
    last: int,
    max_continuous: int | None,
    max_cached: int | None,
    warm_up: int,
    last_steps: int,
    at_threshold: Any,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
    **searching: Any,
) -> None:
    """Skip all behind the first blocks while these add what they did at the last computed step (FirstBlockCache).

    With --first above 1 or with --last it is cache-dit's DBCache, whose defaults are --first 8 --warm-up 8 --threshold
    0.08. With --target-speedup or --max-macs it finds the threshold on the profile, which has to have watched these
    first blocks (`dicache profile --first-blocks 1,8`). With --model instead of a profile it takes a --threshold, and
    does not know what to expect.
    """
    from dicache.calibrate.first_block import (
        USUAL_SPEEDUP,
        USUAL_THRESHOLD,
        FirstBlock,
        FirstBlockPlainSpace,
        FirstBlockSpace,
    )

    share, search = share_of(target_speedup, max_macs), Searching(**searching)
    if search.wanted and threshold is not None:
        raise click.UsageError("--search finds the threshold; leave --threshold out")
    if (threshold is None) == (share is None) and not search.wanted:
        raise click.UsageError("give one of --threshold, --target-speedup and --max-macs")
    if search.wanted and model is not None:
        settings = FirstBlock(USUAL_THRESHOLD, None, first, last, max_continuous, max_cached, warm_up, last_steps)
        settings = replace(settings, at_threshold=at_threshold)
        space = plan_space(FirstBlockPlainSpace, settings)
        return search_and_write(search, "first-block", space, profile_file, model, steps, output, as_json, share)
    speedup = USUAL_SPEEDUP if search.wanted else None if share is None else target_speedup or 1 / share
    settings = FirstBlock(
        threshold, speedup, first, last, max_continuous, max_cached, warm_up, last_steps, at_threshold
    )
    if model is not None and share is not None:
        raise click.UsageError("--target-speedup and --max-macs take a profile; with --model give --threshold")
    if model is None and steps is not None:
        raise click.UsageError("--steps goes with --model; a profile has its own")
    if model is not None:
        subject = planned_subject(profile_file, model, steps)
        schedule = settings.schedule(subject.anatomy, subject.target, subject.steps)
        return write_schedule(schedule, "", subject.model, output, as_json)
    return profile_and_write(settings, FirstBlockSpace, searching, profile_file, output, as_json, _told, share)


def _told(schedule: "Schedule") -> str:
    """Return what was found on a profile."""
    measured = schedule.measured
    told = f"threshold {measured['threshold']:.4g}, {measured['computed_steps']:g} steps computed on average"
    if not measured["beyond_lags"]:
        return told
    return (
        f"{told}\nWarning: {measured['beyond_lags']:g} of them on average because the last computed step is more than "
        f"{measured['lags']} steps back, which the profile does not foretell; at run time they may be skipped. "
        f"--max-continuous {measured['lags']} computes them"
    )
