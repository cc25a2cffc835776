"""`dicache profiles`: look at profiles, and join them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from dicache.cli.command import Group, json_option, show_json

FOLDER = Path("profiles")


@click.group(cls=Group)
def profiles() -> None:
    """Look at profiles, and join them."""


@profiles.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--published",
    "names",
    multiple=True,
    help="Judge this published TeaCache polynomial on the profile.  [default: those for the model's class]",
)
@json_option
def show(file: Path | None, names: tuple[str, ...], as_json: bool) -> None:
    """Show what a profile holds and where it came from; the newest in ./profiles when FILE is left out.

    TeaCache's polynomials, one fitted to the profile and those that are published for the model, are judged by how well
    they foretell the change of the model's output: the share of its variance that they explain (R2), and their error.
    """
    from dicache.calibrate.first_look import redundancy, teacache_fits
    from dicache.profiler.needing import byte_size
    from dicache.profiler.storage import array_shapes, load

    file = file or newest()
    read = load(file)
    origin, target = read.provenance, read.provenance.target
    likeness = redundancy(read)
    own, published = teacache_fits(read, names)
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
                "redundancy": likeness,
                "teacache": {"own": own, "published": {name: judged.to_json() for name, judged in published.items()}},
                "versions": dict(origin.versions),
            }
        )
        return
    failed = [run for run in read.runs if not run.ok]
    click.echo(f"{file}: {origin.model}, {read.anatomy.model}")
    click.echo(f"weights {target.weights}, {target.dtype}")
    click.echo(f"{len(read.runs)} runs of {read.steps} steps, {len(failed)} failed")
    for run in failed:
        click.echo(f"  {run.prompt!r}, seed {run.seed}: {run.status}")
    guidance = origin.settings.get("guidance")
    click.echo(f"{target.scheduler}, guidance {guidance} ({origin.layout}), latents {list(target.latents or ())}")
    click.echo(f"{len(read.anatomy.blocks)} blocks, {len(read.anatomy.sites)} sites: {', '.join(read.branches)}")
    for name, value in likeness.items():
        click.echo(f"  {name:18} {'-' if value is None else f'{value:.4f}':>6}  {_meaning(name)}")
    if own is not None:
        click.echo(f"  {'TeaCache, own fit':18} R2 {own['r2']:.3f}, RMSE {own['rmse']:.2g} on held-out runs")
    for name, judged in published.items():
        click.echo(f"  published for {name}: {judged_in_words(judged.to_json())}")
    click.echo(f"arrays, {byte_size(file.stat().st_size)} in all:")
    shapes = array_shapes(file)
    priors = [name for name in shapes if name.startswith("/priors/")]
    shown = [name for name in shapes if name not in priors[1:]]
    width = max(map(len, shown))
    for name in shown:
        more = f" and {len(priors) - 1} more" if name in priors[:1] else ""
        click.echo(f"  {name:{width}} {' x '.join(map(str, shapes[name]))}{more}")


@profiles.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The profile to write."
)
@json_option
def merge(files: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Join profiles of the same model and settings, such as the parts of `dicache profile --shard`, to one.

    It is the profile that one process would have made of all their runs, in the order of their seeds. OUTPUT may be one
    of FILES; another file is not replaced.
    """
    from dicache.profiler import ProfileError
    from dicache.profiler.storage import merge as join

    if output.exists() and output not in files:
        raise ProfileError(f"{output} exists; name it among the files to add to it, or choose another -o")
    runs = join(files, output)
    failed = sum(not run.ok for run in runs)
    if as_json:
        show_json({"profile": str(output), "runs": len(runs), "failed": failed})
    else:
        click.echo(f"Wrote {output}: {len(runs)} runs, {failed} failed")


def judged_in_words(judged: Mapping[str, Any]) -> str:
    """Return how well a published polynomial foretells the pairs of a profile."""
    return (
        f"R2 {judged['r2']:.3f}, RMSE {judged['rmse']:.2g}; {judged['outside_share']:.1%} of x outside its range, "
        f"negative at {judged['negative_share']:.1%}, falling at {judged['falling_share']:.1%}"
    )


def _meaning(name: str) -> str:
    return {
        "change": "relative, of all blocks' delta, since the step before",
        "correlation": "of the input's change with the output's",
        "rank correlation": "of the same",
    }.get(name, "cosine with the step before")


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
