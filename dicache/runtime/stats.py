"""What a cache did."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Stats:
    """Planned and achieved work of an attached schedule, over all its generations so far.

    Attributes:
        planned_macs_fraction: Share of the model's multiply-accumulates that the schedule means to compute; where it
            lets guidance collapse, with guidance.
        generations: Generations begun.
        calls: Calls of the model inside a generation.
        computed_sites: Branches that ran.
        reused_sites: Branches whose kept output was given instead.
        skipped_sites: Branches inside a range of blocks that was replaced by its delta.
        collapsed_passes: Guidance passes that were not computed, because another stood for them.
        macs: Multiply-accumulates done, in units of one call's.
        planned_steps: A letter a step: what the schedule means to compute, C, or to skip in part, `.`; empty if it
            cannot foresee that.
        steps: For each guidance pass of the latest generation, a letter a step: C all computed, `.` not all.
        distances: For each guidance pass of the latest generation in which a policy compared something with its limit,
            what that was at each step: for TeaCache the sum. None where it decided without.
        bytes_held: Of the kept tensors at the end of the latest call.
        peak_bytes_held: The largest of those.
        bytes_of_corrections: Of the schedule's own tensors on the model's device, which stay there.
    """

    planned_macs_fraction: float = 1.0
    generations: int = 0
    calls: int = 0
    computed_sites: int = 0
    reused_sites: int = 0
    skipped_sites: int = 0
    collapsed_passes: int = 0
    macs: float = 0.0
    planned_steps: str = ""
    steps: dict[str, str] = field(default_factory=dict)
    distances: dict[str, list[float | None]] = field(default_factory=dict)
    bytes_held: int = 0
    peak_bytes_held: int = 0
    bytes_of_corrections: int = 0

    @property
    def macs_fraction(self) -> float:
        """Share of the model's multiply-accumulates that was computed, 1 before the first call."""
        return self.macs / self.calls if self.calls else 1.0

    def held(self, count: int) -> None:
        self.bytes_held = count
        self.peak_bytes_held = max(self.peak_bytes_held, count)


def bytes_of(kept: Any) -> int:
    """Return the memory that nested tensors keep alive; views of one storage count once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            if type(value) is not Tensor:
                value = _held_here(value)
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for part in value.values():
                visit(part)
        elif isinstance(value, (tuple, list)):
            for part in value:
                visit(part)

    visit(kept)
    return sum(storages.values())


def _held_here(value: Any) -> Any:
    """Return what this process holds of a tensor that is in shards, or on its way from other processes."""
    if hasattr(value, "to_local"):
        value = value.to_local()
    return value.wait() if hasattr(value, "wait") else value
