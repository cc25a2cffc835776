"""PAB, pyramid attention broadcast: each kind of attention is reused over a range of its own, in the middle steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dicache.anatomy import Anatomy
from dicache.calibrate.methods import CalibrationError, method
from dicache.schedules import Plan, PlanError, Rule

FULL = 1000  # timesteps that the published windows are written in


@method("pab")
@dataclass(frozen=True)
class Pab:
    """Compute each kind of branch every so many steps inside a window of timesteps, and at all steps outside of it.

    What is held is the branch's output before the gate, as diffusers has it; the released code holds it after the
    gate. Each guidance pass holds its own (diffusers 0.42 shares it between the passes).

    Attributes:
        ranges: Kind of branch to its range: computed once in so many steps. The paper's are 2 for spatial, 4 for
            temporal and 6 for cross-attention. Where the temporal blocks are a list of their own, its name goes before,
            `temporal_transformer_blocks.attn`, and `attn` is that of the other blocks.
        window: Timesteps, on a scale of 0 to 1000, between which branches are reused, both ends excluded: (450, 930)
            for Open-Sora, (100, 850) for Open-Sora-Plan and CogVideoX, (100, 800) for Latte and in diffusers.

    References:
        PAB, arXiv 2408.12588, section 3; VideoSys.
    """

    ranges: Mapping[str, int]
    window: tuple[float, float] = (100, 800)

    def __post_init__(self) -> None:
        if not self.ranges:
            raise CalibrationError("pab: no range is given; write one such as attn=2,cross_attn=6")
        for branch, length in self.ranges.items():
            if length < 1:
                raise CalibrationError(f"pab: the range of {branch} must be 1 (compute always) or more, found {length}")
        low, high = self.window
        if not 0 <= low < high <= FULL:
            raise CalibrationError(f"pab: the window must rise and lie in 0-{FULL}, found {low:g}-{high:g}")

    def plan(self, anatomy: Anatomy, steps: int, timesteps: Sequence[float] | None = None) -> Plan:
        """Return what to compute at each step.

        Args:
            anatomy: The model's.
            steps: As the step clock counts them.
            timesteps: Of each step, falling, on a scale of 0 to 1000; None takes them as evenly spaced.

        Raises:
            CalibrationError: If the model has no such branch, or the timesteps are on another scale.
        """
        if timesteps is None:
            timesteps = [FULL * (steps - i) / steps - 1 for i in range(steps)]
        if max(timesteps) <= 1 < steps or max(timesteps) > FULL:
            raise CalibrationError(
                f"pab: the window is on a scale of 0 to {FULL}, but the sampler's timesteps begin at {timesteps[0]:g}; "
                "take another sampler, or another method"
            )
        low, high = self.window
        rules: list[Rule] = []
        try:
            for branch, length in self.ranges.items():
                letters = "".join(
                    "." if i % length and low < t < high else "C"  # counted from the first step, outside the window too
                    for i, t in enumerate(timesteps)
                )
                kind, blocks = self._places(anatomy, branch)
                rules += [Rule("reuse", letters, blocks=part, branch=kind) for part in blocks]
            Plan(steps, tuple(rules)).table(anatomy)
        except PlanError as error:
            raise CalibrationError(f"pab: {error}") from None
        return Plan(steps, tuple(rule for rule in rules if "." in rule.steps))

    def _places(self, anatomy: Anatomy, branch: str) -> tuple[str, list[str]]:
        """Return the kind of branch that a range is for, and the blocks as rules have them."""
        paths = {block.path for block in anatomy.blocks}
        named = {key: path for key in self.ranges for path in paths if key.startswith(f"{path}.")}
        kind = branch.removeprefix(f"{named[branch]}.") if branch in named else branch
        wanted = {named[branch]} if branch in named else paths - {p for key, p in named.items() if key == f"{p}.{kind}"}
        if wanted == paths:
            return kind, ["*"]
        return kind, [str(block.index) for block in anatomy.blocks if block.path in wanted]
