"""What a model is made of: its blocks, sites, streams and segments, and at which step it stands."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dicache.anatomy.parts import Anatomy, AnatomyError, Block, Site

if TYPE_CHECKING:
    from dicache.anatomy.clock import StepClock
    from dicache.anatomy.describing import describe
    from dicache.anatomy.inputs import Inputs
    from dicache.anatomy.surveying import survey

__all__ = ["Anatomy", "AnatomyError", "Block", "Inputs", "Site", "StepClock", "describe", "survey"]
HOMES = {"survey": "surveying", "describe": "describing", "Inputs": "inputs", "StepClock": "clock"}


def __getattr__(name: str) -> Any:
    # The parts are plain data; what looks at a model needs torch, and `dicache --help` must not wait for it.
    if name in HOMES:
        return getattr(import_module(f"dicache.anatomy.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
