"""What all commands share: `--debug`, `--json`, errors as one line, numbers in columns, colours on a terminal."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click
from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])
INTERVAL = "95 %"  # heads a column that stays with the one before it
GAP = "  "  # between columns


class Command(click.Command):
    """A command that tells an error in one line and exits with 1, unless it is asked for the traceback.

    Args:
        interrupted: What is told at Ctrl-C: what is kept, and how to go on.
    """

    def __init__(self, *args: Any, interrupted: str = "the same command starts again", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.interrupted = interrupted
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."))

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.pop("debug")
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            raise click.ClickException(f"interrupted; {self.interrupted}") from None
        except Exception as error:
            if debug:
                raise
            message = " ".join(str(error).split()) or type(error).__name__
            expected = type(error).__module__.startswith("dicache.") or isinstance(error, OSError)
            raise click.ClickException(message if expected else f"{type(error).__name__}: {message}") from None


class Group(click.Group):
    """A group whose commands are of this kind, in the order in which they were added."""

    command_class = Command
    group_class = type

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


if TYPE_CHECKING:
    Kind = click.ParamType
else:

    class Kind(click.ParamType):
        """What an option's text is read as; click's own class names no result before version 8.4."""

        def __class_getitem__(cls, result: Any) -> Any:
            return cls


class Bytes(Kind[int]):
    """A number of bytes: `8GB`, `500 MB`, `1.5e9`."""

    name = "size"
    units: ClassVar = {
        "": 1,
        "B": 1,
        "K": 1e3,
        "KB": 1e3,
        "M": 1e6,
        "MB": 1e6,
        "G": 1e9,
        "GB": 1e9,
        "T": 1e12,
        "TB": 1e12,
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([KMGT]?)B?\s*", str(value), re.IGNORECASE | re.ASCII)
        if match is None:
            self.fail(f"{value!r} is not a size in bytes; write it like 8GB", param, ctx)
        return int(float(match[1]) * self.units[match[2].upper()])


class Numbers(Kind[tuple[int, ...]]):
    """Whole numbers from `least` on, separated by commas: `1,8`."""

    name = "numbers"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = str(value).split(",")
        numbers = tuple(int(part) for part in parts if re.fullmatch(r"\s*\d+\s*", part, re.ASCII))
        if len(numbers) < len(parts) or min(numbers) < self.least:
            self.fail(f"{value!r} is not a list of numbers from {self.least} on; write it like 1,8", param, ctx)
        return numbers


def json_option(function: F) -> F:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")(function)


def model_option(*, required: bool = True) -> Callable[[F], F]:
    """Add `--model`."""
    text = "A bundled model, a short name (see `dicache models`), a hub id, or a folder in diffusers' format."
    return click.option("--model", required=required, help=text, shell_complete=_known_models)


def _known_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete bundled models and short names, else files."""
    from dicache.models.names import HUB
    from dicache.models.zoo import NAMES

    known = [CompletionItem(name) for name in (*NAMES, *HUB) if name.startswith(incomplete)]
    return known or [CompletionItem(incomplete, type="file")]


def show_json(content: Any) -> None:
    """Print one JSON object."""
    click.echo(json.dumps(content, indent=2, allow_nan=False))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Return rows in columns: the first to the left, the others to the right.

    Args:
        header: Of each column.
        rows: A cell a column.
        width: Columns of the page. Where it does not suffice, the table goes on below, with its first column again;
            None lets it be as wide as it is.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str], places: Sequence[int]) -> str:
        cells = [row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in places]
        return GAP.join(cells).rstrip()

    parts = []
    for some in _pages(header, widths, width):
        places = [0, *some]
        rule = ["-" * w for w in widths]
        parts.append("\n".join(line(row, places) for row in (header, rule, *rows)))
    return "\n\n".join(parts)


def _pages(header: Sequence[str], widths: Sequence[int], width: int | None) -> list[list[int]]:
    """Return the columns behind the first, page by page; an interval stays with what it is of."""
    groups: list[list[int]] = []
    for place in range(1, len(header)):
        if header[place] == INTERVAL and groups:
            groups[-1].append(place)
        else:
            groups.append([place])
    pages: list[list[int]] = [[]]
    for group in groups:
        wanted = widths[0] + sum(len(GAP) + widths[place] for place in (*pages[-1], *group))
        if width is not None and wanted > width and pages[-1]:
            pages.append([])
        pages[-1] += group
    return pages


def page_width() -> int:
    """Return the columns of the terminal, 80 where there is none."""
    return shutil.get_terminal_size().columns


def painted(text: str, **style: Any) -> str:
    """Return text in a colour, as `click.style` takes it; `click.echo` leaves it out where there is no terminal."""
    return text if os.environ.get("NO_COLOR") else click.style(text, **style)
