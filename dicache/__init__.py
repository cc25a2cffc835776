"""Measure a diffusion transformer once, decide which computations can be reused, and replay that at inference."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dicache.runtime import Cache, CacheError, CacheWarning, apply
    from dicache.schedules import Schedule, ScheduleError

__version__ = "0.1.0"
__all__ = ["Cache", "CacheError", "CacheWarning", "Schedule", "ScheduleError", "apply"]


def __getattr__(name: str) -> Any:
    # torch takes a second to import, and `dicache --help` does not need it.
    if name in ("Cache", "CacheError", "CacheWarning", "apply"):
        import dicache.runtime

        return getattr(dicache.runtime, name)
    if name in ("Schedule", "ScheduleError"):
        import dicache.schedules

        return getattr(dicache.schedules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
