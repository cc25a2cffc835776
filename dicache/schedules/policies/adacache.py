"""AdaCache's policy: how much a block's output has changed chooses how many steps it is held."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Literal, Self, get_args

from dicache.anatomy.parts import Anatomy
from dicache.schedules.plan import PlanError
from dicache.schedules.policies.policy import Memory, Policy

Residual = Literal["attn", "rest", "block"]
Codebook = tuple[tuple[float, int], ...]
LARGEST = 100  # power of ten that M may reach


@dataclass(frozen=True)
class Motion:
    """MoReg: what moves much from frame to frame is computed more often.

    Of the motion m of a computed step, M = (m / scale) ** power, and the distance is multiplied by
    M + |gradient * (M - M of the step computed before) / rate|. Outside of the given steps M is 1. The released code
    has steps 10 to 90 of 100, as here, and 4 to 26 of 30, where these shares are steps 3 to 27.

    Attributes:
        scale: The motion at which M is 1.
        power: How much more computation motion brings.
        gradient: Weight of the change of M.
        start: Share of the steps, the running one included, from which on motion counts.
        stop: Share of the steps up to which it does.

    References:
        AdaCache, arXiv 2411.02397, equations 4 to 6; AdaCache-DiT/AdaCache, whose scale and power are for Open-Sora.
    """

    scale: float = 0.385
    power: float = 8.0
    gradient: float = 10.0
    start: float = 0.1
    stop: float = 0.9

    def active(self, step: int, steps: int) -> bool:
        """Return whether motion counts in a step."""
        first, last = round(self.start * steps, 6), round(self.stop * steps, 6)  # 0.1 * 70 is above 7
        return first <= step + 1 <= last


@dataclass
class Rate(Memory):
    """What AdaCache remembers.

    Attributes:
        last: The step that was computed last; None if there is none.
        rate: Steps from that one to the next.
        gap: Steps from the one computed before to that one: the rate before, but where steps are always computed.
        motion: M of that one.
    """

    last: int | None = None
    rate: int = 1
    gap: int = 1
    motion: float = 1.0


@dataclass(frozen=True)
class AdaCachePolicy(Policy):
    """Hold what every block adds for as many steps as a codebook says, by how much one block's share changed.

    In a computed step the distance is |r_old - r_new| / |r_old| / rate in the 1-norm, over the whole batch, of what
    the decision block adds to the stream after its gates, averaged over the decision blocks and multiplied by a factor
    of motion. The first entry of the codebook whose limit is above it says in how many steps the next one is computed.
    The rate is 1 at first.

    One rate is shared by all branches of all blocks, so the kept outputs of a reused step add up to the kept delta of
    each segment of blocks: that is what is held, one tensor a stream and segment and not two a block, and no block
    runs.

    Attributes:
        codebook: Pairs of a limit, unitless and rising, and a rate in steps; the last limit is not looked at.
        decision_blocks: Indices of blocks.
        branch: What of them is measured: what the attention adds, what the `rest` behind it adds (cross-attention and
            MLP), or both, the `block`. The stream between the two is seen as it is rounded, so that in bfloat16 the
            distance has a floor of some hundredths where a block adds little to a large stream.
        motion: Of a video; None leaves motion out, as for images.

    References:
        AdaCache, arXiv 2411.02397, section 3; AdaCache-DiT/AdaCache.
    """

    codebook: Codebook
    decision_blocks: tuple[int, ...]
    branch: Residual = "attn"
    motion: Motion | None = None
    last_steps: int = field(default=2, kw_only=True)  # a large late rate would jump past the end
    name = "adacache"
    optional = frozenset({"motion"})

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = self.codebook
        if not pairs or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            raise self.error(f"the codebook must be pairs of a limit and a rate, at least one, found {pairs!r}")
        limits, rates = [limit for limit, _ in pairs], [rate for _, rate in pairs]
        self.check_finite("the limits of the codebook", tuple(limits))
        if limits[0] <= 0 or any(b <= a for a, b in pairwise(limits)):
            raise self.error(f"the limits of the codebook must be above 0 and rise, found {limits}")
        if not all(type(rate) is int and rate >= 1 for rate in rates):
            raise self.error(f"the rates of the codebook must be whole numbers of 1 or more steps, found {rates}")
        blocks = self.decision_blocks
        if not blocks or not all(type(block) is int and block >= 0 for block in blocks):
            raise self.error(f"decision_blocks must be indices of blocks, at least one, found {list(blocks)}")
        if list(blocks) != sorted(set(blocks)):
            raise self.error(f"decision_blocks must rise, found {list(blocks)}")
        if self.branch not in get_args(Residual):
            raise self.error(f"branch must be one of {', '.join(get_args(Residual))}, found {self.branch!r}")
        if self.motion is not None:
            self._check_motion(self.motion)

    def _check_motion(self, motion: Motion) -> None:
        self.check_finite("what motion is set to", tuple(vars(motion).values()))
        if motion.scale <= 0 or motion.power < 0 or motion.gradient < 0:
            raise self.error(
                "motion needs a scale above 0 and a power and a gradient of 0 or more, "
                f"found {motion.scale}, {motion.power} and {motion.gradient}"
            )
        if -motion.power * math.log10(motion.scale) > LARGEST:  # m is at most 1
            raise self.error(f"motion may not be raised to {motion.power} with a scale of {motion.scale}: it overflows")
        if not 0 <= motion.start <= motion.stop <= 1:
            raise self.error(f"motion counts between two shares of the steps, found {motion.start} and {motion.stop}")

    @property
    def limit(self) -> str:
        return "codebook " + ",".join(f"{limit:.3g}:{rate}" for limit, rate in self.codebook)

    def remember(self) -> Rate:
        return Rate()

    def due(self, step: int, steps: int, memory: Rate) -> bool:
        """Return whether to compute a step."""
        if memory.last is None or self.forced(step, steps):
            return True
        return step >= memory.last + memory.rate

    def decide(self, step: int, steps: int, x: float | None, memory: Rate) -> bool:
        """Return whether to compute this step, before any of it runs; nothing is measured for that."""
        memory.distance = None
        compute = self.due(step, steps, memory)
        if compute:
            memory.gap = 1 if memory.last is None else step - memory.last
            memory.last = step
        return compute

    def watches(self, step: int, steps: int) -> bool:
        """Return whether what a computed step measures can matter to a later one."""
        return step + 1 < steps - self.last_steps

    def observe(self, step: int, steps: int, changes: Sequence[float], motion: float | None, memory: Rate) -> None:
        """Choose the rate by what a computed step measured.

        Args:
            step: Index of the step, which has been computed.
            steps: Number of steps of the generation.
            changes: |r_old - r_new| / |r_old| of each decision block.
            motion: m of the last decision block, if motion counts.
            memory: Of the guidance pass.
        """
        distance = sum(changes) / len(changes) / memory.gap
        if self.motion is not None and motion is not None:
            now = (motion / self.motion.scale) ** self.motion.power if self.motion.active(step, steps) else 1.0
            distance *= now + abs(self.motion.gradient * (now - memory.motion) / memory.gap)
            memory.motion = now
        memory.distance = distance
        if math.isnan(distance):  # not even the last entry is for that
            memory.rate, memory.motion = 1, 1.0
            return
        *entries, (_, slowest) = self.codebook
        memory.rate = next((rate for limit, rate in entries if distance < limit), slowest)

    def skipped(self, anatomy: Anatomy) -> tuple[int, int]:
        count = len(anatomy.blocks)
        for index in self.decision_blocks:
            if index >= count:
                raise self.error(f"there is no block {index} to decide by; {anatomy.model} has 0 to {count - 1}")
            if not anatomy.blocks[index].main_stream:
                streams = ", ".join(anatomy.blocks[index].streams)
                raise self.error(
                    f"block {index} of this {anatomy.model} has the streams {streams}, and which goes on with the "
                    "latents is not known; take another decision block or another method"
                )
            if self.branch != "block" and not anatomy.blocks[index].middle:
                raise self.error(
                    f"what the {self.branch} of block {index} adds cannot be seen, since no module of it is given the "
                    f"stream between its branches; needed the branch `block`, or another decision block"
                )
        return 0, count

    def macs_saved(self, anatomy: Anatomy) -> int:
        """Return the multiply-accumulates of all blocks: of a skipped step none runs."""
        return sum(block.macs for block in anatomy.blocks)

    def to_json(self) -> dict[str, Any]:
        content = super().to_json()
        content["codebook"] = [list(pair) for pair in self.codebook]
        del content["motion"]
        return content if self.motion is None else {**content, "motion": asdict(self.motion)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        given, pairs, motion = dict(content), content.get("codebook"), content.get("motion")
        if isinstance(pairs, list):
            given["codebook"] = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in pairs)
        if "motion" in given:
            keys = set(Motion.__dataclass_fields__)
            if not isinstance(motion, Mapping) or set(motion) != keys:
                raise PlanError(
                    f"policy adacache: motion must be an object with {', '.join(sorted(keys))}, found {motion!r}"
                )
            given["motion"] = Motion(**motion)
        return super().from_json(given)
