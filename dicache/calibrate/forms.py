"""Plans of one rule: some steps are computed; at the others forecasts stand in for all blocks or a part of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dicache.anatomy import Anatomy
from dicache.anatomy.parts import span
from dicache.calibrate.sensitivity import Forecasts, before, expansion
from dicache.schedules import Plan, Rule, Schedule, Target
from dicache.schedules.plan import Action, Weights


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
    blocks: str = "*"

    def plan(self, steps: int, computed: Sequence[int], forecasts: Forecasts) -> Plan:
        letters = "".join("C" if step in computed else "." for step in range(steps))
        rule = Rule(self.action, letters, self.blocks, predictor="forecast", weights=forecasts)
        return Plan(steps, (rule,) if forecasts else ())

    def most_computed(self, anatomy: Anatomy, target: Target, steps: int, share: float) -> int | None:
        """Return how many steps can be computed for a share of the multiply-accumulates; None if none can."""
        for count in range(steps, 0, -1):
            held: Forecasts = dict.fromkeys(range(count, steps), ((count - 1, 1.0),))
            plan = self.plan(steps, range(count), held)
            if Schedule("auto", {}, anatomy, target, steps, plan).macs_fraction() <= share + 1e-9:
                return count
        return None


def forms_of(anatomy: Anatomy) -> list[Form]:
    """Return the forms that a model's plans may have, that of all blocks first."""
    last = len(anatomy.blocks) - 1
    forms = [Form("forecast of the body", "skip"), Form("forecast of the branches", "reuse")]
    if len(anatomy.segments) == 1 and last > 3:
        forms.append(Form("forecast of all but the last block", "skip", span(0, last - 1)))
        forms.append(Form("forecast of all but the last two blocks", "skip", span(0, last - 2)))
    return forms


def together(plan: Plan) -> tuple[Forecasts, Callable[[Forecasts], Plan]]:
    """Return forecasts that stand for those of all rules of a plan, and what makes the plan with others.

    Args:
        plan: Its rules forecast the same steps from the same outputs, each with weights of its own.

    Returns:
        The mean over the rules; from such a mean to the plan, in which each rule differs from it as it did.
    """
    rules = plan.rules

    def mean(step: int) -> Weights:
        weights = zip(*(rule.weights[step] for rule in rules), strict=True)
        return tuple((same[0][0], sum(weight for _, weight in same) / len(rules)) for same in weights)

    middle = {step: mean(step) for step in rules[0].weights}

    def with_mean(forecasts: Forecasts) -> Plan:
        def moved(rule: Rule, step: int) -> Weights:
            trios = zip(rule.weights[step], forecasts[step], middle[step], strict=True)
            return tuple((source, own + new - old) for (source, own), (_, new), (_, old) in trios)

        return replace(plan, rules=tuple(replace(rule, weights={s: moved(rule, s) for s in middle}) for rule in rules))

    return middle, with_mean


def even(count: int, steps: int) -> list[int]:
    """Return so many steps, evenly spread from the first."""
    return [place * steps // count for place in range(count)]


def expansions_of(computed: Sequence[int], steps: int, outputs: int) -> Forecasts:
    """Return Taylor expansions of the last outputs at all steps that are not computed."""
    return {s: expansion(before(computed, s, outputs), s) for s in range(steps) if s not in computed}
