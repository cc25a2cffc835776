"""Examine a model by all laws, and a pipeline with it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dicache.anatomy import Anatomy, StepClock
from dicache.conformance.laws import LAWS, LawError
from dicache.conformance.subject import Subject
from dicache.runtime.apply import apply
from dicache.schedules import Plan, Rule, Schedule, Target


@dataclass(frozen=True)
class Verdict:
    """What came of a law.

    Attributes:
        law: Its name.
        says: It in words.
        cases: How many were tried; none where it does not concern the model.
        seconds: That it took.
        broken: What was found instead; empty if it holds.
    """

    law: str
    says: str
    cases: int
    seconds: float
    broken: str = ""


def examine(subject: Subject) -> Iterator[Verdict]:
    """Yield what comes of each law of the runtime, one after the other."""
    for name, law in LAWS.items():
        yield _verdict(name, law.__doc__ or "", lambda law=law: law(subject))  # type: ignore[misc] # bound by its default


def examine_pipeline(
    pipeline: Any, anatomy: Anatomy, run: Callable[[], Any], component: str | None = None
) -> tuple[Verdict, dict[str, str]]:
    """Return what comes of the laws for a pipeline, and the guidance passes that it makes, with a letter a step.

    Args:
        pipeline: With a scheduler that tells the steps.
        anatomy: Of its model.
        run: Makes a picture with it, from the same noise each time.
        component: Name of the model, where the pipeline has two.
    """
    passes: dict[str, str] = {}

    def law() -> int:
        steps = 0

        def began(scheduler: Any) -> None:
            nonlocal steps
            steps = len(scheduler.timesteps)

        clock = StepClock(pipeline.scheduler, began, lambda: None)
        try:
            want = np.asarray(run())
        finally:
            clock.detach()
        if not np.array_equal(np.asarray(run()), want):
            raise LawError("without a schedule the pipeline gives another picture each time; nothing can be compared")
        with apply(pipeline, _schedule(anatomy, "C" * steps), component=component) as cache:
            if not np.array_equal(np.asarray(run()), want):
                raise LawError("with everything computed the picture is another")
        passes.update(cache.stats.steps)
        reusing = _schedule(anatomy, ("C." * steps)[:steps])
        with apply(pipeline, reusing, component=component) as cache:
            got = [np.asarray(run()) for _ in range(2)]
            if steps > 1 and not cache.stats.reused_sites:
                raise LawError("nothing was reused where every second step was to be")
        if not np.array_equal(got[0], got[1]):
            raise LawError("with every second step reused a second generation gives another picture than the first")
        if not np.array_equal(np.asarray(run()), want):
            raise LawError("after detaching the picture is another")
        return 5

    says = "a pipeline's picture is the same with everything computed; a second one is the first one again"
    return _verdict("pipeline", says, law), passes


def _schedule(anatomy: Anatomy, letters: str) -> Schedule:
    return Schedule("conformance", {}, anatomy, Target(), len(letters), Plan(len(letters), (Rule("reuse", letters),)))


def _verdict(name: str, says: str, law: Callable[[], int]) -> Verdict:
    start, cases, broken = time.perf_counter(), 0, ""
    try:
        cases = law()
    except LawError as error:
        broken = str(error)
    except Exception as error:  # of the model itself, when something is reused or skipped in it
        broken = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Verdict(name, says, cases, time.perf_counter() - start, broken)
