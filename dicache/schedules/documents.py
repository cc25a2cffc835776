"""JSON from strangers: what may be in it is limited before memory is taken for it."""

import json
import math
import re
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20  # of a file; one with a rule for each of 1,000 sites and weights for 100 steps has 4 MB
MAX_DEPTH = 32  # of objects and lists in one another; a schedule's own go down to 7
MAX_DIGITS = 18  # of a whole number, so that it fits into 64 bits
NO_TEXT = re.compile(
    r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]"
)  # what a terminal obeys, and halves of pairs
MAX_MESSAGE = 600  # characters of an error, which may quote what it found


class DocumentError(ValueError):
    """A text is JSON, but no such as is read from a file."""


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        DocumentError: If it is longer than any that is read.
        OSError: If there is no such file, or it cannot be read.
        UnicodeDecodeError: If it is not UTF-8.
    """
    with path.open("rb") as file:  # a pipe too, whose size is not known before
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise DocumentError(f"found more than {MAX_BYTES // 2**20} MB, which no such file has")
    return data.decode("utf-8")


def parse(text: str, *, finite: bool = True) -> Any:
    """Return what JSON says.

    Args:
        text: The document.
        finite: Whether to refuse infinities and NaN, which a sampler's configuration may have.

    Raises:
        DocumentError: If a number is not finite or has too many digits, a string holds what is not text, or it is
            nested too deeply.
        json.JSONDecodeError: If it is not JSON.
    """
    try:
        numbers = _finite if finite else float
        content = json.loads(text, parse_constant=numbers, parse_float=numbers, parse_int=_whole)
    except RecursionError:
        raise DocumentError(f"objects and lists are nested more than {MAX_DEPTH} deep") from None
    level = [content]
    for _ in range(MAX_DEPTH):
        if not (level := [inner for value in level for inner in _inside(value)]):
            return content
    raise DocumentError(f"objects and lists are nested more than {MAX_DEPTH} deep")


def wrong_format(found: Any, needed: str, by: Any) -> str:
    """Say why a file of another format is not read, and what to do.

    Args:
        found: The format that it says, as `dicache.schedule/2`.
        needed: The format that is read.
        by: The version of dicache that it says it was written by, which later formats do.
    """
    kind, _, number = needed.partition("/")
    match = re.fullmatch(rf"{re.escape(kind)}/(\d{{1,9}})", found) if isinstance(found, str) else None
    if match is None or int(match[1]) <= int(number):
        return f"found format {found!r}, needed {needed!r}"
    known = isinstance(by, str) and re.fullmatch(r"\d{1,9}(\.\d{1,9}){0,3}", by)
    newer = f"'dicache>={by}'" if known else "--upgrade dicache"
    return f"found format {found!r}, which is newer than {needed!r}: `pip install {newer}`"


def shortened(error: Exception) -> str:
    """Return what an error says, without the most of what it quotes from a large file."""
    said = str(error)
    half = MAX_MESSAGE // 2
    return said if len(said) <= MAX_MESSAGE else f"{said[:half]} ... {said[-half:]}"


def _inside(value: Any) -> list[Any]:
    """Return the values in an object or a list; look at a string."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list):
        return value
    if isinstance(value, str) and (wrong := NO_TEXT.search(value)):
        raise DocumentError(f"found a string with the character {wrong[0]!a}, which is not text")
    return []


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise DocumentError(f"found {text[:40]}, needed a finite number")
    return value


def _whole(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise DocumentError(f"found a whole number of {len(text)} digits, needed at most {MAX_DIGITS}")
    return int(text)
