"""`dicache calibrate teacache`: from a profile, or with a polynomial that others published."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicache.cli.calibrating import (
    output_option,
    planned_subject,
    profile_option,
    search_and_write,
    share_of,
    subject_of,
    target_options,
    write_schedule,
)
from dicache.cli.command import Command, Kind, json_option
from dicache.cli.profiles import newest
from dicache.cli.searching import Searching, given_options, search_options

if TYPE_CHECKING:
    from dicache.calibrate.teacache import TeaCache
    from dicache.calibrate.teacache_published import Published
    from dicache.schedules import Schedule

FITTED = ("degree", "fit_to", "foretell")  # options of a fit of one's own


class Range(Kind[tuple[float, float]]):
    """Two numbers: `0.01,0.3`."""

    name = "low,high"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        try:
            low, high = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a range; write it like 0.01,0.3", param, ctx)
        return low, high


@click.command(cls=Command)
@click.option("--threshold", type=float, help="Limit of the accumulated relative change, such as 0.1.")
@target_options
@click.option("--degree", type=int, default=4, show_default=True, help="Degree of the polynomial.")
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
    help="Decide from the signal, or by the median of each step, which gives a fixed plan.",
)
@click.option(
    "--signal",
    type=click.Choice(["modulated", "time", "time-projected"]),
    help="Signal whose change predicts that of the output: the modulated input of the first block, at run time; "
    "the time embedding, or its projection for all blocks (Wan's retention mode), which give a fixed plan."
    "  [default: modulated, or as published]",
)
@click.option(
    "--negative",
    type=click.Choice(["clamp", "abs", "reference"]),
    default="clamp",
    show_default=True,
    help="Where the polynomial is negative: nothing is added, its magnitude is, or it is subtracted as published.",
)
@click.option(
    "--first-steps", type=click.IntRange(1), help="Steps that are always computed.  [default: 1, or as published]"
)
@click.option(
    "--last-steps", type=click.IntRange(0), help="Steps that are always computed.  [default: 1, or as published]"
)
@click.option("--published", "name", help="Take a published polynomial, such as flux; a wrong name lists them.")
@click.option("--input-range", type=Range(), help="Hold x in LOW,HIGH, and not in the fitted or a sensible range.")
@profile_option
@click.option(
    "--model", help="Model, with --published in the place of a profile.  [default: what it was published for]"
)
@click.option("--steps", type=click.IntRange(1), help="With --model: inference steps.  [default: as published]")
@search_options
@output_option
@json_option
def teacache(
    threshold: float | None,
    target_speedup: float | None,
    max_macs: float | None,
    signal: Any,
    first_steps: int | None,
    last_steps: int | None,
    name: str | None,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Skip the body until its foretold change adds up to a threshold (arXiv 2411.19108).

    From a profile, a polynomial is fitted. Without --threshold, --target-speedup and --max-macs, it aims at 1.8 times
    fewer MACs. With --search it tries thresholds and fits (--foretell, --fit-to, --degree) on real runs; what is given
    on the command line is kept.

    With --published NAME a polynomial that others fitted is taken, and no profile is needed, only a --threshold and,
    where the package has no name for the model, a --model. With --profile it is told how well it foretells the
    profile's own changes. Published speed-ups are those of `--negative reference` at the published number of steps.
    """
    from dicache.calibrate.teacache import USUAL_SPEEDUP, TeaCache
    from dicache.calibrate.teacache_published import published

    own = {key: options.pop(key) for key in (*FITTED, "negative", "input_range")}
    search, share = Searching(**options), share_of(target_speedup, max_macs)
    if search.wanted and threshold is not None:
        raise click.UsageError("--search finds the threshold; leave --threshold out")
    speedup = target_speedup if share is None or target_speedup is not None else 1 / share
    known = None if name is None else published(name)
    if known is None and (model is not None or steps is not None):
        raise click.UsageError("a fit needs a profile; --model and --steps go with --published")
    if known is not None:
        _check_published(known, threshold, speedup, search)
    elif threshold is None and speedup is None:
        speedup = USUAL_SPEEDUP
        share = None if search.wanted and search.min_psnr is not None else 1 / speedup
    settings = TeaCache(
        threshold,
        speedup,
        **own,
        signal=signal or (known.signal if known else "modulated"),
        first_steps=first_steps or (known.first_steps if known else 1),
        last_steps=last_steps if last_steps is not None else known.last_steps if known else 1,
        published=name,
    )
    if known is not None and profile_file is None:
        return _write(*_without_profile(settings, known, model, steps), output, as_json)
    if model is not None or steps is not None:
        raise click.UsageError("give either --profile or --model and --steps")
    return _from_profile(settings, profile_file or newest(), search, share, output, as_json)


def _from_profile(
    settings: "TeaCache", file: Path, search: Searching, share: float | None, output: Path | None, as_json: bool
) -> None:
    from dicache.calibrate.teacache import TeaCacheSpace
    from dicache.profiler.storage import load

    profile = load(file)
    model = profile.provenance.model
    if not search.wanted:
        return _write(settings.calibrate(profile), model, output, as_json)
    given = given_options()
    return search_and_write(
        search,
        "teacache",
        lambda _, goal: TeaCacheSpace(profile, settings, given, goal.max_macs),
        file,
        None,
        None,
        output,
        as_json,
        share,
    )


def _check_published(known: "Published", threshold: float | None, speedup: float | None, search: Searching) -> None:
    from dicache.calibrate.teacache_published import quoted_in_words

    if search.wanted:
        raise click.UsageError("--search fits to a profile; leave --published out")
    if given := [key for key in FITTED if key in given_options() and key != "fit_to"]:
        raise click.UsageError(f"--{given[0]} is of a fit of your own; leave it or --published out")
    if threshold is None and speedup is None:
        raise click.UsageError(f"give a --threshold. {quoted_in_words(known.to_json())}")


def _without_profile(
    settings: "TeaCache", known: "Published", model: str | None, steps: int | None
) -> tuple["Schedule", str]:
    """Return the schedule of a published polynomial, and the name of the model that it is for."""
    model = model or known.package_model
    if model is None:
        raise click.UsageError(f"{known.model} has no short name; say which --model, or which --profile, this is for")
    steps = steps or known.steps
    if known.signal == "modulated":
        subject = planned_subject(None, model, steps)
        made = settings.without_profile(model, subject.anatomy, subject.target, subject.steps)
        return made, model
    from dicache.calibrate import CalibrationError
    from dicache.calibrate.teacache_published import IN_WORDS, SIGNALS
    from dicache.models.names import ModelError
    from dicache.models.sampling import default_conditions, sample
    from dicache.profiler.describing import target_of
    from dicache.profiler.time_signal import measure_time

    try:
        subject = subject_of(None, model, steps)
    except ModelError as error:
        raise CalibrationError(
            f"teacache: the polynomial of {known.name} is of the {IN_WORDS[known.signal]}, which takes the model's "
            f"weights to compute; give a --model with weights, or a --profile ({error})"
        ) from None
    pipeline, sampling = subject.pipeline, subject.sampling.resolved(subject.pipeline)
    condition = default_conditions(pipeline, 1)
    measured = measure_time(pipeline, subject.anatomy, lambda: sample(pipeline, condition, [0], sampling))
    if SIGNALS[known.signal] not in measured:
        raise CalibrationError(
            f"teacache: {subject.anatomy.model} makes no {IN_WORDS[known.signal]} before its blocks of the timestep "
            f"alone, which the polynomial of {known.name} is of"
        )
    # The decisions hang on the weights and the timesteps, but not on guidance, the picture's size or the precision.
    target = replace(target_of(pipeline, subject.anatomy, sampling), dtype=None, latents=None, guidance=None)
    made = settings.without_profile(model, subject.anatomy, target, subject.steps, measured[SIGNALS[known.signal]])
    return made, model


def _write(schedule: "Schedule", model: str, output: Path | None, as_json: bool) -> None:
    from dicache.calibrate.teacache_published import published

    write_schedule(schedule, "", model, output, as_json)
    told = schedule.measured.get("published")
    if told is None:
        return
    kinds = published(told["name"]).transformers
    if schedule.anatomy.model not in kinds:
        click.echo(
            f"Warning: this was published for {' or '.join(kinds) or told['model']}, found a {schedule.anatomy.model}, "
            "of which it is not known to foretell anything; fit a polynomial of its own to a profile",
            err=True,
        )
    elif told["quoted_for"]["steps"] not in (None, schedule.target.num_inference_steps):
        click.echo(
            f"Note: the thresholds are those of {told['quoted_for']['steps']} steps, found "
            f"{schedule.target.num_inference_steps}; with fewer steps each changes more",
            err=True,
        )
