"""Attach and detach a thousand times, sample two hundred times, and count the bytes that are held afterwards.

    python -m benchmarks.leaks

Python's own caches come to hold some kilobytes, however often it is done: what matters is bytes a time.
"""

import gc
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from dicache import Schedule, apply
from tests.runtime.test_leaks import KINDS, growth, schedule_of
from tests.tiny import dit, generate, pipeline_of

RESULTS = Path(__file__).parent / "results" / "leaks.txt"
CYCLES, GENERATIONS = 1000, 200


def main() -> None:
    """Count, and write what was found."""
    said = [f"{'':10}  {'':28}  objects  bytes of tensors  bytes of Python's, and a time"]
    for kind in KINDS:
        model, pipe, schedule = dit(), pipeline_of(dit), schedule_of(kind)
        said.append(line(kind, f"attached {CYCLES} times", partial(attach_and_detach, model, schedule), CYCLES))
        with apply(pipe, schedule):
            said.append(line(kind, f"{GENERATIONS} generations", partial(generate, pipe), GENERATIONS))
    RESULTS.write_text("\n".join(said) + "\n")
    sys.stdout.write("\n".join(said) + "\n")


def attach_and_detach(model: nn.Module, schedule: Schedule) -> None:
    """Attach a schedule to a model for no time."""
    apply(model, schedule).detach()


def line(kind: str, what: str, act: Callable[[], object], times: int) -> str:
    """Return what is held after so many times."""
    objects, tensors = growth(act, times)
    tracemalloc.start()
    act()
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(times // 5):
        act()
    gc.collect()
    more = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return f"{kind:10}  {what:28}  {objects:7}  {tensors:16}  {more:17} {more / (times // 5):10.1f}"


if __name__ == "__main__":
    main()
