"""`dicache demo`: the main job on bundled models."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dicache.cli.command import Command, json_option, page_width, show_json
from dicache.cli.evaluate import results_table

if TYPE_CHECKING:
    import numpy as np

    from dicache.evaluate.evaluation import Result
    from dicache.profiler import Profile
    from dicache.schedules import Schedule

MODELS = ("digits", "scenes")
SPEEDUPS = (1.5, 2.0)  # of the two TeaCache thresholds
SHOWN = 10  # images of each schedule in the picture


@click.command(cls=Command)
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Choice(MODELS),
    default=MODELS,
    show_default=True,
    help="Model to show; repeatable.",
)
@click.option("--runs", type=click.IntRange(2), default=16, show_default=True, help="Runs to profile.")
@click.option("--steps", type=click.IntRange(4), help="Inference steps.  [default: 50 of digits, 20 of scenes]")
@click.option("--images", type=click.IntRange(1), default=40, show_default=True, help="Images to judge by.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("demo"))
@json_option
def demo(models: tuple[str, ...], runs: int, steps: int | None, images: int, output: Path, as_json: bool) -> None:
    """Profile the bundled models, calibrate FORA and TeaCache, replay them, and judge the outcome.

    Leaves a table in ./demo, and a folder a model with profile, schedules and pictures.
    """
    results, tables = {}, []
    for model in dict.fromkeys(models):
        head, found = _demonstrate(model, runs, steps, images, output / model, as_json)
        results[model] = [result.to_json() for result in found]
        tables.append(f"{head}\n\n{results_table(found)}")
        click.echo(f"\n{head}\n\n{results_table(found, page_width())}\n", err=as_json)
    (output / "results.txt").write_text("\n\n".join(tables) + "\n")
    if as_json:
        show_json({"output": str(output), "results": results})
        return
    click.echo(f"Table, profiles, schedules and pictures are in {output}/")


def _demonstrate(
    model: str, runs: int, steps: int | None, images: int, output: Path, quiet: bool
) -> "tuple[str, list[Result]]":
    """Return what was done, and the results; with `quiet` all that is told on the way is on standard error."""
    from dicache.evaluate.evaluation import evaluate
    from dicache.models.judges import judges_of
    from dicache.models.loading import load
    from dicache.models.sampling import Sampling, default_conditions
    from dicache.profiler import storage
    from dicache.profiler.profiling import profile_pipeline

    pipeline = load(model)
    sampling = Sampling(steps).resolved(pipeline)
    file = output / "profile.h5"
    file.unlink(missing_ok=True)
    click.echo(f"{model}\n1. Profile: {runs} runs of {sampling.steps} steps, uncached", err=quiet)
    profile_pipeline(pipeline, model, file, default_conditions(pipeline, runs), sampling=sampling)
    profile = storage.load(file)

    click.echo("2. Calibrate", err=quiet)
    schedules = _calibrate(profile)
    for name, schedule in schedules:
        schedule.save(output / f"{name}.json")
        click.echo(f"   {output / name}.json: {schedule.macs_fraction():.3f} of the MACs", err=quiet)

    click.echo(f"3. Replay: {images} images each, other seeds than the profile's", err=quiet)
    conditions = default_conditions(pipeline, images)
    judges = judges_of(model, pipeline, conditions)
    uncached, cached, fewer = evaluate(
        pipeline, schedules, conditions, sampling=sampling, judges=judges, timing_rounds=7
    )
    rows = [(result.name, result.images[:SHOWN]) for result in (uncached, *cached)]
    _draw(profile, schedules, rows, conditions[:SHOWN], output)
    head = f"{model}, {sampling.steps} steps, guidance {sampling.guidance:g}, {images} images"
    return head, [uncached, *cached, *fewer]


def _calibrate(profile: "Profile") -> "list[tuple[str, Schedule]]":
    from dicache.calibrate.fora import Fora
    from dicache.calibrate.methods import planned_schedule
    from dicache.calibrate.teacache import TeaCache

    target = profile.provenance.target
    fora = [(f"fora-{n}", planned_schedule(Fora(n), profile.anatomy, target, profile.steps)) for n in (2, 3)]
    return fora + [(f"teacache-{x:g}x", TeaCache(target_speedup=x).calibrate(profile)) for x in SPEEDUPS]


def _draw(
    profile: "Profile",
    schedules: "list[tuple[str, Schedule]]",
    rows: "list[tuple[str, np.ndarray]]",
    captions: list[str],
    output: Path,
) -> None:
    from dicache.figures import save
    from dicache.figures.delta import delta_map
    from dicache.figures.grid import image_grid
    from dicache.figures.schedule import schedule_strip
    from dicache.figures.similarity import similarity_maps
    from dicache.figures.teacache import teacache_fit

    save(delta_map(profile), output / "delta.png")
    save(similarity_maps(profile), output / "similarity.png")
    save(teacache_fit(profile, schedules[-1][1]), output / "teacache.png")
    save(schedule_strip(schedules), output / "schedules.png")
    save(image_grid(rows, captions), output / "images.png")
