"""What a format is: how a schedule is written in it and read from it, and what is lost on the way."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dicache.anatomy.parts import Anatomy
from dicache.schedules import Plan, PlanError, Schedule, ScheduleError, Target
from dicache.schedules.policies import Policy


class FormatError(ValueError):
    """A schedule cannot be written in a format, or a file is not of one."""


@dataclass
class Losses:
    """What a file does not keep of a schedule.

    Attributes:
        stated: What every export to the format loses; it is said.
        beyond: What changes the picture more than that; it is refused unless it is asked for.
    """

    stated: list[str] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Given:
    """What a file does not say, and who imports it does.

    Attributes:
        model: Name of the model that it is to be for.
        anatomy: The model's.
        target: What the schedule is bound to.
        steps: As the step clock counts them.
        settings: Others that were given, by name, such as `threshold`.
    """

    model: str
    anatomy: Anatomy
    target: Target
    steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def setting(self, name: str, needed_for: str) -> Any:
        """Return a setting.

        Raises:
            FormatError: If it was not given.
        """
        if self.settings.get(name) is None:
            raise FormatError(
                f"the file does not say the {name.replace('_', ' ')} {needed_for}; give --{_dashed(name)}"
            )
        return self.settings[name]


@dataclass(frozen=True)
class Read:
    """What a file says.

    Attributes:
        method: Which method's schedule it is.
        settings: As the file has them.
        plan: What is computed, if the file says it.
        policy: The rule that decides at run time, if it says that instead.
        says: What the file itself is bound to.
    """

    method: str
    settings: Mapping[str, Any]
    plan: Plan | None = None
    policy: Policy | None = None
    says: Target = field(default_factory=Target)


@dataclass(frozen=True)
class Format:
    """A form in which another project keeps what dicache keeps in a schedule.

    Attributes:
        name: As `--to` and `--from` have it.
        engine: The project, and the version that the converter was checked against.
        source: The files of it that say what the format is.
        suffix: Of a file.
        holds: Which schedules it can say.
        loses: What it never keeps.
        use: How a file is loaded, a line each; `FILE` stands for its name.
        export: Writes a schedule, with the losses to add to, and further values that were set by name.
        read: Reads a file.
        comment: What begins a line of comment; empty where the format has none.
    """

    name: str
    engine: str
    source: str
    suffix: str
    holds: str
    loses: str
    use: tuple[str, ...] = ()
    export: Callable[[Schedule, Losses, Mapping[str, Any]], str] | None = None
    read: Callable[[Path, Given], Read] | None = None
    comment: str = ""


@dataclass(frozen=True)
class Exported:
    """A schedule in another project's form.

    Attributes:
        text: Of the file.
        losses: What it does not keep.
        use: How it is loaded.
    """

    text: str
    losses: Losses
    use: tuple[str, ...]


def export(
    schedule: Schedule, kind: Format, *, lossy: bool = False, values: Mapping[str, Any] | None = None
) -> Exported:
    """Write a schedule in a format.

    Args:
        schedule: Which.
        kind: The format.
        lossy: Whether it may change the picture more than every export to this format does.
        values: What the format asks for and a schedule does not say, by name.

    Raises:
        FormatError: If the format cannot hold the schedule, or not without `lossy`.
    """
    if kind.export is None:
        raise FormatError(f"{kind.name} is only read, not written; see `dicache schedules formats`")
    losses = Losses()
    text = kind.export(schedule, losses, values or {})
    if losses.beyond and not lossy:
        raise FormatError(
            f"{kind.name} cannot hold all of this schedule: {'; '.join(losses.beyond)}. "
            "Pass --lossy to write the rest, or choose another format (`dicache schedules formats`)"
        )
    return Exported(text, losses, kind.use)


def imported(path: Path, kind: Format, given: Given) -> Schedule:
    """Read a schedule from a file of a format.

    Raises:
        FormatError: If it is not of the format, or says what dicache has no counterpart of.
    """
    if kind.read is None:
        raise FormatError(f"{kind.name} is only written, not read; see `dicache schedules formats`")
    try:
        read = kind.read(path, given)
        return Schedule(
            method=read.method,
            settings=read.settings,
            anatomy=given.anatomy,
            target=_target(read.says, given.target),
            steps=given.steps,
            plan=read.plan,
            policy=read.policy,
            measured={
                "model": given.model,
                "imported": {
                    "format": kind.name,
                    "file": path.name,
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
                    "given": {"model": given.model, "steps": given.steps, **given.settings},
                },
            },
        )
    except (PlanError, ScheduleError) as error:
        raise FormatError(f"{path}: {error}") from None


def _target(says: Target, given: Target) -> Target:
    """Return what a schedule is bound to: what its file says, and of the rest what was given.

    Where the file says its timesteps, the noise levels of others are left out.
    """
    said = {name: value for name, value in vars(says).items() if value is not None}
    rest = dict(vars(given))
    if says.timesteps is not None and given.timesteps is not None and given.differences(timesteps=says.timesteps):
        rest["noise_levels"] = None
    return Target(**{**rest, **said})


def _dashed(name: str) -> str:
    return name.replace("_", "-")
