"""The published JSON Schema of the schedule file."""

from importlib.resources import files


def schema_text() -> str:
    """Return the JSON Schema (draft 2020-12) of format `dicache.schedule/1`, for editors and other programs.

    The reader checks a file by itself, and more than a schema can say.
    """
    return files("dicache.schedules").joinpath("schedule-1.schema.json").read_text(encoding="utf-8")
