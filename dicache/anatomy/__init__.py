"""What a model is made of: its blocks, sites, streams and segments, and at which step it stands."""

from typing import TYPE_CHECKING, Any

from dicache.anatomy.parts import Anatomy, AnatomyError, Block, Site

if TYPE_CHECKING:
    from dicache.anatomy.clock import StepClock
    from dicache.anatomy.surveying import survey

__all__ = ["Anatomy", "AnatomyError", "Block", "Site", "StepClock", "survey"]


def __getattr__(name: str) -> Any:
    # The parts are plain data; what looks at a model needs torch, and `dicache --help` must not wait for it.
    if name == "survey":
        from dicache.anatomy.surveying import survey

        return survey
    if name == "StepClock":
        from dicache.anatomy.clock import StepClock

        return StepClock
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
