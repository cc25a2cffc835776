"""Faster Diffusion: skip the first blocks at most steps, and go on from the feature map that they last made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dicache.anatomy import Anatomy
from dicache.calibrate.delta_cache import check_interval, checked_span, interval_letters
from dicache.calibrate.methods import Axis, method
from dicache.calibrate.spaces import PlanSpace
from dicache.schedules import Plan, Rule


@method("faster-diffusion")
@dataclass(frozen=True)
class FasterDiffusion:
    """Compute everything every `interval` steps; in between, the output of the first blocks is held in their place.

    The blocks' output itself is held, not what they added, so that nothing of the new latents enters the blocks behind
    them: the baseline that Delta-DiT is compared with, in which Faster Diffusion's encoder is the first blocks.

    Attributes:
        interval: Steps from one full computation to the next; 1 computes everything. Steps that are left over at the
            end, less than an interval, are computed.
        blocks: How many of the first blocks are skipped; half of them when left out, as in the paper's table.

    References:
        Faster Diffusion, arXiv 2312.09608; as a baseline in Delta-DiT, arXiv 2406.01125, table 1.
    """

    interval: int = 2
    blocks: int | None = None

    def __post_init__(self) -> None:
        check_interval("faster-diffusion", self.interval)

    def plan(self, anatomy: Anatomy, steps: int) -> Plan:
        letters = interval_letters("faster-diffusion", self.interval, steps)
        many = self.blocks_of(anatomy)
        blocks = checked_span("faster-diffusion", anatomy, 0, many, delta=False)
        if "." not in letters:
            return Plan(steps)
        return Plan(steps, (Rule("skip", letters, blocks=blocks, predictor="feature"),))

    def blocks_of(self, anatomy: Anatomy) -> int:
        return max(1, len(anatomy.blocks) // 2) if self.blocks is None else self.blocks


@dataclass(frozen=True)
class FasterDiffusionSpace(PlanSpace):
    """The interval, and how many of the first blocks are skipped."""

    saving = ("interval", "blocks")

    def free(self) -> Mapping[str, Axis]:
        return {"interval": self.intervals, "blocks": range(1, len(self.anatomy.blocks) + 1)}

    def usual(self) -> Mapping[str, Any]:
        return {**super().usual(), "blocks": self.settings.blocks_of(self.anatomy)}
