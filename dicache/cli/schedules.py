"""`dicache schedules`: look at schedule files."""

from itertools import groupby
from pathlib import Path

import click

from dicache.cli.command import Group, json_option, model_option, show_json


@click.group(cls=Group)
def schedules() -> None:
    """Look at schedule files."""


@schedules.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def show(file: Path, as_json: bool) -> None:
    """Show which step computes what, and what the schedule is bound to."""
    from dicache.schedules import Schedule

    schedule = Schedule.load(file)
    target, letters = schedule.target, schedule.table()
    if as_json:
        show_json(
            {
                "method": schedule.method,
                "settings": dict(schedule.settings),
                "num_inference_steps": target.num_inference_steps or schedule.steps,
                "steps": schedule.steps,
                "adaptive": schedule.adaptive,
                "macs_fraction": schedule.macs_fraction(),
                "made_for": target.to_json(),
                "unbound": list(target.unbound()),
                "measured": dict(schedule.measured),
                "sites": letters,
            }
        )
        return
    settings = ", ".join(f"{k} {v}" for k, v in schedule.settings.items() if v is not None and v != ())
    click.echo(f"{schedule.method}: {settings}")
    click.echo(f"{schedule.steps} steps of {schedule.anatomy.model}, {schedule.macs_fraction():.3f} of the MACs")
    bound = {k: v for k, v in target.to_json().items() if k not in ("timesteps", "noise_levels")}
    click.echo("made for " + (", ".join(f"{k} {v}" for k, v in bound.items()) or "nothing in particular"))
    if target.unbound():
        click.echo(f"does not bind {', '.join(name.replace('_', ' ') for name in target.unbound())}")
    if schedule.policy is not None:
        policy = schedule.policy
        click.echo(
            f"decides at run time: threshold {policy.threshold:.4g} on the sum of p(x), p = {_polynomial(policy)}"
        )
        click.echo(f"x in [{policy.input_range[0]:.4g}, {policy.input_range[1]:.4g}]; expected from its profile:")
    for names, row in _alike(letters):
        click.echo(f"  {names:24} {row}")
    click.echo("  C computed, R reused, S skipped with its block")


@schedules.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_option(required=False)
@json_option
def validate(files: tuple[Path, ...], model: str | None, as_json: bool) -> None:
    """Check schedule files, and with --model that they fit it."""
    from dicache.schedules import Schedule

    read = [(file, Schedule.load(file)) for file in files]
    if model is not None:
        from dicache.models.loading import load
        from dicache.runtime import apply

        pipeline = load(model)
        for _, schedule in read:
            with apply(pipeline, schedule):
                pipeline.scheduler.set_timesteps(schedule.target.num_inference_steps or schedule.steps)
    if as_json:
        show_json({"valid": [str(file) for file in files]})
        return
    for file, schedule in read:
        fits = f", fits {model}" if model else ""
        click.echo(f"{file}: valid, {schedule.method}, {schedule.steps} steps{fits}")


def _alike(letters: dict[str, str]) -> list[tuple[str, str]]:
    """Return the sites that have the same letters in one line: `attn 0-11`."""
    from dicache.anatomy.parts import span

    lines = []
    branches = dict.fromkeys(key.partition(".")[2] for key in letters)
    for branch in branches:
        mine = [(int(key.partition(".")[0]), row) for key, row in letters.items() if key.partition(".")[2] == branch]
        for row, group in groupby(mine, key=lambda item: item[1]):
            blocks = [block for block, _ in group]
            lines.append((f"{branch} {span(blocks[0], blocks[-1])}", row))
    return lines


def _polynomial(policy: object) -> str:
    coefficients = getattr(policy, "coefficients", ())
    powers = range(len(coefficients) - 1, -1, -1)
    terms = [
        f"{c:+.4g}" + (f" x^{p}" if p > 1 else " x" if p else "") for c, p in zip(coefficients, powers, strict=True)
    ]
    return " ".join(terms).lstrip("+")
