"""`dicache calibrate METHOD`: turn a profile into a schedule."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dicache.cli.command import Group, json_option, show_json
from dicache.cli.profiles import newest
from dicache.cli.searching import Searching, Subject, given_options, search_for, search_options

if TYPE_CHECKING:
    from dicache.profiler import Provenance, Run
    from dicache.schedules import Schedule

POOR_FIT = 0.7  # held-out R2 below which what foretells the change is warned of
CLEARLY_BETTER = 0.9  # share of the polynomial's error below which the median of each step is pointed out
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


def target_options(function: F) -> F:
    speedup = click.option("--target-speedup", type=click.FloatRange(1), help="How many times fewer MACs, such as 1.8.")
    share = click.option(
        "--max-macs", type=click.FloatRange(0, 1, min_open=True), help="Instead: the share of the MACs, such as 0.55."
    )
    return speedup(share(function))


@calibrate.command()
@click.option("--interval", type=int, help="Steps from one computation to the next; 2 or 3 is usual.")
@target_options
@click.option("--anchor", type=click.Choice(["end", "start"]), default="end", show_default=True, help="Counted from.")
@click.option("--branches", help="Kinds of branch to reuse, separated by commas: attn,mlp.  [default: all]")
@click.option("--from", "first", type=click.IntRange(0), default=0, show_default=True, help="First step to reuse.")
@click.option("--to", "last", type=click.IntRange(0), help="Last step to reuse.  [default: the last]")
@profile_option
@click.option("--model", help="Instead of a profile: FORA needs no measurement.")
@click.option("--steps", type=click.IntRange(1), help="With --model: inference steps.")
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

    search, share = Searching(**searching), _share(target_speedup, max_macs)
    kinds = tuple(part.strip() for part in branches.split(",")) if branches else ()
    if search.wanted:
        goal = search.goal(share)
        subject = _subject(profile_file, model, steps, search.device)
        settings = Fora(interval or USUAL_INTERVAL, anchor, kinds, first, last)
        space = ForaSpace(subject.anatomy, subject.target, subject.steps, settings, given_options())
        output = output or Path("fora.json")
        return _write(*search_for(subject, space, goal, search, output), subject.model, output, as_json)
    if (interval is None) == (share is None):
        raise click.UsageError("give one of --interval, --target-speedup and --max-macs")
    settings = Fora(1 if interval is None else interval, anchor, kinds, first, last)
    subject = _subject(profile_file, model, steps)
    for tried in range(1, subject.steps) if interval is None else (interval,):
        settings = replace(settings, interval=tried)
        schedule = planned_schedule(settings, subject.anatomy, subject.target, subject.steps)
        if share is None or schedule.macs_fraction() <= share:
            return _write(schedule, "", subject.model, output, as_json)
    assert share is not None
    raise CalibrationError(f"fora: a speed-up of {1 / share:g} cannot be reached in {subject.steps} steps")


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

    search, share = Searching(**searching), _share(target_speedup, max_macs)
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
        return _write(settings.calibrate(profile), "", model, output, as_json)
    goal = search.goal(share)
    space = TeaCacheSpace(profile, settings, given_options(), goal.max_macs)
    subject = _profiled(profile.provenance, profile.runs)
    output = output or Path("teacache.json")
    return _write(*search_for(subject, space, goal, search, output), model, output, as_json)


def _share(target_speedup: float | None, max_macs: float | None) -> float | None:
    """Return the share of the MACs that is aimed at."""
    if target_speedup is not None and max_macs is not None:
        raise click.UsageError("give either --target-speedup or --max-macs")
    return max_macs if target_speedup is None else 1 / target_speedup


def _profiled(provenance: "Provenance", runs: "tuple[Run, ...]") -> Subject:
    from dicache.models.sampling import Sampling

    settings, target = provenance.settings, provenance.target
    size = {name: settings.get(name) for name in ("guidance", "height", "width", "frames")}
    return Subject(
        provenance.model,
        provenance.anatomy,
        target,
        len(target.timesteps or ()),
        Sampling(target.num_inference_steps, **size),
        {run.prompt for run in runs},
        {run.seed for run in runs},
    )


def _subject(
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    device: str | None = None,
    scheduler: str | None = None,
    dtype: str | None = None,
) -> Subject:
    """Return what a schedule is to be for, from a profile or a model."""
    if model is not None and profile_file is not None:
        raise click.UsageError("give either --profile or --model")
    if model is None:
        for name, value in (("steps", steps), ("scheduler", scheduler), ("dtype", dtype)):
            if value is not None:
                raise click.UsageError(f"--{name} goes with --model; a profile has its own")
        from dicache.profiler.storage import header

        return _profiled(*header(profile_file or newest()))
    from dicache.models.loading import load
    from dicache.models.sampling import Sampling
    from dicache.profiler.profiling import survey_pipeline

    pipeline = load(model, device=device, dtype=dtype, scheduler=scheduler)
    sampling = Sampling(steps=steps).usual_for(model).resolved(pipeline)
    return Subject(model, *survey_pipeline(pipeline, sampling), sampling, pipeline=pipeline)


def _write(
    schedule: "Schedule", told: str, model: str, output: Path | None, as_json: bool, *, guided: bool = True
) -> None:
    """Write the schedule, and tell what was found on the way to it and how good it is."""
    output = output or Path(f"{schedule.method}.json")
    schedule.save(output)
    fraction = schedule.macs_fraction(guided=guided)
    fit = schedule.measured.get("fit")
    if as_json:
        show_json({"schedule": str(output), "macs_fraction": fraction, **schedule.to_json()["measured"]})
    else:
        if told:
            click.echo(told)
        click.echo(f"Wrote {output}: {schedule.method}, {schedule.steps} steps of {model}, {fraction:.3f} of the MACs")
        if fit:
            _show_fit(schedule, fit)
    if fit:
        _warn(schedule, fit)
    if not as_json:
        click.echo(f"Next: dicache evaluate --model {model} --schedule {output}")


def _show_fit(schedule: "Schedule", fit: Mapping[str, Any]) -> None:
    settings, (low, high) = schedule.settings, fit["input_range"]
    threshold, computed = schedule.measured["threshold"], schedule.measured["computed_steps"]
    click.echo(f"  threshold {threshold:.4g}, {computed:g} steps computed on average")
    click.echo(
        f"  polynomial of degree {settings['degree']}, fitted to the {settings['fit_to']}: "
        f"{fit['pairs']} pairs, x from {low:.3g} to {high:.3g}"
    )
    click.echo("  on held-out runs:")
    click.echo(f"    polynomial           R2 {fit['held_out_r2']:.3f}, RMSE {fit['held_out_rmse']:.2g}")
    click.echo(f"    median of each step  R2 {fit['per_step_r2']:.3f}, RMSE {fit['per_step_rmse']:.2g}")
    click.echo(
        f"    polynomial negative at {fit['held_out_negative_share']:.1%} of x, falling at "
        f"{fit['held_out_falling_share']:.1%}; {fit['held_out_outside_share']:.1%} of x outside the fitted range"
    )


def _warn(schedule: "Schedule", fit: Mapping[str, Any]) -> None:
    """Warn of a poor fit and say what to do; offer what foretells better."""
    settings = schedule.settings
    if settings["foretell"] == "steps":
        if fit["per_step_r2"] < POOR_FIT:
            click.echo(
                f"Warning: the median of each step foretells little (R2 below {POOR_FIT:g}): the runs differ much from "
                "one another. Profile more runs, try another --fit-to, or decide at run time with --foretell input",
                err=True,
            )
        return
    better = fit["per_step_rmse"] < CLEARLY_BETTER * fit["held_out_rmse"]
    if fit["held_out_r2"] < POOR_FIT:
        instead = ", or decide by the steps alone with --foretell steps" if better else ""
        click.echo(
            f"Warning: the polynomial foretells little (R2 below {POOR_FIT:g}). Profile more runs, "
            f"or try another --fit-to or --degree{instead}",
            err=True,
        )
    elif better:
        click.echo(
            "Note: the median of each step foretells better than the polynomial; --foretell steps takes it, "
            "and needs no decision at run time",
            err=True,
        )
    if fit["held_out_negative_share"] > 0 and settings["negative"] == "reference":
        click.echo(
            f"Warning: the polynomial is negative at {fit['held_out_negative_share']:.1%} of x, which lowers the sum "
            "and may keep on skipping to the end; take --negative clamp or abs",
            err=True,
        )
    if fit["held_out_falling_share"] > 0.25:
        click.echo(
            f"Warning: at {fit['held_out_falling_share']:.1%} of x the polynomial falls: a larger change of the input "
            "foretells a smaller one of the output. Try a lower --degree",
            err=True,
        )
