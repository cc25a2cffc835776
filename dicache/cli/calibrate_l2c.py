"""`dicache calibrate l2c`: a router, read from a file or learned."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicache.cli.calibrating import output_option, profile_option, subject_of, write_schedule
from dicache.cli.command import Command, json_option
from dicache.cli.searching import Subject, given_options

if TYPE_CHECKING:
    from dicache.calibrate.l2c import Router
    from dicache.calibrate.l2c_training import Training
    from dicache.schedules import Target

OF_TRAINING = ("penalty", "iterations", "learning_rate", "batch", "seed", "prompts", "save_router", "device")


@click.command(cls=Command)
@click.option("--router", type=click.Path(path_type=Path), help="Read a published router, or one trained before.")
@click.option(
    "--train", "wanted", is_flag=True, help="Learn one on the model's own samplings: what is done without --router."
)
@click.option(
    "--threshold", type=float, default=0.1, show_default=True, help="Limit of beta: what is above it is computed."
)
@click.option(
    "--penalty",
    type=float,
    default=5e-6,
    show_default=True,
    help="Lambda, the weight of the sum of betas: the larger, the faster.",
)
@click.option("--iterations", type=int, default=500, show_default=True, help="Updates of each step's router.")
@click.option("--learning-rate", type=float, default=1e-2, show_default=True, help="Learning rate of AdamW.")
@click.option("--batch", type=int, default=8, show_default=True, help="Samples in a batch.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of conditions and noise.")
@click.option(
    "--prompts", type=click.Path(dir_okay=False), help="Prompts to learn on: a file with a prompt or class a line."
)
@click.option(
    "--save-router",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the router is written, and its training resumed.  [default: OUTPUT.router.pt]",
)
@profile_option
@click.option("--model", help="Model, in the place of a profile.")
@click.option("--steps", type=click.IntRange(1), help="With --model: inference steps, an even number.")
@click.option("--scheduler", help="With --model: another scheduler than the pipeline's.")
@click.option("--device", help="Device to learn on, such as cuda or cpu.  [default: cuda if there is one]")
@click.option("--dtype", help="With --model: float32, float16 or bfloat16.  [default: float32 on cpu, else bfloat16]")
@output_option
@json_option
def l2c(
    router: Path | None,
    wanted: bool,
    threshold: float,
    prompts: str | None,
    save_router: Path | None,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    scheduler: str | None,
    device: str | None,
    dtype: str | None,
    output: Path | None,
    as_json: bool,
    **training: Any,
) -> None:
    """Compute all branches every second step, and in between those that a router has learned (arXiv 2406.01733).

    The router is learned with the model's weights frozen, or read: of another --threshold, --router takes the file
    that a training wrote. The same command resumes a training that was interrupted.
    """
    from dicache.calibrate.l2c import LearningToCache, read_router
    from dicache.calibrate.l2c_training import Training

    if router is not None and wanted:
        raise click.UsageError("give either --router or --train")
    if router is not None and (given := [name for name in OF_TRAINING if name in given_options()]):
        raise click.UsageError(f"--{given[0].replace('_', '-')} goes with training; --router reads what was trained")
    settings = LearningToCache(threshold)
    options = Training(**training)
    output = output or Path("l2c.json")
    file = save_router or output.with_name(f"{output.name.removesuffix('.json')}.router.pt")
    read = None if router is None else read_router(router)
    if read is not None and model is not None and steps is None:
        steps = read.steps
    subject = subject_of(profile_file, model, steps, device, scheduler, dtype)
    target = _target(subject)
    known = _trained(subject, target, options, prompts, device, file) if read is None else read
    schedule = settings.schedule(known, subject.anatomy, target, subject.steps, subject.model)
    found = schedule.measured
    told = f"Holds {found['held']} of {schedule.steps * len(subject.anatomy.sites)} outputs, {found['held_share']:.1%}"
    if read is None:
        told += f", by the router in {file}"
    write_schedule(schedule, told, subject.model, output, as_json)


def _target(subject: Subject) -> "Target":
    """Return all that the schedule can be bound to, from the profile or from the pipeline that was looked at."""
    from dicache.profiler.describing import target_of

    if subject.pipeline is None:
        return subject.target
    return target_of(subject.pipeline, subject.anatomy, subject.sampling)


def _trained(
    subject: Subject, target: "Target", training: "Training", prompts: str | None, device: str | None, file: Path
) -> "Router":
    """Train a router for what the schedule is bound to."""
    from dicache.calibrate import CalibrationError
    from dicache.calibrate.l2c import check_steps
    from dicache.calibrate.l2c_training import train
    from dicache.models.sampling import class_id, default_conditions, read_conditions, takes_classes
    from dicache.profiler.describing import survey_pipeline, target_of

    check_steps(subject.steps)
    pipeline = subject.loaded(device)
    conditions = read_conditions(prompts) if prompts else list(dict.fromkeys(default_conditions(pipeline, 10_000)))
    if takes_classes(pipeline):
        for condition in conditions:
            class_id(pipeline, condition)  # raises here, and not when it is first drawn
    if subject.pipeline is None:
        anatomy, _, _ = survey_pipeline(pipeline, subject.sampling)
        if differences := target.differences(**vars(target_of(pipeline, anatomy, subject.sampling))):
            raise CalibrationError(
                f"l2c: the profile is of {'; '.join(differences)}; profile the model as it is now, or give --model"
            )
    return train(pipeline, subject.anatomy, target, subject.steps, conditions, subject.sampling, training, file)
