"""The form in which the configurations of diffusers' caches are written: its class and its arguments.

diffusers keeps them in Python only. What is no plain value has its name: `float32` of a dtype. Callbacks are left out.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dicache.formats.files import as_json, check_keys, read_json
from dicache.formats.format import FormatError


def written(kind: str, kwargs: Mapping[str, Any]) -> str:
    """Return the file of a configuration."""
    return as_json({"class": kind, "kwargs": dict(kwargs)})


def arguments(path: Path, kind: str, known: Collection[str]) -> Mapping[str, Any]:
    """Return the arguments in a file.

    Raises:
        FormatError: If it is of another class, or has others.
    """
    content = check_keys(str(path), read_json(path), ("class", "kwargs"), ("class", "kwargs"))
    if content["class"] != kind:
        raise FormatError(f"{path} is of diffusers' {content['class']}, needed {kind}")
    return check_keys(f"{path}: kwargs", content["kwargs"], known)
