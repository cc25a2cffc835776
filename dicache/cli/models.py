"""`dicache models` and `dicache zoo`."""

import textwrap
from pathlib import Path

import click

from dicache.cli.command import Command, Group, json_option, page_width, show_json


@click.command(cls=Command)
@json_option
def models(as_json: bool) -> None:
    """List the names that --model knows."""
    from dicache.models import zoo as bundled
    from dicache.models.names import HUB

    if as_json:
        show_json({"bundled": bundled.NAMES, "hub": {name: vars(known) for name, known in HUB.items()}})
        return
    click.echo("Bundled:")
    for name, text in bundled.NAMES.items():
        click.echo(textwrap.fill(text, page_width(), initial_indent=f"  {name:14} ", subsequent_indent=" " * 17))
    click.echo("From the hub, by short name:")
    for name, known in HUB.items():
        usually = [
            f"{known.steps} steps" if known.steps else "",
            "" if known.guidance is None else f"guidance {known.guidance:g}",
            (known.sampler or "").removesuffix("Scheduler"),
        ]
        where, how = f"  {name:14} {known.repository:36}", ", ".join(filter(None, usually))
        fits = len(where) + 1 + len(how) <= page_width()
        click.echo(f"{where} {how}".rstrip() if fits else f"{where.rstrip()}\n{'':17}{how}")
    click.echo("Or any hub id, or a folder in diffusers' format.")


@click.group(cls=Group)
def zoo() -> None:
    """The bundled models."""


@zoo.command(interrupted="the same command goes on from the last checkpoint in --work")
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the pipeline.  [default: ./NAME]")
@click.option("--work", type=click.Path(path_type=Path), help="Checkpoints, to go on from.  [default: ./NAME-training]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps of the transformer.  [default: the recipe's]")
@json_option
def train(
    name: str, output: Path | None, work: Path | None, seed: int, device: str, steps: int | None, as_json: bool
) -> None:
    """Train a small model of the package; a training that was interrupted is resumed.

    Needs `pip install 'dicache[zoo]'` for the data of digits.
    """
    from dicache.models import zoo as bundled
    from dicache.models.names import ModelError

    if name not in bundled.NAMES:
        raise ModelError(f"unknown model {name!r}; known are {', '.join(bundled.NAMES)}")
    import logging
    from importlib import import_module

    recipe = import_module(f"dicache.models.zoo.{name}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = output or Path(name)
    recipe.train(
        output,
        work or Path(f"{name}-training"),
        seed=seed,
        device=device,
        **({} if steps is None else {"steps": steps}),
    )
    if as_json:
        show_json({"model": str(output)})
        return
    click.echo(f"Wrote {output}. Try: dicache generate --model {output} {recipe.EXAMPLE} -o images")
