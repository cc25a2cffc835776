"""`dicache schedules export`, `import` and `formats`: schedules of other projects."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicache.cli.calibrating import planned_subject, subject_options
from dicache.cli.command import Command, json_option, show_json, table

if TYPE_CHECKING:
    from dicache.schedules import Schedule


def imported_in_words(schedule: "Schedule") -> list[str]:
    """Return where a schedule was read from, if it was, in a line."""
    told = schedule.measured.get("imported")
    if told is None:
        return []
    given = ", ".join(f"{name} {value}" for name, value in told["given"].items())
    return [f"read from {told['file']} as {told['format']}; given besides: {given}"]


@click.command("export", cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--to", "name", required=True, metavar="FORMAT", help="Format, as `dicache schedules formats` lists them."
)
@click.option("--lossy", is_flag=True, help="Write it even if the picture will be another.")
@click.option(
    "--set",
    "given",
    multiple=True,
    metavar="KEY=VALUE",
    help="What the format asks for and a schedule does not say; the value is JSON or text.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="[default: FILE.FORMAT]")
@json_option
def export_schedule(
    file: Path, name: str, lossy: bool, given: tuple[str, ...], output: Path | None, as_json: bool
) -> None:
    """Write a schedule in the form of another project, and say what is lost and how it is loaded.

    A format without comments has that in a text file beside it.
    """
    from dicache.formats import export, find
    from dicache.schedules import Schedule

    kind = find(name)
    made = export(Schedule.load(file), kind, lossy=lossy, values=dict(_pair(text) for text in given))
    output = output or file.with_name(f"{file.stem}.{name}{kind.suffix}")
    use = [line.replace("FILE", str(output)) for line in made.use]
    notes = [f"Made by dicache of {file.name} for {kind.engine}.", *use]
    notes += [f"Lost: {line}" for line in made.losses.stated]
    notes += [f"Changed: {line}" for line in made.losses.beyond]
    comment = "".join(f"{kind.comment}{line}\n" for line in notes)
    if kind.comment:
        output.write_text(comment + made.text, encoding="utf-8")
    else:
        output.write_text(made.text, encoding="utf-8")
        output.with_name(f"{output.name}.txt").write_text(comment, encoding="utf-8")
    losses = {"lost": made.losses.stated, "changed": made.losses.beyond}
    if as_json:
        show_json({"file": str(output), "format": name, "checked_against": kind.engine, **losses, "use": use})
        return
    click.echo(f"Wrote {output} for {kind.engine}")
    for line in made.losses.stated:
        click.echo(f"  lost: {line}")
    for line in made.losses.beyond:
        click.echo(f"  changed: {line}")
    for line in use:
        click.echo(f"  {line}")


def _pair(text: str) -> tuple[str, Any]:
    """Return what was set: its name and its value."""
    key, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--set takes KEY=VALUE, found {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


@click.command("import", cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--from", "name", required=True, metavar="FORMAT", help="Format, as `dicache schedules formats` lists them."
)
@subject_options
@click.option(
    "--threshold", type=float, help="Threshold of TeaCache, MagCache or a router, where the file does not say it."
)
@click.option("--max-skip", type=int, help="For MagCache: most steps skipped in a row.")
@click.option("--retention", type=float, help="For MagCache: share of the steps at the start that are computed.")
@click.option("--hold", type=click.Choice(["blocks", "branches"]), help="For a mask: what it holds.  [default: blocks]")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="[default: FILE.dicache.json]")
@json_option
def import_schedule(
    file: Path,
    name: str,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make a schedule of another project's file.

    What the file does not say, the model and its sampler, is taken from a profile, or from --model and --steps.
    """
    from dicache.formats import Given, find, imported

    kind = find(name)
    subject = planned_subject(profile_file, model, steps)
    told = {key: value for key, value in settings.items() if value is not None}
    schedule = imported(file, kind, Given(subject.model, subject.anatomy, subject.target, subject.steps, told))
    output = output or file.with_name(f"{file.stem}.dicache.json")
    schedule.save(output)
    if as_json:
        show_json({"schedule": str(output), "method": schedule.method, "steps": schedule.steps, **schedule.measured})
        return
    computed = (
        "decides at run time"
        if schedule.plan is None
        else f"{len(schedule.plan.computed_steps)} of them computed whole"
    )
    click.echo(f"Wrote {output}: {schedule.method}, {schedule.steps} steps of {subject.model}, {computed}")
    for line in imported_in_words(schedule):
        click.echo(f"  {line}")
    click.echo(f"Next: dicache evaluate --model {subject.model} --schedule {output}")


@click.command("formats", cls=Command)
@json_option
def formats(as_json: bool) -> None:
    """List the formats, what they hold, and what they were checked against."""
    from dicache.formats import NAMES, find

    kinds = [find(name) for name in NAMES]
    if as_json:
        keys = ("name", "engine", "source", "holds", "loses")
        ways = [{"export": kind.export is not None, "import": kind.read is not None} for kind in kinds]
        show_json([{key: getattr(kind, key) for key in keys} | way for kind, way in zip(kinds, ways, strict=True)])
        return
    mark = {True: "yes", False: "-"}
    rows = [[kind.name, mark[kind.export is not None], mark[kind.read is not None], kind.engine] for kind in kinds]
    click.echo(table(["format", "export", "import", "checked against"], rows))
    click.echo()
    for kind in kinds:
        click.echo(f"{kind.name}: {kind.holds}. Not kept: {kind.loses}.")
