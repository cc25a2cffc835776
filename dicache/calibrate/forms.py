"""Plans of one rule: some steps are computed; at the others forecasts stand in for all blocks or a part of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dicache.anatomy import Anatomy
from dicache.anatomy.parts import parse_span, span
from dicache.calibrate.judging import ROUNDING
from dicache.calibrate.methods import letters_of
from dicache.calibrate.sensitivity import Forecasts
from dicache.schedules import Plan, PlanError, Rule, Schedule, Target
from dicache.schedules.plan import ACT, ALL, Action, Weights

Slots = dict[
    tuple[int, int], Weights
]  # weights by the step that is not computed, and the place of the rules they are of


@dataclass(frozen=True)
class Form:
    """What is skipped at the steps that are not computed.

    Attributes:
        name: In a few words.
        action: Of the rule.
        blocks: Of the rule.
    """

    name: str
    action: Action
    blocks: str = ALL

    def plan(self, steps: int, computed: Sequence[int], forecasts: Forecasts) -> Plan:
        letters = letters_of(step in computed for step in range(steps))
        rule = Rule(self.action, letters, self.blocks, predictor="forecast", weights=forecasts)
        return Plan(steps, (rule,) if forecasts else ())

    @property
    def granularity(self) -> str:
        return "body" if self.action == "skip" else "branch"

    def possible(self, anatomy: Anatomy) -> bool:
        """Whether the blocks of a model can be skipped so."""
        try:
            self.plan(2, [0], {1: ((0, 1.0),)}).table(anatomy)
        except PlanError:
            return False
        return True

    def block_range(self, anatomy: Anatomy) -> tuple[int, int]:
        """Return the first and the last of the blocks."""
        return (0, len(anatomy.blocks) - 1) if self.blocks == ALL else parse_span(self.blocks)

    def most_computed(self, anatomy: Anatomy, target: Target, steps: int, share: float) -> int | None:
        """Return how many steps can be computed for a share of the multiply-accumulates; None if none can."""
        for count in range(steps, 0, -1):
            held: Forecasts = dict.fromkeys(range(count, steps), ((count - 1, 1.0),))
            plan = self.plan(steps, range(count), held)
            if Schedule("auto", {}, anatomy, target, steps, plan).macs_fraction() <= share + ROUNDING:
                return count
        return None


def forms_of(anatomy: Anatomy) -> list[Form]:
    """Return the forms that a model's plans may have, that of all blocks first, if blocks can be skipped."""
    last = len(anatomy.blocks) - 1
    forms = [Form("forecast of the body", "skip"), Form("forecast of the branches", "reuse")]
    if len(anatomy.segments) == 1 and last > 3:
        forms.append(Form("forecast of all but the last block", "skip", span(0, last - 1)))
        forms.append(Form("forecast of all but the last two blocks", "skip", span(0, last - 2)))
    return [form for form in forms if form.possible(anatomy)]


def together(plan: Plan) -> tuple[Slots, Callable[[Slots], Plan]]:
    """Return forecasts that stand for those of all rules of a plan, and what makes the plan with others.

    Args:
        plan: Of forecasts. Its rules that compute the same steps forecast them from the same outputs, each with weights
            of its own.

    Returns:
        The mean over the rules that compute the same steps, by the step and the place of these rules among others; from
        such means to the plan, in which each rule differs from them as it did.
    """
    rules = plan.rules
    courses = list(dict.fromkeys(rule.steps for rule in rules))

    def mean(course: int, step: int) -> Weights:
        weights = zip(*(rule.weights[step] for rule in rules if rule.steps == courses[course]), strict=True)
        return tuple((same[0][0], sum(weight for _, weight in same) / len(same)) for same in weights)

    places = [
        (step, course) for course, letters in enumerate(courses) for step in range(plan.steps) if letters[step] == ACT
    ]
    middle = {(step, course): mean(course, step) for step, course in sorted(places)}

    def with_mean(slots: Slots) -> Plan:
        def moved(rule: Rule, step: int) -> Weights:
            place = step, courses.index(rule.steps)
            trios = zip(rule.weights[step], slots[place], middle[place], strict=True)
            return tuple((source, own + new - old) for (source, own), (_, new), (_, old) in trios)

        return replace(
            plan, rules=tuple(replace(rule, weights={s: moved(rule, s) for s in rule.weights}) for rule in rules)
        )

    return middle, with_mean
