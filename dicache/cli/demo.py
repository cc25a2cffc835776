"""`dicache demo`: the main job on the bundled model."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dicache.cli.command import Command

if TYPE_CHECKING:
    import numpy as np

    from dicache.profiler import Profile
    from dicache.schedules import Schedule

SPEEDUPS = (1.5, 2.0)  # of the two TeaCache thresholds
GUIDANCE = 4.0


@click.command(cls=Command)
@click.option("--runs", type=click.IntRange(2), default=16, show_default=True, help="Runs to profile.")
@click.option("--steps", type=click.IntRange(4), default=50, show_default=True, help="Inference steps.")
@click.option("--images", type=click.IntRange(1), default=40, show_default=True, help="Images to judge by.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("demo"))
def demo(runs: int, steps: int, images: int, output: Path) -> None:
    """Profile the bundled digits model, calibrate FORA and TeaCache, replay them, and judge the outcome.

    Leaves profile, schedules, table and pictures in ./demo.
    """
    from dicache.cli.evaluate import results_table
    from dicache.evaluate.evaluation import evaluate
    from dicache.models.judges import judges_of
    from dicache.models.loading import load
    from dicache.models.sampling import Sampling, default_conditions
    from dicache.profiler import storage
    from dicache.profiler.profiling import profile_pipeline

    sampling = Sampling(steps=steps, guidance=GUIDANCE)
    pipeline = load("digits")
    file = output / "profile.h5"
    file.unlink(missing_ok=True)
    click.echo(f"1. Profile: {runs} runs of {steps} steps, uncached")
    profile_pipeline(pipeline, "digits", file, default_conditions(pipeline, runs), sampling=sampling)
    profile = storage.load(file)

    click.echo("2. Calibrate")
    schedules = _calibrate(profile)
    for name, schedule in schedules:
        schedule.save(output / f"{name}.json")
        click.echo(f"   {output / name}.json: {schedule.macs_fraction():.3f} of the MACs")

    click.echo(f"3. Replay: {images} images each, other seeds than the profile's")
    conditions = default_conditions(pipeline, images)
    judges = judges_of("digits", pipeline, conditions)
    uncached, cached, fewer = evaluate(
        pipeline, schedules, conditions, sampling=sampling, judges=judges, timing_rounds=7
    )
    text = results_table([uncached, *cached, *fewer])
    (output / "results.txt").write_text(text + "\n")
    click.echo(f"\n{text}\n")

    _draw(profile, schedules, [(r.name, r.images[:10]) for r in (uncached, *cached)], conditions[:10], output)
    click.echo(f"Profile, schedules, table and pictures are in {output}/")


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
