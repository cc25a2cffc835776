"""A plan: which site is computed at which step, written as a few rules that a person can read."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from dicache.anatomy.parts import BRANCHES, Anatomy, AnatomyError, branch_of, kind_of_branch, parse_span, span

Action = Literal["reuse", "skip"]
Predictor = Literal["hold", "taylor", "feature", "forecast"]
Weights = tuple[tuple[int, float], ...]  # the steps whose outputs a forecast adds up, the last one first, and how much


class StandIn(NamedTuple):
    """What stands in for an output: of a forecast, the order is how many outputs before the last it is made of."""

    predictor: Predictor
    order: int = 0
    weights: Weights = ()


MAX_STEPS = 10_000  # ten times what models are trained with
MAX_LETTERS = 10_000_000  # that the rules may give the blocks of a model in all: some seconds of reading
MAX_ORDER = 4  # of TaylorSeer's published settings; beyond it rounding errors grow faster than what is gained
HOLD = StandIn("hold")

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
        branch: Which branches a `reuse` is for: a kind (`mlp` covers `mlp.context`), one site's branch, or `*`. A dot
            at the end leaves out those with a name: `mlp.` does not cover `mlp.context`.
        context: The guidance pass that the rule is for, or `*`.
        predictor: What stands in for the output: `hold`, the last one computed, or the last delta; `taylor`, what the
            last `order + 1` of them foretell, by finite differences (TaylorSeer, arXiv 2503.06923); `feature`, of a
            range that is skipped, its last output itself in the place of its delta (Faster Diffusion, arXiv
            2312.09608); `forecast`, a weighted sum of the last ones computed, whose weights the rule has.
        order: Of a Taylor expansion; 0 holds.
        weights: Of a forecast: for each step at which the rule acts, the steps whose outputs are added up, the last
            one first, with their weights. Where a guidance pass has others kept, because it began later, a Taylor
            expansion of as many outputs stands in.
    """

    action: Action
    steps: str
    blocks: str = ALL
    branch: str = ALL
    context: str = ALL
    predictor: Predictor = "hold"
    order: int = 0
    weights: Mapping[int, Weights] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise PlanError(f"unknown action {self.action!r}; a rule's action is reuse or skip")
        if self.predictor not in get_args(Predictor):
            raise PlanError(f"unknown predictor {self.predictor!r}; known: {', '.join(get_args(Predictor))}")
        if self.predictor == "feature" and self.action == "reuse":
            raise PlanError("feature stands in for blocks that are skipped; the output of a branch is held with hold")
        if not 0 <= self.order <= (MAX_ORDER if self.predictor == "taylor" else 0):
            allowed = f"0 to {MAX_ORDER}" if self.predictor == "taylor" else f"0 with {self.predictor}"
            raise PlanError(f"the order of a rule's predictor must be {allowed}, found {self.order}")
        if wrong := set(self.steps) - {COMPUTE, ACT}:
            raise PlanError(
                f"unknown letter {sorted(wrong)[0]!r} in steps {self.steps!r}; write C to compute, . to {self.action}"
            )
        if self.steps.startswith(ACT):
            raise PlanError(f"the first step must be computed, nothing is kept before it; found steps {self.steps!r}")
        self._check_weights()
        if self.branch != ALL and kind_of_branch(self.branch) not in BRANCHES:
            raise PlanError(f"unknown branch {self.branch!r}; write * or one of {', '.join(BRANCHES)}")
        if self.action == "skip" and self.branch != ALL:
            raise PlanError(f"skip takes whole blocks, so its branch must be *; found {self.branch!r}")
        if self.blocks != ALL:
            try:
                parse_span(self.blocks)
            except AnatomyError as error:
                raise PlanError(str(error)) from None

    def _check_weights(self) -> None:
        acting = {step for step, letter in enumerate(self.steps) if letter == ACT}
        needed = acting if self.predictor == "forecast" else set()
        if wrong := sorted(self.weights.keys() ^ needed):
            kind = "has no" if wrong[0] in needed else "has unwanted"
            raise PlanError(f"a rule with predictor {self.predictor} {kind} weights for step {wrong[0]}")
        for step, weights in self.weights.items():
            sources = [source for source, _ in weights]
            if sources != sorted({*sources} - acting, reverse=True) or not 1 <= len(sources) <= MAX_ORDER + 1:
                raise PlanError(
                    f"the forecast of step {step} must be of 1 to {MAX_ORDER + 1} steps at which the rule does not "
                    f"act, the last one first; found {sources}"
                )
            if sources[0] >= step or sources[-1] < 0:
                raise PlanError(f"the forecast of step {step} must be of steps before it, found {sources}")
            if not all(math.isfinite(weight) for _, weight in weights):
                raise PlanError(f"the weights of the forecast of step {step} must be finite numbers, found {weights}")

    def covers(self, branch: str) -> bool:
        return self.branch in (ALL, branch, kind_of_branch(branch)) or self.branch == f"{branch}."

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

    def stand_in(self, step: int) -> StandIn:
        """Return what stands in at a step; a Taylor expansion of order 0 is the last output itself."""
        if self.predictor == "forecast":
            return StandIn("forecast", len(self.weights[step]) - 1, self.weights[step])
        return StandIn(self.predictor, self.order) if self.predictor == "feature" or self.order else HOLD

    def to_json(self) -> dict[str, Any]:
        content = {name: value for name, value in vars(self).items() if name not in ("order", "weights")}
        if self.predictor == "taylor":
            content["order"] = self.order
        if self.predictor == "forecast":
            content["weights"] = {
                str(step): {str(source): weight for source, weight in weights} for step, weights in self.weights.items()
            }
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Rule":
        """Read a rule.

        Raises:
            PlanError: If a key is unknown or missing, or a value is not of its kind.
        """
        kinds: dict[str, type] = dict.fromkeys(("action", "steps", "blocks", "branch", "context", "predictor"), str)
        _check(content, {**kinds, "order": int, "weights": Mapping}, needed={"action", "steps"})
        weights = {}
        for step, given in content.get("weights", {}).items():
            what = f"the weights of step {step}"
            if not isinstance(given, Mapping) or not all(type(w) in (int, float) for w in given.values()):
                raise PlanError(f"{what} must be an object of a number for each step they are for, found {given!r}")
            if not all(key.isdecimal() and len(key) <= len(str(MAX_STEPS)) for key in (step, *given)):
                raise PlanError(f"{what} must be named by steps, found {', '.join(given)}")
            weights[int(step)] = tuple((int(source), float(weight)) for source, weight in given.items())
        return cls(**{**content, "weights": weights})


@dataclass(frozen=True)
class Plan:
    """What to compute at each step of a generation.

    Attributes:
        steps: Number of steps, as the step clock counts them.
        rules: Applied together: a site is reused where any rule says so, and a skipped block runs none of its sites.
        collapse_guidance_from: The step from which on, where a step has two guidance passes, only the first of them is
            computed and stands for both, so that guidance does nothing. It goes on from the mean of what the two
            have kept. None leaves guidance alone; so does a generation without guidance.
    """

    steps: int
    rules: tuple[Rule, ...] = ()
    collapse_guidance_from: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise PlanError(f"a plan needs at least one step, and no more than {MAX_STEPS}; found {self.steps}")
        for rule in self.rules:
            if len(rule.steps) != self.steps:
                raise PlanError(
                    f"a rule has {len(rule.steps)} letters for a plan of {self.steps} steps: {rule.steps!r}"
                )
        if self.collapse_guidance_from is None:
            return
        if not 1 <= self.collapse_guidance_from < self.steps:
            raise PlanError(
                f"guidance can collapse from step 1 to the last, {self.steps - 1}, found {self.collapse_guidance_from}"
            )
        if self.contexts:
            raise PlanError(
                f"guidance cannot collapse where a pass has rules of its own, found some for {self.contexts[0]}; "
                "one pass has to stand for the others"
            )

    def check_size(self, anatomy: Anatomy) -> None:
        """Raise PlanError if a table would be larger than that of any model."""
        ranges = [rule.block_range(anatomy) for rule in self.rules]
        covered = len(anatomy.sites) + sum(stop - start for start, stop in ranges)
        letters = self.steps * covered * (1 + len(self.contexts))
        if letters > MAX_LETTERS:
            raise PlanError(
                f"the rules say {letters:.2g} times what a site or a block does at a step, more than any model needs; "
                f"the most that is read is {MAX_LETTERS:.2g}"
            )

    def table(self, anatomy: Anatomy, context: str | None = None) -> dict[str, str]:
        """Return, for every site, a letter a step: C computed, R reused, S skipped with its block.

        Args:
            anatomy: The model's.
            context: The guidance pass; None applies only the rules for every context.

        Raises:
            PlanError: If a rule is for blocks or branches that the model does not have, or two skips overlap, or two
                rules have different predictors stand in for one thing.
        """
        table = {key: [COMPUTE] * self.steps for key in anatomy.sites}
        skipped: dict[tuple[int, int], str] = {}
        for rule, sites in self._rules_for(anatomy, context):
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
        self.stand_ins(anatomy, context)  # raises where two rules do not agree
        self.ranges(anatomy, context)
        return {key: "".join(letters) for key, letters in table.items()}

    def stand_ins(self, anatomy: Anatomy, context: str | None = None) -> dict[str, dict[int, StandIn]]:
        """Return, for every site that some rule reuses, what stands in for its output at these steps."""
        found: dict[str, dict[int, StandIn]] = {}
        for rule, sites in self._rules_for(anatomy, context):
            for _, key in sites if rule.action == "reuse" else ():
                _enter(found.setdefault(key, {}), rule, key)
        return found

    def ranges(self, anatomy: Anatomy, context: str | None = None) -> dict[tuple[int, int], dict[int, StandIn]]:
        """Return, for every range of blocks that one delta is to replace, what stands in for it at which steps."""
        found: dict[tuple[int, int], dict[int, StandIn]] = {}
        for rule, _ in self._rules_for(anatomy, context):
            start, stop = rule.block_range(anatomy)
            for first, last in anatomy.segments if rule.action == "skip" else ():
                part = (max(start, first), min(stop, last))
                if part[0] < part[1]:
                    _enter(found.setdefault(part, {}), rule, f"blocks {rule.blocks}")
        for (first, stop), by_step in found.items():
            feature = {stand_in.predictor == "feature" for stand_in in by_step.values()}
            if len(feature) > 1:
                raise PlanError(f"blocks {first}-{stop - 1} are replaced by their delta and by their feature map")
            if obstacle := anatomy.obstacle(first, stop, delta=feature == {False}):
                raise PlanError(f"blocks {span(first, stop - 1)} of {anatomy.model} cannot be skipped: {obstacle}")
        return found

    def _rules_for(self, anatomy: Anatomy, context: str | None) -> Iterator[tuple[Rule, list[tuple[int, str]]]]:
        """Yield the rules for a guidance pass, each with its blocks and sites."""
        for rule in self.rules:
            start, stop = rule.block_range(anatomy)
            sites = [
                (block, anatomy.blocks[block].key(site))
                for block in range(start, stop)
                for site in anatomy.blocks[block].sites
                if rule.covers(site.branch)
            ]
            if not sites:
                known = sorted({branch_of(key) for key in anatomy.sites})
                raise PlanError(f"a rule is for branch {rule.branch}, but {anatomy.model} has {', '.join(known)}")
            if rule.context in (ALL, context):
                yield rule, sites

    @property
    def contexts(self) -> tuple[str, ...]:
        """Guidance passes that have rules of their own."""
        return tuple(sorted({rule.context for rule in self.rules} - {ALL}))

    @property
    def computed_steps(self) -> tuple[int, ...]:
        """Steps at which no rule acts, and all guidance passes are computed."""
        stop = self.steps if self.collapse_guidance_from is None else self.collapse_guidance_from
        return tuple(i for i in range(stop) if all(rule.steps[i] == COMPUTE for rule in self.rules))

    def to_json(self) -> dict[str, Any]:
        content = {"steps": self.steps, "rules": [rule.to_json() for rule in self.rules]}
        if self.collapse_guidance_from is not None:
            content["collapse_guidance_from"] = self.collapse_guidance_from
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Plan":
        """Read a plan.

        Raises:
            PlanError: If a key is unknown or missing, or a value is not of its kind.
        """
        known = {"steps": int, "rules": list, "collapse_guidance_from": int}
        _check(content, known, needed={"steps", "rules"})
        return cls(**{**content, "rules": tuple(Rule.from_json(rule) for rule in content["rules"])})


def _enter(by_step: dict[int, StandIn], rule: Rule, what: str) -> None:
    for step, letter in enumerate(rule.steps):
        if letter == ACT and by_step.setdefault(step, here := rule.stand_in(step)) != here:
            raise PlanError(
                f"two rules predict {what} at step {step}: {_in_words(by_step[step])} and {_in_words(here)}"
            )


def _in_words(stand_in: StandIn) -> str:
    if stand_in.weights:
        return "forecast with weights " + ", ".join(f"{weight:.3g}" for _, weight in stand_in.weights)
    return f"{stand_in.predictor} of order {stand_in.order}" if stand_in.order else stand_in.predictor


def _check(content: Any, kinds: Mapping[str, type], needed: set[str]) -> None:
    if not isinstance(content, Mapping):
        raise PlanError(f"found {content!r}, needed an object with the keys {', '.join(kinds)}")
    if wrong := sorted(set(content) - set(kinds)) + sorted(needed - set(content)):
        raise PlanError(f"unknown or missing key {wrong[0]!r}; the keys are {', '.join(kinds)}")
    for key, value in content.items():
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise PlanError(f"{key} must be of type {kinds[key].__name__}, found {value!r}")
