"""A plan: which site is computed at which step, written as a few rules that a person can read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dicache.anatomy.parts import BRANCHES, Anatomy, AnatomyError, parse_span

Action = Literal["reuse", "skip"]
Predictor = Literal["hold"]

COMPUTE = "C"
ACT = "."  # the rule's action
REUSED = "R"
SKIPPED = "S"
ALL = "*"


class PlanError(ValueError):
    """A plan contradicts itself or the model that it is for."""


@dataclass(frozen=True)
class Rule:
    """Reuse branches, or skip a range of blocks, at some steps.

    Attributes:
        action: `reuse` gives a branch's kept output again; `skip` replaces whole blocks by their kept delta.
        steps: A letter a step: `C` where the rule leaves things as they are, `.` where it acts.
        blocks: `7-27` with both ends included, `7`, or `*` for the body.
        branch: Which branches a `reuse` is for: a kind (`mlp` covers `mlp.context`), one site's branch, or `*`.
        context: The guidance pass that the rule is for, or `*`.
        predictor: What stands in for the output: `hold`, the last one computed.
    """

    action: Action
    steps: str
    blocks: str = ALL
    branch: str = ALL
    context: str = ALL
    predictor: Predictor = "hold"

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise PlanError(f"unknown action {self.action!r}; a rule's action is reuse or skip")
        if self.predictor not in get_args(Predictor):
            raise PlanError(f"unknown predictor {self.predictor!r}; known: {', '.join(get_args(Predictor))}")
        if wrong := set(self.steps) - {COMPUTE, ACT}:
            raise PlanError(
                f"unknown letter {sorted(wrong)[0]!r} in steps {self.steps!r}; write C to compute, . to {self.action}"
            )
        if self.steps.startswith(ACT):
            raise PlanError(f"the first step must be computed, nothing is kept before it; found steps {self.steps!r}")
        if self.branch != ALL and self.branch.split(".")[0] not in BRANCHES:
            raise PlanError(f"unknown branch {self.branch!r}; write * or one of {', '.join(BRANCHES)}")
        if self.action == "skip" and self.branch != ALL:
            raise PlanError(f"skip takes whole blocks, so its branch must be *; found {self.branch!r}")
        if self.blocks != ALL:
            try:
                parse_span(self.blocks)
            except AnatomyError as error:
                raise PlanError(str(error)) from None

    def covers(self, branch: str) -> bool:
        return self.branch in (ALL, branch, branch.split(".")[0])

    def block_range(self, anatomy: Anatomy) -> tuple[int, int]:
        """Return the rule's blocks as a half-open range.

        Raises:
            PlanError: If the model has fewer blocks.
        """
        count = len(anatomy.blocks)
        if self.blocks == ALL:
            return 0, count
        first, last = parse_span(self.blocks)
        if last >= count:
            raise PlanError(f"a rule is for blocks {self.blocks}, but {anatomy.model} has the blocks 0-{count - 1}")
        return first, last + 1

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Plan:
    """What to compute at each step of a generation.

    Attributes:
        steps: Number of steps, as the step clock counts them.
        rules: Applied together: a site is reused where any rule says so, and a skipped block runs none of its sites.
    """

    steps: int
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise PlanError(f"a plan needs at least one step, found {self.steps}")
        for rule in self.rules:
            if len(rule.steps) != self.steps:
                raise PlanError(
                    f"a rule has {len(rule.steps)} letters for a plan of {self.steps} steps: {rule.steps!r}"
                )

    def table(self, anatomy: Anatomy, context: str | None = None) -> dict[str, str]:
        """Return, for every site, a letter a step: C computed, R reused, S skipped with its block.

        Args:
            anatomy: The model's.
            context: The guidance pass; None applies only the rules for every context.

        Raises:
            PlanError: If a rule is for blocks or branches that the model does not have, or two skips overlap.
        """
        table = {key: [COMPUTE] * self.steps for key in anatomy.sites}
        skipped: dict[tuple[int, int], str] = {}
        for rule in self.rules:
            start, stop = rule.block_range(anatomy)
            sites = [
                (block, anatomy.blocks[block].key(site))
                for block in range(start, stop)
                for site in anatomy.blocks[block].sites
                if rule.covers(site.branch)
            ]
            if not sites:
                known = sorted({key.partition(".")[2] for key in anatomy.sites})
                raise PlanError(f"a rule is for branch {rule.branch}, but {anatomy.model} has {', '.join(known)}")
            if rule.context not in (ALL, context):
                continue
            for step, letter in enumerate(rule.steps):
                if letter == COMPUTE:
                    continue
                if rule.action == "reuse":
                    for _, key in sites:
                        if table[key][step] == COMPUTE:
                            table[key][step] = REUSED
                    continue
                for block, key in sites:
                    other = skipped.setdefault((block, step), rule.blocks)
                    if other != rule.blocks:
                        raise PlanError(f"two rules skip block {block} at step {step}: {other} and {rule.blocks}")
                    table[key][step] = SKIPPED
        return {key: "".join(letters) for key, letters in table.items()}

    @property
    def contexts(self) -> tuple[str, ...]:
        """Guidance passes that have rules of their own."""
        return tuple(sorted({rule.context for rule in self.rules} - {ALL}))

    @property
    def computed_steps(self) -> tuple[int, ...]:
        """Steps at which no rule acts."""
        return tuple(i for i in range(self.steps) if all(rule.steps[i] == COMPUTE for rule in self.rules))

    def to_json(self) -> dict[str, Any]:
        return {"steps": self.steps, "rules": [rule.to_json() for rule in self.rules]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Plan":
        """Read a plan.

        Raises:
            PlanError: If a key is unknown or missing, or a value is not of its kind.
        """
        _check(content, {"steps": int, "rules": list}, needed={"steps", "rules"})
        kinds = dict.fromkeys(("action", "steps", "blocks", "branch", "context", "predictor"), str)
        for rule in content["rules"]:
            _check(rule, kinds, needed={"action", "steps"})
        return cls(steps=content["steps"], rules=tuple(Rule(**rule) for rule in content["rules"]))


def _check(content: Any, kinds: Mapping[str, type], needed: set[str]) -> None:
    if not isinstance(content, Mapping):
        raise PlanError(f"found {content!r}, needed an object with the keys {', '.join(kinds)}")
    if wrong := sorted(set(content) - set(kinds)) + sorted(needed - set(content)):
        raise PlanError(f"unknown or missing key {wrong[0]!r}; the keys are {', '.join(kinds)}")
    for key, value in content.items():
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise PlanError(f"{key} must be of type {kinds[key].__name__}, found {value!r}")
