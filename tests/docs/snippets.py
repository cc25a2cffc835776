"""The commands and examples of the README and of docs/, run as they stand there.

A page's blocks of `console` and `python` run one after the other, in one empty folder and with one set of names. What a
page takes for granted, such as a profile, is made by a block that its readers do not see, inside an HTML comment.
A block that cannot run here has the reason in a comment on the line before it, `<!-- not run: needs a GPU -->`; it is
parsed. The lines below a command are its output: they must come in it, in this order, whatever their numbers are.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

from dicache.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^>]+) -->\n)?(?P<mark>```+)(?P<language>\S*)\n(?P<text>.*?)^(?P=mark)$", re.M | re.S
)
LANGUAGES = ("console", "python", "json", "text", "")  # and Sphinx's directives, {in braces}


_MADE: dict[str, tuple[str, dict[Path, bytes]]] = {}  # command line -> what it printed, and the files that it wrote


class SnippetError(AssertionError):
    """A snippet does not do what its page says."""


@dataclass(frozen=True)
class Snippet:
    """A block of a page.

    Attributes:
        where: Page and line, as editors take it.
        language: Of the block.
        text: Between the fences.
        reason: Why it is not run; empty if it is.
    """

    where: str
    language: str
    text: str
    reason: str = ""


@dataclass(frozen=True)
class Command:
    """A command line, and what is shown below it."""

    line: str
    output: tuple[str, ...]


def snippets(page: Path) -> list[Snippet]:
    """Return the blocks of a page in their order, the hidden ones too."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        where = f"{page.relative_to(ROOT)}:{line}"
        found.append(Snippet(where, match["language"], match["text"], match["reason"] or ""))
    return found


def commands(text: str) -> list[Command]:
    """Return the commands of a console block: lines that begin with `$`, and those that a backslash continues."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif not found:
            raise SnippetError(f"a console block begins with `$ ` and a command, found {line!r}")
        elif found[-1][0].endswith("\\"):
            found[-1] = (found[-1][0].removesuffix("\\") + line.strip(), [])
        elif line.strip():
            found[-1][1].append(line)
    return [Command(line, tuple(output)) for line, output in found]


def run(snippet: Snippet, names: dict[str, Any]) -> None:
    """Run a block in the working folder, or, where its page says that it cannot run, parse it.

    Args:
        snippet: The block.
        names: Of the page's Python blocks so far.
    """
    if snippet.language == "python":
        page, _, line = snippet.where.rpartition(":")
        code = compile("\n" * (int(line) - 1) + snippet.text, page, "exec")
        if not snippet.reason:
            exec(code, names)
    elif snippet.language == "console":
        for command in commands(snippet.text):
            if not snippet.reason:
                _compare(command.output, _output(command.line))
            elif command.line.startswith("dicache "):
                parse(shlex.split(command.line, comments=True)[1:])


def parse(words: Sequence[str]) -> None:
    """Read a command's options and arguments, and do nothing.

    Raises:
        SnippetError: If there is no such command, or it does not take these words.
    """
    command, rest = _command_of(words)
    try:
        command.make_context(command.name, list(rest))
    except click.ClickException as error:
        raise SnippetError(f"`dicache {' '.join(words)}`: {error.format_message()}") from None


def spans(page: Path) -> list[list[str]]:
    """Return the words of each `dicache ...` that stands in the running text of a page."""
    text = FENCE.sub("", page.read_text())
    return [span.split()[1:] for span in re.findall(r"`(dicache\s[a-z][^`]*)`", text)]


def check_names(words: Sequence[str]) -> None:
    """Check that a command that is spoken of is there, and has the options that are named.

    Raises:
        SnippetError: If not.
    """
    command, rest = _command_of(words)
    if isinstance(command, click.Group) or command.context_settings.get("ignore_unknown_options"):
        return  # spoken of in general; or with options of a method, which only it knows
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    if unknown := [word for word in rest if word.startswith("-") and word not in known]:
        raise SnippetError(f"`dicache {' '.join(words)}`: {command.name} has no option {unknown[0]}")


def _command_of(words: Sequence[str]) -> tuple[click.Command, Sequence[str]]:
    """Return the command that some words begin with, and the words behind it."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and re.fullmatch("[a-z][a-z0-9-]*", words[0]):
        if words[0] not in command.commands:
            raise SnippetError(f"{command.name} has no command {words[0]!r}; it has {', '.join(command.commands)}")
        command, words = command.commands[words[0]], words[1:]
    return command, words


def _output(line: str) -> str:
    """Run a command line, and return what it prints; what depends on nothing but a bundled model is made once."""
    if not re.match("dicache (profile|calibrate fora) --model digits ", line):
        return _run(line)
    if line not in _MADE:
        before = set(Path().rglob("*"))
        printed = _run(line)
        _MADE[line] = printed, {p: p.read_bytes() for p in set(Path().rglob("*")) - before if p.is_file()}
    printed, files = _MADE[line]
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return printed


def _run(line: str) -> str:
    line, _, target = line.partition(" > ")
    words = shlex.split(line, comments=True)
    if words[0] != "dicache":
        raise SnippetError(f"only dicache's own commands are run; say why this one is not: {line}")
    result = CliRunner().invoke(main, words[1:])
    if result.exit_code:
        raise SnippetError(f"{line}: {result.output}") from result.exception
    if target:
        Path(target.strip()).write_text(result.stdout)
    return result.stdout + result.stderr  # not as they came: progress would stand in the midst of lines


def _compare(shown: tuple[str, ...], printed: str) -> None:
    """Check that the lines that a page shows come in what was printed, in this order.

    Raises:
        SnippetError: If one does not.
    """
    lines = iter(printed.splitlines())
    for want in shown:
        if want.strip() != "..." and not any(_masked(line) == _masked(want) for line in lines):
            raise SnippetError(f"nothing like {want!r} was printed:\n{printed}")


def _masked(line: str) -> str:
    """Return a line without its numbers, rulers and spaces, which may differ from one machine to another."""
    return re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?|--+|[C.]{4,}|\s", "", line)
