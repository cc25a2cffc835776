"""`dicache cost`: count multiply-accumulates from a model's configuration, without weights."""

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import click

from dicache.cli.command import Command, json_option, page_width, show_json, table

if TYPE_CHECKING:
    from dicache.anatomy import Anatomy
    from dicache.evaluate.counting import Macs, PassCost
    from dicache.models.configs import ModelConfig
    from dicache.schedules import Plan, Schedule

RENAMED = {"from": "first", "to": "last"}  # options that are called otherwise among a method's settings


@dataclass(frozen=True)
class Counted:
    """What a generation of one image is counted for.

    Attributes:
        whole: A guidance pass of the model.
        steps: Of the denoiser.
        guidance: Scale; None where the model is not known to have one.
        passes: Guidance passes a step.
    """

    whole: "PassCost"
    steps: int
    guidance: float | None
    passes: int

    @property
    def uncached(self) -> "Macs":
        return self.whole.total.times(self.steps * self.passes)


@click.command(cls=Command, context_settings={"ignore_unknown_options": True})
@click.option("--model", help="One whose configuration is in the package, a bundled one, or a folder of a pipeline.")
@click.option("--steps", type=click.IntRange(1), help="Steps of the denoiser.  [default: the schedule's, or the usual]")
@click.option(
    "--guidance", type=click.FloatRange(0), help="Guidance scale; above 1 a step has two passes.  [default: the usual]"
)
@click.option("--height", type=click.IntRange(1), help="Height in pixels.  [default: the usual]")
@click.option("--width", type=click.IntRange(1), help="Width in pixels.  [default: the usual]")
@click.option("--text-tokens", type=click.IntRange(1), help="Text tokens that the model reads.  [default: the usual]")
@click.option(
    "--schedule", "schedule_file", type=click.Path(path_type=Path), help="Schedule whose computations to count."
)
@click.option(
    "--method",
    help="Method to count in the place of a schedule: one that needs no measurement, with its options behind it.",
)
@click.option("--published", is_flag=True, help="Count the settings of papers again, beside their numbers.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF METHOD]")
@json_option
def cost(
    model: str | None,
    steps: int | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
    text_tokens: int | None,
    schedule_file: Path | None,
    method: str | None,
    published: bool,
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Count the multiply-accumulates of generating an image. No weights are needed.

    \b
    dicache cost --model pixart --steps 20
    dicache cost --model pixart --method delta-dit --blocks 21 --boundary 12
    dicache cost --published
    """
    if published:
        if model is not None or method is not None or schedule_file is not None:
            raise click.UsageError("--published has models and methods of its own")
        show_json(_published_json()) if as_json else _tell_published()
        return
    if model is None:
        raise click.UsageError("give --model or --published")
    if method is not None and schedule_file is not None:
        raise click.UsageError("give either --schedule or --method")
    if method is None and options:
        raise click.UsageError(f"there is no option {options[0]}; a method's options stand behind --method")
    from dicache.evaluate.cost import passes_of, planned_cost, schedule_cost
    from dicache.evaluate.counting import PassCost, Size
    from dicache.models.configs import read_config

    source = read_config(model)
    schedule = _loaded(schedule_file, steps)
    guidance = source.usual.get("guidance") if guidance is None else guidance
    size = Size(
        _needed(source, "height", height),
        _needed(source, "width", width),
        source.usual.get("text_tokens") if text_tokens is None else text_tokens,
    )
    steps = schedule.steps if schedule is not None else _needed(source, "steps", steps)
    counted = Counted(PassCost(source, size), steps, guidance, passes_of(source, guidance))
    name, found = "uncached", counted.uncached
    if schedule is not None:
        name = str(schedule_file)
        found = schedule_cost(counted.whole, counted.whole.anatomy(), schedule, passes=counted.passes)
    elif method is not None:
        anatomy = counted.whole.anatomy()
        name = " ".join((method, *options))
        found = planned_cost(counted.whole, anatomy, _plan(method, options, anatomy, steps), passes=counted.passes)
    show_json(_json(counted, name, found)) if as_json else _tell(counted, name, found)


def _loaded(file: Path | None, steps: int | None) -> "Schedule | None":
    from dicache.schedules import Schedule

    if file is None:
        return None
    schedule = Schedule.load(file)
    if steps is not None and steps != schedule.steps:
        raise click.UsageError(f"{file} is for {schedule.steps} steps, found --steps {steps}; leave it out")
    return schedule


def _needed(source: "ModelConfig", name: str, given: int | None) -> int:
    value = source.usual.get(name) if given is None else given
    if value is None:
        raise click.UsageError(f"what is usual for {source.name} is not known; give --{name}")
    return int(value)


def _plan(method: str, options: Sequence[str], anatomy: "Anatomy", steps: int) -> "Plan":
    """Return the plan of a method that was named on the command line, with its options."""
    from importlib import import_module
    from importlib.util import find_spec

    from dicache.calibrate.methods import METHODS

    module = f"dicache.calibrate.{method.replace('-', '_')}"
    if method.replace("-", "").isalnum() and find_spec(module) is not None:
        import_module(module)
    kind = METHODS.get(method)
    if kind is None or not hasattr(kind, "plan"):
        raise click.UsageError(
            f"{method!r} is no method that plans without a measurement, as fora, mask, delta-cache and delta-dit do"
        )
    plan: Plan = kind(**settings_of(kind, options)).plan(anatomy, steps)
    return plan


def settings_of(kind: type[Any], options: Sequence[str]) -> dict[str, Any]:
    """Return a method's settings from `--name value` pairs, converted as their types say."""
    hints = get_type_hints(kind)
    known = {name: hints[name] for name in (field.name for field in fields(kind))}
    settings: dict[str, Any] = {}
    words = [part for word in options for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2:
        raise click.UsageError(f"{words[-1]} has no value")
    for option, value in zip(words[::2], words[1::2], strict=True):
        name = option.removeprefix("--").replace("-", "_")
        name = RENAMED.get(name, name)
        if not option.startswith("--") or name not in known:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in known)
            raise click.UsageError(f"the method has no option {option}; it has {given}")
        settings[name] = _converted(option, value, known[name], settings.get(name))
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in settings]:
        raise click.UsageError(f"the method needs --{missing[0].replace('_', '-')}")
    return settings


def _converted(option: str, text: str, hint: Any, before: Any) -> Any:
    """Return an option's value as the type of the setting says; one that names branches may be given again."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    parts = get_args(hint)
    if get_origin(hint) is tuple:
        return tuple(_converted(option, part.strip(), parts[0], None) for part in text.split(","))
    if get_origin(hint) is Mapping:
        pairs = [pair.rpartition("=") for pair in ([text] if parts[1] is str else text.split(","))]
        given = {name.strip() or "*": _converted(option, value, parts[1], None) for name, _, value in pairs}
        return {**(before or {}), **given}
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise click.UsageError(f"{option} takes a number, found {text!r}") from None
    return text


def _json(counted: Counted, name: str, found: "Macs") -> dict[str, Any]:
    from dicache.evaluate.cost import CONVENTIONS

    uncached = counted.uncached
    return {
        "model": counted.whole.source.name,
        "counted": name,
        "steps": counted.steps,
        "guidance": counted.guidance,
        "passes": counted.passes,
        **vars(counted.whole.size),
        "macs": round(found.all),
        "macs_paper": round(found.papers),
        "fraction": found.all / uncached.all,
        "fraction_paper": found.papers / uncached.papers,
        "uncached": {"macs": round(uncached.all), "macs_paper": round(uncached.papers)},
        "conventions": {"macs": CONVENTIONS["all"], "macs_paper": CONVENTIONS["papers"]},
    }


def _tell(counted: Counted, name: str, found: "Macs") -> None:
    from dicache.evaluate.cost import CONVENTIONS

    size, uncached = counted.whole.size, counted.uncached
    passes = f"{counted.passes} {'pass' if counted.passes == 1 else 'passes'} a step"
    text = "" if size.text_tokens is None else f", {size.text_tokens} text tokens"
    click.echo(f"{counted.whole.source.name}: {counted.steps} steps, {passes}, {size.height} x {size.width}{text}")
    rows = [("uncached", uncached), (name, found)] if name != "uncached" else [("uncached", uncached)]
    click.echo(
        table(
            ["", "all", "share", "papers'", "share"],
            [
                [
                    what,
                    in_words(macs.all),
                    f"{macs.all / uncached.all:.3f}",
                    in_words(macs.papers),
                    f"{macs.papers / uncached.papers:.3f}",
                ]
                for what, macs in rows
            ],
            page_width(),
        )
    )
    click.echo(f"all: {CONVENTIONS['all']}")
    click.echo(f"papers': {CONVENTIONS['papers']}")


def in_words(macs: float) -> str:
    """Write a number of multiply-accumulates."""
    for unit, factor in (("T", 1e12), ("G", 1e9)):
        if macs >= 0.1 * factor:
            return f"{macs / factor:.3f} {unit}"
    return f"{macs / 1e6:.3f} M"


def _published_json() -> dict[str, Any]:
    from dicache.calibrate.published import WITHIN, published_rows

    rows = [{**vars(row), "deviation": row.deviation, "reproduced": row.reproduced} for row in published_rows()]
    return {"rows": rows, "within": WITHIN}


def _tell_published() -> None:
    from dicache.calibrate.published import WITHIN, published_rows
    from dicache.evaluate.cost import CONVENTIONS

    rows = published_rows()
    click.echo(
        table(
            ["", "published", "counted", "", "deviation"],
            [
                [
                    f"{row.paper}: {row.what}",
                    f"{row.published:g}",
                    f"{row.found:.3f}" if row.unit in ("T", "G") else f"{row.found:g}",
                    row.unit,
                    f"{row.deviation:+.3%}",
                ]
                for row in rows
            ],
        )
    )
    for row in rows:
        if row.note:
            click.echo(f"{row.paper}: {row.what}: {row.note}")
    click.echo(f"T: {CONVENTIONS['papers']}")
    click.echo(f"G: {CONVENTIONS['all']}")
    missed = sum(not row.reproduced for row in rows)
    click.echo(f"{len(rows) - missed} of {len(rows)} rows are within {WITHIN:.1%} of what is published")
