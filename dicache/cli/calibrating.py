"""What the commands that calibrate share: what a schedule is for, and how it is written and told of."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dicache.cli.command import show_json
from dicache.cli.profiles import judged_in_words, newest
from dicache.cli.searching import Searching, Subject, given_options, search_for, search_options

if TYPE_CHECKING:
    from dicache.calibrate.judging import Goal
    from dicache.calibrate.methods import Space
    from dicache.calibrate.spaces import PlanSpace, ProfileSpace
    from dicache.profiler import Provenance, Run
    from dicache.schedules import Schedule

RANGES = {  # what the range that x is held in is, if it is
    "fitted": "x is held in it unless --negative is reference",
    "given": "[{low:.4g}, {high:.4g}] was given",
    "sensible": "in [{low:.4g}, {high:.4g}] it is not negative, and does not fall towards that",
}
POOR_FIT = 0.7  # held-out R2 below which what foretells the change is warned of
CLEARLY_BETTER = 0.9  # share of the polynomial's error below which the median of each step is pointed out
F = TypeVar("F", bound=Callable[..., Any])


def profile_option(function: F) -> F:
    text = "The profile.  [default: the newest in ./profiles]"
    return click.option("--profile", "profile_file", type=click.Path(path_type=Path), help=text)(function)


def output_option(function: F) -> F:
    text = "The schedule to write.  [default: METHOD.json]"
    return click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help=text)(function)


def target_options(function: F, *, when: str = "") -> F:
    text = f"{when}How many times fewer MACs, such as 1.8."
    speedup = click.option("--target-speedup", type=click.FloatRange(1), help=text)
    share = click.option(
        "--max-macs", type=click.FloatRange(0, 1, min_open=True), help="Share of the MACs instead, such as 0.55."
    )
    return speedup(share(function))


def search_with_target_options(function: F) -> F:
    """Add the options of a search to a command that takes a target for nothing else."""
    return target_options(search_options(function), when="With --search: ")


def subject_options(function: F) -> F:
    """Add what says for which model and sampler a plan is."""
    model = click.option("--model", help="Model, in the place of a profile: the method needs no measurement.")
    steps = click.option("--steps", type=click.IntRange(1), help="With --model: inference steps.")
    return profile_option(model(steps(function)))


def share_of(target_speedup: float | None, max_macs: float | None) -> float | None:
    """Return the share of the MACs that is aimed at."""
    for name, value in (("--target-speedup", target_speedup), ("--max-macs", max_macs)):
        if value is not None and not math.isfinite(value):
            raise click.UsageError(f"{name} must be a finite number, found {value}")
    if target_speedup is not None and max_macs is not None:
        raise click.UsageError("give either --target-speedup or --max-macs")
    return max_macs if target_speedup is None else 1 / target_speedup


def subject_of_profile(provenance: "Provenance", runs: "tuple[Run, ...]") -> Subject:
    from dicache.profiler.describing import sampling_of

    return Subject(
        provenance.model,
        provenance.anatomy,
        provenance.target,
        len(provenance.target.timesteps or ()),
        sampling_of(provenance),
        {run.prompt for run in runs},
        {run.seed for run in runs},
    )


def subject_of(
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

        return subject_of_profile(*header(profile_file or newest()))
    from dicache.models.loading import load
    from dicache.models.sampling import Sampling
    from dicache.profiler.describing import survey_pipeline

    pipeline = load(model, device=device, dtype=dtype, scheduler=scheduler)
    sampling = Sampling(steps=steps).usual_for(model).resolved(pipeline)
    return Subject(model, *survey_pipeline(pipeline, sampling), sampling, pipeline=pipeline)


def search_and_write(
    search: Searching,
    method: str,
    space_of: "Callable[[Subject, Goal], Space]",
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
    share: float | None = None,
) -> None:
    """Search a method's space, and write the best schedule of it.

    Args:
        search: The options.
        method: Its name.
        space_of: Makes the space.
        share: Of the MACs; left out it is read from the options.
    """
    goal = search.goal(share_of(search.target_speedup, search.max_macs) if share is None else share)
    subject = subject_of(profile_file, model, steps, search.device)
    output = output or Path(f"{method}.json")
    schedule, told = search_for(subject, space_of(subject, goal), goal, search, output)
    guidance = subject.sampling.guidance
    write_schedule(schedule, told, subject.model, output, as_json, guided=guidance is None or guidance > 1)


def plan_space(kind: "type[PlanSpace]", settings: Any, **more: Any) -> "Callable[[Subject, Goal], Space]":
    """Return what makes the space of a method that needs no measurement, with what is on the command line kept."""
    given = given_options()
    return lambda subject, goal: kind(subject.anatomy, subject.target, subject.steps, settings, given, **more)


def plan_and_write(
    settings: Any,
    kind: "type[PlanSpace]",
    searching: Mapping[str, Any],
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Write the schedule of a method that needs no measurement, or search its space."""
    from dicache.calibrate.methods import name_of, planned_schedule

    search = Searching(**searching)
    if search.wanted:
        space, name = plan_space(kind, settings), name_of(type(settings))
        return search_and_write(search, name, space, profile_file, model, steps, output, as_json)
    subject = planned_subject(profile_file, model, steps)
    schedule = planned_schedule(settings, subject.anatomy, subject.target, subject.steps)
    guidance = subject.sampling.guidance
    return write_schedule(schedule, "", subject.model, output, as_json, guided=guidance is None or guidance > 1)


def profile_and_write(
    settings: Any,
    kind: "type[ProfileSpace]",
    searching: Mapping[str, Any],
    profile_file: Path | None,
    output: Path | None,
    as_json: bool,
    told_of: "Callable[[Schedule], str]" = lambda _: "",
    share: float | None = None,
) -> None:
    """Write the schedule that a profile gives, or search a method's space on it."""
    from dicache.calibrate.methods import name_of
    from dicache.calibrate.spaces import AimedSpace
    from dicache.profiler.storage import load

    search, file, given = Searching(**searching), profile_file or newest(), given_options()
    profile = load(file)
    if not search.wanted:
        schedule = settings.calibrate(profile)
        return write_schedule(schedule, told_of(schedule), profile.provenance.model, output, as_json)

    def space_of(_: Subject, goal: "Goal") -> "Space":
        if issubclass(kind, AimedSpace):
            return kind(profile, settings, given, goal.max_macs)
        return kind(profile, settings, given)

    return search_and_write(search, name_of(type(settings)), space_of, file, None, None, output, as_json, share)


def planned_subject(profile_file: Path | None, model: str | None, steps: int | None) -> Subject:
    """Return what a plan is for; where a configuration is in the package, without the weights of the model."""
    from dicache.evaluate.counting import PassCost, Size
    from dicache.models.configs import NAMES, read_config
    from dicache.models.names import HUB
    from dicache.models.sampling import Sampling
    from dicache.schedules import Target

    if model not in NAMES or profile_file is not None:
        return subject_of(profile_file, model, steps)
    source = read_config(model)
    usual = source.usual
    steps = steps or usual["steps"]
    sampling = Sampling(steps, usual["guidance"], usual["height"], usual["width"], text_tokens=usual["text_tokens"])
    size = Size(usual["height"], usual["width"], usual["text_tokens"])
    evaluations = steps + (HUB[model].extra_steps if model in HUB else 0)
    return Subject(model, PassCost(source, size).anatomy(), Target(num_inference_steps=steps), evaluations, sampling)


def write_schedule(
    schedule: "Schedule", told: str, model: str, output: Path | None, as_json: bool, *, guided: bool = True
) -> None:
    """Write the schedule, and tell what was found on the way to it and how good it is."""
    output = output or Path(f"{schedule.method}.json")
    schedule.save(output)
    fraction = schedule.macs_fraction(guided=guided)
    fit = schedule.measured.get("fit")
    if as_json:
        known = fraction if schedule.foreseen else None
        show_json({"schedule": str(output), **schedule.to_json()["measured"], "macs_fraction": known})
    else:
        if told:
            click.echo(told)
        share = f"{fraction:.3f} of the MACs" if schedule.foreseen else "decides at run time what it saves"
        click.echo(f"Wrote {output}: {schedule.method}, {schedule.steps} steps of {model}, {share}")
        if fit:
            _show_fit(schedule, fit)
        for line in published_in_words(schedule):
            click.echo(f"  {line}")
    if fit:
        _warn(schedule, fit)
    if not as_json:
        if schedule.foreseen and fraction >= 1:
            click.echo("It computes everything, and saves nothing.")
        click.echo(f"Next: dicache evaluate --model {model} --schedule {output}")


def published_in_words(schedule: "Schedule") -> list[str]:
    """Return what is to be known of the published polynomial that a schedule uses, if it does, a sentence a line."""
    told = schedule.measured.get("published")
    if told is None:
        return []
    from dicache.calibrate.teacache_published import quoted_in_words

    lines = [f"p of the {told['signal']}, published for {told['model']}: {told['source']}"]
    low, high = told["range"]
    fitted = told["fitted_range"]
    known = "is not known" if fitted is None else f"is [{fitted[0]:.4g}, {fitted[1]:.4g}]"
    lines.append(f"the range of x that it was fitted on {known}; {RANGES[told['range_is']].format(low=low, high=high)}")
    if "note" in told:
        lines.append(told["note"])
    lines.append(quoted_in_words(told))
    if "computed_steps" in schedule.measured:
        by = "" if schedule.adaptive else ", whatever the prompt"
        lines.append(
            f"threshold {schedule.measured['threshold']:.4g}: {schedule.measured['computed_steps']:g} of "
            f"{schedule.steps} steps computed{by}"
        )
    if "on_profile" in told:
        lines.append(f"on this profile: {judged_in_words(told['on_profile'])}")
    return lines


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
