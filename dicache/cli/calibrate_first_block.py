"""`dicache calibrate first-block`: skip what lies behind the first blocks, decided at run time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from dicache.cli.calibrating import (
    output_option,
    planned_subject,
    share_of,
    subject_options,
    target_options,
    write_schedule,
)
from dicache.cli.command import Command, json_option
from dicache.cli.profiles import newest


@click.command("first-block", cls=Command)
@click.option("--threshold", type=float, help="Of the relative change of what the first blocks add, such as 0.1.")
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
) -> None:
    """Skip all behind the first blocks while these add what they did at the last computed step (FirstBlockCache).

    With --first above 1 or with --last it is cache-dit's DBCache, whose defaults are --first 8 --warm-up 8 --threshold
    0.08. With --target-speedup or --max-macs it finds the threshold on the profile, which has to have watched these
    first blocks (`dicache profile --first-blocks 1,8`). With --model instead of a profile it takes a --threshold, and
    does not know what to expect.
    """
    from dicache.calibrate.first_block import FirstBlock
    from dicache.profiler.storage import load

    share = share_of(target_speedup, max_macs)
    if (threshold is None) == (share is None):
        raise click.UsageError("give one of --threshold, --target-speedup and --max-macs")
    speedup = None if share is None else target_speedup or 1 / share
    settings = FirstBlock(
        threshold, speedup, first, last, max_continuous, max_cached, warm_up, last_steps, at_threshold
    )
    if model is not None and share is not None:
        raise click.UsageError("--target-speedup and --max-macs take a profile; with --model give --threshold")
    if model is None and steps is not None:
        raise click.UsageError("--steps goes with --model; a profile has its own")
    if model is not None:
        subject = planned_subject(profile_file, model, steps)
        name, schedule = subject.model, settings.schedule(subject.anatomy, subject.target, subject.steps)
    else:
        profile = load(profile_file or newest())
        name, schedule = profile.provenance.model, settings.calibrate(profile)
    write_schedule(schedule, _told(schedule.measured), name, output, as_json)


def _told(measured: Mapping[str, Any]) -> str:
    """Return what was found on a profile, if there was one."""
    if not measured:
        return ""
    told = f"threshold {measured['threshold']:.4g}, {measured['computed_steps']:g} steps computed on average"
    if not measured["beyond_lags"]:
        return told
    return (
        f"{told}\nWarning: {measured['beyond_lags']:g} of them on average because the last computed step is more than "
        f"{measured['lags']} steps back, which the profile does not foretell; at run time they may be skipped. "
        f"--max-continuous {measured['lags']} computes them"
    )
