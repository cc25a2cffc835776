"""FirstBlockCache's and DBCache's policy."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from dicache.anatomy.parts import Anatomy, span
from dicache.schedules.policies.policy import Memory, Policy

AtThreshold = Literal["compute", "reuse"]


@dataclass
class Skips(Memory):
    """How often was skipped.

    Attributes:
        in_a_row: Since the last step that was computed.
        in_all: In this generation.
    """

    in_a_row: int = 0
    in_all: int = 0


@dataclass(frozen=True)
class FirstBlockPolicy(Policy):
    """Compute the first blocks, and skip what is behind them while they change the latents' stream as they last did.

    With h = what leaves the first blocks minus what entered them, the distance is mean |h_kept - h| / mean |h_kept|,
    where h_kept is from the last step that was computed, so that drift counts from there and is not added up. Below
    the threshold the blocks behind them, but for the last, are skipped and their last delta is added.

    Attributes:
        threshold: Unitless; 0 computes everything.
        first: How many blocks at the start always run.
        last: How many blocks at the end always run.
        max_continuous: How many steps at most are skipped in a row; None sets no limit.
        max_cached: How many steps at most a guidance pass skips in a generation, counted anew if it was left out of a
            step; None sets no limit.
        at_threshold: What a distance does that is equal to the threshold: `compute`, as in ParaAttention and cache-dit,
            or `reuse`, as in diffusers.

    References:
        FirstBlockCache of ParaAttention (chengzeyi/ParaAttention) and of diffusers; DBCache of cache-dit
        (vipshop/cache-dit), whose max_continuous_cached_steps, max_cached_steps and max_warmup_steps, here
        `first_steps`, mean the same.
    """

    threshold: float
    first: int = 1
    last: int = 0
    max_continuous: int | None = None
    max_cached: int | None = None
    at_threshold: AtThreshold = "compute"
    last_steps: int = field(default=0, kw_only=True)
    name: ClassVar[str] = "first-block"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_finite("threshold", (self.threshold,))
        if self.threshold < 0:
            raise self.error(f"the threshold must be 0 or more, found {self.threshold}")
        for name, least in (("first", 1), ("last", 0), ("max_continuous", 1), ("max_cached", 0)):
            value = getattr(self, name)
            if name.startswith("max_") and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise self.error(f"{name} must be a whole number of {least} or more, found {value!r}")
        if self.at_threshold not in get_args(AtThreshold):
            raise self.error(
                f"at_threshold must be one of {', '.join(get_args(AtThreshold))}, found {self.at_threshold!r}"
            )

    @property
    def limit(self) -> str:
        return f"threshold {self.threshold:.4g}"

    def remember(self) -> Skips:
        return Skips()

    def allows(self, memory: Skips) -> bool:
        """Return whether a step may be skipped, whatever is measured, after what was skipped before."""
        return (
            self.threshold > 0
            and (self.max_continuous is None or memory.in_a_row < self.max_continuous)
            and (self.max_cached is None or memory.in_all < self.max_cached)
        )

    def decide(self, step: int, steps: int, x: float | None, memory: Skips) -> bool:
        """Return whether to compute the blocks between the first and the last, and count what is skipped.

        Args:
            step: Index of the step.
            steps: Number of steps of the generation.
            x: The distance, unitless; None if there is no step to compare with, or it is not known.
            memory: Of the guidance pass.
        """
        if x is None or self.forced(step, steps) or not self.allows(memory):
            memory.distance, memory.in_a_row = None, 0
            return True
        memory.distance = x
        if x < self.threshold or (x == self.threshold and self.at_threshold == "reuse"):  # so that a NaN computes
            memory.in_a_row += 1
            memory.in_all += 1
            return False
        memory.in_a_row = 0
        return True

    def skipped(self, anatomy: Anatomy) -> tuple[int, int]:
        if not anatomy.blocks[0].main_stream:
            raise self.error(
                f"the first block of this {anatomy.model} has the streams {', '.join(anatomy.blocks[0].streams)}, and "
                "none of them is named hidden_states or x, so which goes on with the latents is not known; take "
                "another method, such as `dicache calibrate teacache`"
            )
        count, most = len(anatomy.blocks), self.most_first(anatomy)
        if self.first > most:
            _, stop = anatomy.segments[0]
            raise self.error(
                f"the first {self.first} blocks must lie in one segment and leave a block to skip; of the {count} "
                f"blocks of this {anatomy.model} the first segment is {span(0, stop - 1)}; "
                + (f"take a first of 1 to {most}" if most else "the method does not fit the model")
            )
        if self.first + self.last >= count:
            raise self.error(
                f"the first {self.first} and the last {self.last} of the {count} blocks of this {anatomy.model} leave "
                f"none to skip; take a last of at most {count - self.first - 1}"
            )
        return self.first, count - self.last

    @staticmethod
    def most_first(anatomy: Anatomy) -> int:
        """Return how many blocks may be the first: those that lie in one segment and leave a block to skip."""
        return min(anatomy.segments[0][1], len(anatomy.blocks) - 1) if anatomy.blocks[0].main_stream else 0

    def macs_saved(self, anatomy: Anatomy) -> int:
        start, stop = self.skipped(anatomy)
        return sum(block.macs for block in anatomy.blocks[start:stop])
