"""`dicache plot`: pictures of profiles and schedules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dicache.cli.command import Group, json_option, show_json

F = TypeVar("F", bound=Callable[..., Any])


@click.group(cls=Group)
def plot() -> None:
    """Draw a profile or schedules, as PNG, SVG or PDF."""


def picture_option(function: F) -> F:
    output = click.option(
        "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Picture to write."
    )
    return output(json_option(function))


def written(output: Path, as_json: bool) -> None:
    """Tell where the picture is."""
    if as_json:
        show_json({"picture": str(output)})
    else:
        click.echo(f"Wrote {output}")


@plot.command()
@click.argument("profile", type=click.Path(path_type=Path))
@picture_option
def delta(profile: Path, output: Path, as_json: bool) -> None:
    """How much each block's delta is like that of the step before (Delta-DiT, figure 4c)."""
    from dicache.figures import save
    from dicache.figures.delta import delta_map
    from dicache.profiler.storage import load

    save(delta_map(load(profile)), output)
    written(output, as_json)


@plot.command()
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--lag", type=click.IntRange(1), default=1, show_default=True, help="Steps back to compare with.")
@picture_option
def similarity(profile: Path, lag: int, output: Path, as_json: bool) -> None:
    """How much each branch's output is like that of earlier steps (FORA, figure 2)."""
    from dicache.figures import save
    from dicache.figures.similarity import similarity_maps
    from dicache.profiler.storage import load

    save(similarity_maps(load(profile), lag), output)
    written(output, as_json)


@plot.command()
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--schedule", "schedule_file", type=click.Path(path_type=Path), help="Draw its polynomial.")
@click.option("--published", "name", help="Draw this published polynomial, such as flux, and its signal.")
@picture_option
def teacache(profile: Path, schedule_file: Path | None, name: str | None, output: Path, as_json: bool) -> None:
    """Whether the modulated input foretells the output's change (TeaCache)."""
    from dicache.calibrate.teacache_published import published
    from dicache.figures import save
    from dicache.figures.teacache import teacache_fit
    from dicache.profiler.storage import load
    from dicache.schedules import Schedule

    schedule = Schedule.load(schedule_file) if schedule_file else None
    fitted_to = str(schedule.settings.get("fit_to", "output")) if schedule else "output"
    if schedule_file and name:
        raise click.UsageError("give either --schedule or --published")
    save(teacache_fit(load(profile), schedule, fitted_to, published(name) if name else None), output)
    written(output, as_json)


@plot.command()
@click.argument("schedules", nargs=-1, required=True, type=click.Path(path_type=Path))
@picture_option
def schedule(schedules: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Which step computes what."""
    from dicache.figures import save
    from dicache.figures.schedule import schedule_strip
    from dicache.schedules import Schedule

    save(schedule_strip([(file.stem, Schedule.load(file)) for file in schedules]), output)
    written(output, as_json)


@plot.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(file_okay=False, path_type=Path))
@picture_option
def spectrum(folders: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Which frequencies the images of folders hold, beside those of the first (Delta-DiT, figure 5).

    Folders of PNG images of the same names, as `dicache evaluate --images` writes them.
    """
    import numpy as np

    from dicache.figures import save
    from dicache.figures.spectrum import MOST, spectra
    from dicache.models.images import read_folder
    from dicache.models.names import ModelError

    if not 2 <= len(folders) <= MOST:
        raise click.UsageError(f"found {len(folders)} folders; needed 2 to {MOST}, the first to compare with")
    read = [read_folder(folder) for folder in folders]
    for folder, images in zip(folders, read, strict=True):
        if lone := sorted(images.keys() ^ read[0].keys()):
            raise ModelError(
                f"{lone[0]} is in only one of {folders[0]} and {folder}; needed the same images, made in different ways"
            )
    save(spectra([(f.name, np.stack(list(images.values()))) for f, images in zip(folders, read, strict=True)]), output)
    written(output, as_json)


@plot.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@picture_option
def pareto(files: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """How close images stay to the uncached ones, at what cost.

    Files that `dicache evaluate --json` wrote, with fewer steps as they have them; schedules that a search found, with
    its front, as its own runs have it; and those of benchmarks/pareto.py.
    """
    from dicache.figures import save
    from dicache.figures.pareto import pareto as draw
    from dicache.figures.pareto import read_series

    save(draw(read_series(files)), output)
    written(output, as_json)
