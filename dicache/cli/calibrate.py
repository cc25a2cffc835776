"""`dicache calibrate METHOD`: turn a profile into a schedule."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dicache.cli.command import Group, json_option, show_json
from dicache.cli.profiles import newest

if TYPE_CHECKING:
    from dicache.anatomy import Anatomy
    from dicache.schedules import Schedule, Target

POOR_FIT = 0.7  # held-out R2 below which a TeaCache polynomial is warned of
F = TypeVar("F", bound=Callable[..., Any])


@click.group(cls=Group)
def calibrate() -> None:
    """Decide from a profile what need not be computed, and write that as a schedule."""


def profile_option(function: F) -> F:
    text = "The profile.  [default: the newest in ./profiles]"
    return click.option("--profile", "profile_file", type=click.Path(path_type=Path), help=text)(function)


def output_option(function: F) -> F:
    text = "The schedule to write.  [default: METHOD.json]"
    return click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help=text)(function)


@calibrate.command()
@click.option("--interval", type=int, help="Steps from one computation to the next; 2 or 3 is usual.")
@click.option("--target-speedup", type=float, help="Take the smallest interval that saves so many MACs.")
@click.option("--anchor", type=click.Choice(["end", "start"]), default="end", show_default=True, help="Counted from.")
@click.option("--branches", help="Kinds of branch to reuse, separated by commas: attn,mlp.  [default: all]")
@click.option("--from", "first", type=click.IntRange(0), default=0, show_default=True, help="First step to reuse.")
@click.option("--to", "last", type=click.IntRange(0), help="Last step to reuse.  [default: the last]")
@profile_option
@click.option("--model", help="Instead of a profile: FORA needs no measurement.")
@click.option("--steps", type=click.IntRange(1), help="With --model: inference steps.")
@output_option
@json_option
def fora(
    interval: int | None,
    target_speedup: float | None,
    anchor: Any,
    branches: str | None,
    first: int,
    last: int | None,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Recompute every branch each few steps (arXiv 2407.01425)."""
    from dicache.calibrate import CalibrationError
    from dicache.calibrate.fora import Fora
    from dicache.calibrate.methods import planned_schedule

    if (interval is None) == (target_speedup is None):
        raise click.UsageError("give either --interval or --target-speedup")
    kinds = tuple(part.strip() for part in branches.split(",")) if branches else ()
    settings = Fora(1 if interval is None else interval, anchor, kinds, first, last)
    name, anatomy, target, count = _subject(profile_file, model, steps)
    if target_speedup is None:
        return _write(planned_schedule(settings, anatomy, target, count), name, output, as_json)
    for tried in range(1, count):
        schedule = planned_schedule(replace(settings, interval=tried), anatomy, target, count)
        if 1 / schedule.macs_fraction() >= target_speedup:
            return _write(schedule, name, output, as_json)
    raise CalibrationError(f"fora: a speed-up of {target_speedup:g} cannot be reached in {count} steps")


@calibrate.command()
@click.option("--threshold", type=float, help="Of the accumulated relative change, such as 0.1.")
@click.option("--target-speedup", type=float, help="Find the threshold that saves so many MACs, such as 1.8.")
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
@profile_option
@output_option
@json_option
def teacache(
    threshold: float | None,
    target_speedup: float | None,
    degree: int,
    fit_to: Any,
    foretell: Any,
    profile_file: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Skip the body until its foretold change adds up to a threshold (arXiv 2411.19108).

    Without --threshold and --target-speedup, it aims at 1.8 times fewer MACs.
    """
    from dicache.calibrate.teacache import TeaCache
    from dicache.profiler.storage import load

    if threshold is None and target_speedup is None:
        target_speedup = 1.8
    settings = TeaCache(threshold, target_speedup, degree, fit_to, foretell)
    file = profile_file or newest()
    profile = load(file)
    _write(settings.calibrate(profile), profile.provenance.model, output, as_json)


def _subject(profile_file: Path | None, model: str | None, steps: int | None) -> "tuple[str, Anatomy, Target, int]":
    """Return the model's name, the anatomy, the target and the number of steps that a schedule is to be for."""
    if model is not None and profile_file is not None:
        raise click.UsageError("give either --profile or --model")
    if model is None:
        if steps is not None:
            raise click.UsageError("--steps goes with --model; a profile has its own")
        from dicache.profiler.storage import header

        provenance, _ = header(profile_file or newest())
        return provenance.model, provenance.anatomy, provenance.target, len(provenance.target.timesteps or ())
    from dicache.models.loading import load
    from dicache.models.sampling import Sampling
    from dicache.profiler.profiling import survey_pipeline

    pipeline = load(model)
    sampling = Sampling(steps=steps).usual_for(model).resolved(pipeline)
    return model, *survey_pipeline(pipeline, sampling)


def _write(schedule: "Schedule", model: str, output: Path | None, as_json: bool) -> None:
    output = output or Path(f"{schedule.method}.json")
    schedule.save(output)
    fraction = schedule.macs_fraction()
    if as_json:
        show_json({"schedule": str(output), "macs_fraction": fraction, **schedule.to_json()["measured"]})
        return
    click.echo(f"Wrote {output}: {schedule.method}, {schedule.steps} steps of {model}, {fraction:.3f} of the MACs")
    if "fit" in schedule.measured:
        fit, threshold = schedule.measured["fit"], schedule.measured["threshold"]
        click.echo(f"  threshold {threshold:.4g}, {schedule.measured['computed_steps']:g} steps computed on average")
        click.echo(
            f"  fit of {fit['pairs']} pairs: R2 {fit['held_out_r2']:.3f} on held-out runs, "
            f"{fit['per_step_r2']:.3f} for the median of each step"
        )
        if fit["held_out_r2"] < POOR_FIT:
            click.echo(
                f"  Warning: the polynomial foretells little (R2 below {POOR_FIT:g}); profile more runs, try another "
                "--fit-to or --degree, or decide by the steps alone with --foretell steps",
                err=True,
            )
    click.echo(f"Next: dicache evaluate --model {model} --schedule {output}")
