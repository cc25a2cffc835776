"""PAB, pyramid attention broadcast: each kind of attention is reused over a range of its own, in the middle steps."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dicache.anatomy import Anatomy
from dicache.calibrate.methods import Axis, CalibrationError, method
from dicache.calibrate.spaces import PlanSpace
from dicache.schedules import Plan, PlanError, Rule, Schedule, Target

FULL = 1000  # timesteps that the published windows are written in


USUAL_RANGES = {"attn": 2}
LONGEST_RANGE = 8  # that a search tries; the published ones are 2 to 6
LOWS, HIGHS = range(0, 500, 50), range(550, FULL + 1, 50)


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

    def schedule(
        self, anatomy: Anatomy, target: Target, steps: int, timesteps: Sequence[float] | None = None
    ) -> Schedule:
        """Return the schedule of the plan."""
        return Schedule("pab", asdict(self), anatomy, target, steps, self.plan(anatomy, steps, timesteps))

    def _places(self, anatomy: Anatomy, branch: str) -> tuple[str, list[str]]:
        """Return the kind of branch that a range is for, and the blocks as rules have them."""
        paths = {block.path for block in anatomy.blocks}
        named = {key: path for key in self.ranges for path in paths if key.startswith(f"{path}.")}
        kind = branch.removeprefix(f"{named[branch]}.") if branch in named else branch
        wanted = {named[branch]} if branch in named else paths - {p for key, p in named.items() if key == f"{p}.{kind}"}
        if wanted == paths:
            return kind, ["*"]
        return kind, [str(block.index) for block in anatomy.blocks if block.path in wanted]


@dataclass(frozen=True)
class PabSpace(PlanSpace):
    """The range of each kind of branch, and the window.

    Attributes:
        timesteps: Of each step; see `Pab.plan`.
    """

    timesteps: Sequence[float] | None = None

    def free(self) -> Mapping[str, Axis]:
        longest = min(LONGEST_RANGE, self.steps)
        ranges: dict[str, Axis] = {kind: range(1, longest + 1) for kind in self.kinds if "ranges" not in self.fixed}
        window: dict[str, Axis] = {"low": LOWS, "high": HIGHS} if "window" not in self.fixed else {}
        return {**ranges, **window}

    def usual(self) -> Mapping[str, Any]:
        low, high = self.settings.window
        return {**dict.fromkeys(self.kinds, 2), "low": int(low), "high": int(high)}

    def plain(self, max_macs: float | None) -> Mapping[str, Any]:
        """Return the shortest ranges, the same for all kinds of branch, that save as much, in a window as it is."""
        parameters = {name: self.usual()[name] for name in self.axes}
        kinds = [kind for kind in self.kinds if kind in parameters]
        for length in range(2, LONGEST_RANGE + 1):
            tried = {**parameters, **dict.fromkeys(kinds, length)}
            if max_macs is None or self.share(tried) <= max_macs:
                return tried
        raise CalibrationError(f"pab: a share of {max_macs:.3f} of the MACs cannot be reached in {self.steps} steps")

    def with_parameters(self, parameters: Mapping[str, Any]) -> Any:
        ranges = {kind: parameters[kind] for kind in self.kinds if kind in parameters} or self.settings.ranges
        low, high = self.settings.window
        return replace(self.settings, ranges=ranges, window=(parameters.get("low", low), parameters.get("high", high)))

    def made(self, settings: Pab) -> Schedule:
        return settings.schedule(self.anatomy, self.target, self.steps, self.timesteps)
