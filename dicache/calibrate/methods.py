"""The table of methods, and what a method that makes a plan from its settings alone has to offer."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from dicache.anatomy import Anatomy
from dicache.schedules import Plan, Rule, Schedule, Target


class CalibrationError(ValueError):
    """A method's settings are wrong, or what was measured does not suffice for it."""


class PlanMethod(Protocol):
    """A frozen dataclass of settings that makes a plan."""

    def plan(self, anatomy: Anatomy, steps: int) -> Plan:
        """Return what to compute in a generation of `steps` steps.

        Raises:
            CalibrationError: If the settings do not fit the model or the number of steps.
        """


@dataclass(frozen=True)
class Between:
    """All real numbers from low to high; `log` draws them by their order of magnitude."""

    low: float
    high: float
    log: bool = False


Axis = Between | range | tuple[str | int | float, ...]  # what a parameter may be; a range holds whole numbers


class Space(Protocol):
    """What a search may vary of a method, in the method's own file."""

    @property
    def axes(self) -> Mapping[str, Axis]:
        """What is varied, by name."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the schedules besides the parameters; a search is only resumed where it is the same."""

    def plain(self, max_macs: float | None) -> Mapping[str, Any]:
        """Return the parameters that calibrating without a search takes for a share of the multiply-accumulates.

        Args:
            max_macs: None takes those that are usual.

        Raises:
            CalibrationError: If the share cannot be reached.
        """

    def schedule(self, parameters: Mapping[str, Any]) -> Schedule:
        """Return the schedule that some parameters give.

        Raises:
            CalibrationError: If they do not go together.
        """


def letters_of(computed: Iterable[Any]) -> str:
    """Return a row of a plan: `C` for each step that is computed, `.` for each other one."""
    return "".join("C" if each else "." for each in computed)


def body_plan(rows: Mapping[str, str], blocks: str = "*") -> Plan:
    """Return the plan that skips the body, or some blocks of it.

    Args:
        rows: A letter a step for each guidance pass; one rule if all are alike.
        blocks: A range such as `1-27`, or `*` for all.
    """
    if len(set(rows.values())) == 1:
        rows = {"*": next(iter(rows.values()))}
    steps = len(next(iter(rows.values())))
    return Plan(steps, tuple(Rule("skip", row, blocks, context=name) for name, row in rows.items() if "." in row))


METHODS: dict[str, type[Any]] = {}
Kind = TypeVar("Kind", bound=type[Any])


def method(name: str) -> Callable[[Kind], Kind]:
    """Enter a class into the table of methods."""

    def enter(kind: Kind) -> Kind:
        METHODS[name] = kind
        return kind

    return enter


def name_of(kind: type[Any]) -> str:
    """Return the name that a method was entered under."""
    return next(name for name, entered in METHODS.items() if entered is kind)


def planned_schedule(settings: Any, anatomy: Anatomy, target: Target, steps: int) -> Schedule:
    """Return the schedule of a method that needs no measurement.

    Args:
        settings: An instance of one of the methods.
        anatomy: The model's.
        target: What the schedule is bound to.
        steps: As the step clock counts them.
    """
    plan = settings.plan(anatomy, steps)
    return Schedule(name_of(type(settings)), asdict(settings), anatomy, target, steps, plan=plan)
