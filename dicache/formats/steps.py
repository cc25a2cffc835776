"""What formats that know whole steps only can say of a plan: one mask, for one range of blocks."""

from dataclasses import dataclass

from dicache.anatomy.parts import Anatomy, block_of, span
from dicache.formats.format import FormatError, Given, Losses
from dicache.schedules import Plan, Rule, Schedule
from dicache.schedules.plan import ACT, COMPUTE, HOLD, StandIn


@dataclass(frozen=True)
class StepMask:
    """At which steps a range of blocks is computed.

    Attributes:
        letters: A letter a step: `C` computed, `.` not.
        first: First block of the range.
        stop: The block behind its last.
        order: Of the Taylor expansion that stands in; 0 holds.
    """

    letters: str
    first: int
    stop: int
    order: int = 0

    @property
    def numbers(self) -> list[int]:
        """1 a step that is computed, else 0."""
        return [int(letter == COMPUTE) for letter in self.letters]

    @property
    def computed(self) -> list[int]:
        """The steps that are computed."""
        return [step for step, letter in enumerate(self.letters) if letter == COMPUTE]

    def covers(self, anatomy: Anatomy) -> bool:
        """Return whether the range is of all blocks."""
        return (self.first, self.stop) == (0, len(anatomy.blocks))


def planned(schedule: Schedule, instead: str) -> Plan:
    """Return the plan of a schedule.

    Args:
        schedule: Which.
        instead: Formats that hold what decides at run time, in words.

    Raises:
        FormatError: If it has none.
    """
    if schedule.plan is None:
        raise FormatError(
            f"this schedule of {schedule.method} decides at run time, and the format holds fixed steps; {instead} "
            "or make a plan of it first (`dicache schedules freeze`)"
        )
    return schedule.plan


def step_mask(schedule: Schedule, losses: Losses, *, highest_order: int = 0) -> StepMask:
    """Return what a mask of whole steps says of a plan, and note what it does not.

    A step is computed where any branch, in any guidance pass, is: it may compute more than the plan.

    Args:
        schedule: With a plan.
        losses: To add to.
        highest_order: Of a Taylor expansion that the format can say.

    Raises:
        FormatError: If the plan does not leave out the same blocks at any step.
    """
    plan = planned(schedule, "export to a format that does so,")
    anatomy = schedule.anatomy
    if anatomy.links:
        raise FormatError(f"{anatomy.model} is a U-Net, and the format is for transformers")
    # Where two passes have rules of their own, there is no other.
    passes = plan.contexts if len(plan.contexts) > 1 else (None, *plan.contexts)
    tables = [plan.table(anatomy, context) for context in passes]
    acting = {key for table in tables for key, letters in table.items() if set(letters) != {COMPUTE}}
    blocks = sorted({block_of(key) for key in acting})
    if not blocks:
        raise FormatError("this plan computes everything; there is nothing to write")
    first, stop = blocks[0], blocks[-1] + 1
    inside = [key for block in anatomy.blocks[first:stop] for key in (block.key(site) for site in block.sites)]
    rows = [[table[key][step] for table in tables for key in inside] for step in range(plan.steps)]
    letters = "".join(COMPUTE if COMPUTE in row else ACT for row in rows)
    if ACT not in letters:
        raise FormatError(
            f"at no step does this plan leave out all of blocks {span(first, stop - 1)}: a mask of whole steps would "
            "compute everything. Take a format that knows branches, such as smoothcache or diffusers-taylorseer"
        )
    _note_drops(schedule, losses)
    if any("R" in row for row in rows):
        losses.stated.append("branches, held before their gates, become one held change of all blocks")
    if added := sum(row.count("R") + row.count("S") for row in rows if COMPUTE in row):
        share = added / (len(rows) * len(rows[0]))
        losses.stated.append(
            f"a step is computed where any branch is in any guidance pass, which computes {share:.1%} of the branches "
            "that the plan does not"
        )
    return StepMask(letters, first, stop, _order(schedule, losses, highest_order))


def _note_drops(schedule: Schedule, losses: Losses) -> None:
    """Note what no other project has."""
    if schedule.corrections is not None:
        losses.beyond.append("the corrections of what is held would be dropped")
    if schedule.collapse_guidance_from is not None:
        losses.beyond.append(
            f"guidance would go on to the end, where the plan stops it from step {schedule.collapse_guidance_from} on"
        )


def stand_ins(schedule: Schedule) -> set[StandIn]:
    """Return all that stand in for something in a plan; of forecasts one for all of them."""
    plan = schedule.plan
    assert plan is not None
    found: set[StandIn] = set()
    for context in (None, *plan.contexts):
        for places in (plan.stand_ins(schedule.anatomy, context), plan.ranges(schedule.anatomy, context)):
            for by_step in places.values():
                found |= {StandIn(s.predictor, 0 if s.predictor == "forecast" else s.order) for s in by_step.values()}
    return found


def _order(schedule: Schedule, losses: Losses, highest: int) -> int:
    """Return the order of the Taylor expansion that stands in everywhere; note where none does."""
    found = stand_ins(schedule)
    if found == {HOLD}:
        return 0
    if len(found) == 1 and (only := next(iter(found))).predictor == "taylor" and only.order <= highest:
        return only.order
    names = sorted(f"a {s.predictor} of order {s.order}" if s.order else f"a {s.predictor}" for s in found - {HOLD})
    losses.beyond.append(f"the last output would be held where the plan has {' and '.join(names)}")
    return 0


def note_branches(schedule: Schedule, losses: Losses) -> None:
    """Note what a format of branches drops, other than what stands in."""
    _note_drops(schedule, losses)
    if schedule.contexts:
        losses.beyond.append(
            f"the rules of the guidance pass {schedule.contexts[0]} alone would be dropped; what is written is for all"
        )


def body_plan(letters: str, given: Given, *, first: int = 0, stop: int | None = None, order: int = 0) -> Plan:
    """Return the plan that skips a range of blocks by a mask."""
    count = len(given.anatomy.blocks)
    stop = count if stop is None else stop
    if ACT not in letters:
        return Plan(len(letters))
    blocks = "*" if (first, stop) == (0, count) else span(first, stop - 1)
    return Plan(len(letters), (Rule("skip", letters, blocks, predictor="taylor" if order else "hold", order=order),))
