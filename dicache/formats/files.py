"""Foreign files: read with a limit to their size, without running anything in them, and checked key by key."""

import json
import math
import reprlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dicache.formats.format import FormatError
from dicache.schedules.documents import DocumentError, parse
from dicache.schedules.schedule import dump

LARGEST = 4 << 20  # bytes; the largest published file, a mask for each branch of 70 steps, has 30 kB
MOST_STEPS = 10_000  # a thousand are the most that models are trained with


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        FormatError: If it is missing, too large, or not text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist; needed a file to import") from None
    except IsADirectoryError:
        raise FormatError(f"{path} is a folder; needed a file to import") from None
    if len(data) > LARGEST:
        raise FormatError(f"{path} is larger than {LARGEST >> 20} MiB, which no file of this kind is; is it another?")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{path} is not text; is it of another format?") from None


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        FormatError: If it is not JSON, or more than `dicache.schedules.documents` lets in.
    """
    try:
        return parse(read_text(path))
    except (json.JSONDecodeError, DocumentError) as error:
        raise FormatError(f"{path} is not JSON that is read ({error}); is it of another format?") from None


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds: plain values only, nothing is built or run.

    Raises:
        FormatError: If it is not YAML, or holds anything but plain values.
    """
    try:
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        said = " ".join(str(error).split())
        raise FormatError(f"{path} is not plain YAML ({said}); is it of another format?") from None


def check_keys(what: str, content: Any, known: Collection[str], needed: Collection[str] = ()) -> Mapping[str, Any]:
    """Return an object that has no unknown key, and those that are needed.

    Raises:
        FormatError: If it is none.
    """
    if not isinstance(content, Mapping):
        raise FormatError(f"{what} must be an object, found {short(content)}")
    if unknown := [key for key in content if key not in known]:
        raise FormatError(f"{what}: unknown key {unknown[0]!r}; the keys are {', '.join(known)}")
    if missing := [key for key in needed if key not in content]:
        raise FormatError(f"{what}: no {missing[0]}; needed {', '.join(needed)}")
    return content


def mask(what: str, content: Any, steps: int | None = None) -> str:
    """Return a list of 0 and 1 as letters, `C` for 1, which is computed, and `.` for 0.

    Raises:
        FormatError: If it is no such list, is of another number of steps, or does not compute the first step.
    """
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        raise FormatError(f"{what} must be a list of 0 and 1, a number a step, found {short(content)}")
    if len(content) > MOST_STEPS:
        raise FormatError(f"{what} has {len(content)} numbers; more than {MOST_STEPS} steps are not sensible")
    if wrong := [value for value in content if type(value) is not int or value not in (0, 1)]:
        raise FormatError(f"{what} must hold 0 and 1 only, found {short(wrong[0])}")
    if steps is not None and len(content) != steps:
        raise FormatError(
            f"{what} is for {len(content)} steps, but {steps} are asked for; import with --steps of its own"
        )
    if not content[0]:
        raise FormatError(f"{what} does not compute the first step, where nothing is kept yet; is 1 computed in it?")
    return "".join("C" if value else "." for value in content)


def number(what: str, value: Any, *, least: float = -math.inf) -> float:
    """Return a finite number.

    Raises:
        FormatError: If it is none, or less than `least`.
    """
    if type(value) not in (int, float) or not math.isfinite(value) or value < least:
        bound = "" if least == -math.inf else f" of {least:g} or more"
        raise FormatError(f"{what} must be a number{bound}, found {short(value)}")
    return float(value)


def whole(what: str, value: Any, *, least: int) -> int:
    """Return a whole number.

    Raises:
        FormatError: If it is none, or less than `least`.
    """
    if type(value) is not int or value < least:
        raise FormatError(f"{what} must be a whole number of {least} or more, found {short(value)}")
    return value


def numbers(what: str, content: Any) -> list[float]:
    """Return a list of finite numbers, one or more.

    Raises:
        FormatError: If it is none.
    """
    if not isinstance(content, list) or not 1 <= len(content) <= 2 * MOST_STEPS:
        raise FormatError(f"{what} must be a list of numbers, found {short(content)}")
    return [number(f"{what}: each", value) for value in content]


def as_json(content: Any) -> str:
    """Write JSON with lists of plain values in one line."""
    return dump(content) + "\n"


def short(value: Any) -> str:
    """Return what stands for a value in a message; of one that repeats itself inside (YAML's aliases) only a little."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
