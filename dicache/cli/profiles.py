"""`dicache profiles`: look at profiles."""

from pathlib import Path

import click

from dicache.cli.command import Group, json_option, show_json

FOLDER = Path("profiles")


@click.group(cls=Group)
def profiles() -> None:
    """Look at profiles."""


@profiles.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@json_option
def show(file: Path | None, as_json: bool) -> None:
    """Show what a profile holds and where it came from; the newest in ./profiles when FILE is left out."""
    from dicache.profiler.profiling import byte_size
    from dicache.profiler.storage import array_shapes, load

    file = file or newest()
    read = load(file)
    origin, target = read.provenance, read.provenance.target
    if as_json:
        show_json(
            {
                "model": origin.model,
                "runs": len(read.runs),
                "failed": [vars(run) for run in read.runs if not run.ok],
                "steps": read.steps,
                "sites": list(read.anatomy.sites),
                "arrays": {name: list(shape) for name, shape in array_shapes(file).items()},
                "made_for": target.to_json(),
                "settings": dict(origin.settings),
                "versions": dict(origin.versions),
            }
        )
        return
    failed = [run for run in read.runs if not run.ok]
    click.echo(f"{file}: {origin.model}, {read.anatomy.model}, weights {target.weights}, {target.dtype}")
    click.echo(f"{len(read.runs)} runs of {read.steps} steps, {len(failed)} failed")
    for run in failed:
        click.echo(f"  {run.prompt!r}, seed {run.seed}: {run.status}")
    guidance = origin.settings.get("guidance")
    click.echo(f"{target.scheduler}, guidance {guidance} ({origin.layout}), latents {list(target.latents or ())}")
    click.echo(f"{len(read.anatomy.blocks)} blocks, {len(read.anatomy.sites)} sites: {', '.join(read.branches)}")
    import numpy as np

    with np.errstate(invalid="ignore"):
        for branch in read.branches:
            similarity = read.similarity(branch)[:, :, 1:]
            click.echo(f"  {branch:12} cosine with the step before: mean {np.nanmean(similarity):.4f}")
        click.echo(f"  {'block delta':12} cosine with the step before: mean {np.nanmean(read.delta_cosine):.4f}")
        for start, stop in read.anatomy.segments:
            blocks, error = f"blocks {start}-{stop - 1}", np.nanmean(read.range_error(start, stop))
            click.echo(f"  {blocks:12} relative change of their delta from step to step: mean {error:.4f}")
    click.echo(f"arrays, {byte_size(file.stat().st_size)} in all:")
    shapes = array_shapes(file)
    priors = [name for name in shapes if name.startswith("/priors/")]
    for name, shape in shapes.items():
        if name not in priors[1:]:
            more = f" and {len(priors) - 1} more" if name in priors[:1] else ""
            click.echo(f"  {name:20} {' x '.join(map(str, shape))}{more}")


def newest() -> Path:
    """Return the newest profile in ./profiles.

    Raises:
        ProfileError: If there is none.
    """
    found = sorted(FOLDER.glob("*.h5"), key=lambda path: path.stat().st_mtime)
    if not found:
        from dicache.profiler import ProfileError

        raise ProfileError("found no profile in ./profiles; make one with `dicache profile --model digits`")
    return found[-1]
