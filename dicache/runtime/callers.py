"""Who runs the sampling loop, found on the stack, and with which guidance."""

import sys
from collections.abc import Collection
from types import FrameType
from typing import Any


def loop_frame() -> FrameType | None:
    """Return the frame, nearest to the caller's, of a method of an object that has a scheduler: of a pipeline's call.

    None if there is none, as where a function runs the loop.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _scheduler_of(frame) is None:
        frame = frame.f_back
    return frame


def loop_scheduler() -> Any:
    """Return the scheduler of what runs the loop, None if a function does."""
    frame = loop_frame()
    return None if frame is None else _scheduler_of(frame)


def _scheduler_of(frame: FrameType) -> Any:
    # Asked for at each call of the model, so what is cheap comes first: the locals of a frame are copied to be read.
    if str(frame.f_globals.get("__name__")).startswith(("dicache.", "torch.")):
        return None
    names = frame.f_code.co_varnames
    if not names or names[0] != "self":
        return None
    return getattr(frame.f_locals.get("self"), "__dict__", {}).get("scheduler")


def guidance_scale(second: bool = False) -> float | None:
    """Return the guidance that the pipeline whose call is running was given, None if it cannot be seen.

    Args:
        second: Whether the model is the second of two that take turns, and may have a scale of its own.
    """
    frame = loop_frame()
    owner = None if frame is None else frame.f_locals["self"]
    while frame is not None:
        given = frame.f_locals
        name = guidance_name(given, owner)
        if name in given and given.get("self") is owner:
            scale = given.get("guidance_scale_2") if second else None
            scale = given[name] if scale is None else scale
            return float(scale) if isinstance(scale, (int, float)) else None
        frame = frame.f_back
    return None


def guidance_name(parameters: Collection[str], pipeline: Any) -> str:
    """Return what a pipeline calls the scale of guidance that takes a second pass a step, if the model has it.

    Models whose guidance was distilled into them read the scale as an input, with one pass, and some of their pipelines
    have a `true_cfg_scale` besides; without an input for it, that one is the guidance.

    Args:
        parameters: Names of the arguments of the pipeline's call.
        pipeline: The pipeline.
    """
    distilled = is_distilled(getattr(pipeline, "transformer", None))
    return "true_cfg_scale" if "true_cfg_scale" in parameters and not distilled else "guidance_scale"


def is_distilled(model: Any) -> bool:
    """Whether a model takes the scale of guidance as an input, and needs no second pass for it."""
    return bool(getattr(model, "config", {}).get("guidance_embeds"))
