"""`dicache calibrate mask | delta-cache | delta-dit`: plans that are written down, and ranges of blocks to skip."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dicache.cli.calibrating import (
    output_option,
    plan_and_write,
    plan_space,
    planned_subject,
    search_with_target_options,
    subject_of,
    subject_options,
    write_schedule,
)
from dicache.cli.command import Command, Kind, json_option
from dicache.cli.cost import in_words
from dicache.cli.searching import Searching, Subject, search_for, search_options

if TYPE_CHECKING:
    from dicache.anatomy import Anatomy
    from dicache.calibrate.delta_dit import DeltaDit
    from dicache.profiler import Profile

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Budget:
    """Multiply-accumulates that are aimed at: a share of all, or a number of them."""

    value: float
    absolute: bool


class Macs(Kind[Budget]):
    """A share of the multiply-accumulates, `0.55`, or how many: `53.53T`, `800G`."""

    name = "macs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Budget:
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([MGT]?)\s*", str(value), re.IGNORECASE | re.ASCII)
        number = float(match[1]) if match else 0.0
        if match is None or number == 0 or (not match[2] and number > 1):
            self.fail(f"{value!r} is neither a share such as 0.55 nor a number of MACs such as 53.53T", param, ctx)
        return Budget(number * {"": 1, "M": 1e6, "G": 1e9, "T": 1e12}[match[2].upper()], bool(match[2]))


@click.command(cls=Command)
@click.option(
    "--steps-computed",
    "lists",
    required=True,
    multiple=True,
    help="Steps that are computed, from 0: 0,3,5-9, 5- to the last, 0-:2 every second. BRANCH=LIST for one kind.",
)
@click.option("--branches", help="Kinds of branch that a list without a kind is for.  [default: all]")
@subject_options
@output_option
@json_option
def mask(
    lists: tuple[str, ...],
    branches: str | None,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Compute the branches at the steps that are listed, and reuse their outputs at all others.

    EOC's masks of 20 steps are 0-10:2,11- (steps 1, 3, 5, 7 and 9 reused) and 0-:2 (all odd steps reused).
    """
    from dicache.calibrate.mask import Mask
    from dicache.calibrate.methods import planned_schedule

    kinds = [part.strip() for part in branches.split(",")] if branches else ["*"]
    computed: dict[str, str] = {}
    for text in lists:
        named, equals, listed = text.rpartition("=")
        for kind in [named] if equals else kinds:
            if kind in computed:
                raise click.UsageError(f"--steps-computed is given more than once for {kind.replace('*', 'all')}")
            computed[kind] = listed
    settings = Mask(computed)
    subject = planned_subject(profile_file, model, steps)
    schedule = planned_schedule(settings, subject.anatomy, subject.target, subject.steps)
    write_schedule(schedule, "", subject.model, output, as_json)


@click.command("delta-cache", cls=Command)
@click.option("--interval", type=int, default=2, show_default=True, help="Steps from one full computation to the next.")
@click.option(
    "--blocks",
    default="deep",
    show_default=True,
    help="What is skipped in between: shallow, middle or deep, three quarters of the blocks; 7-27; or how many.",
)
@click.option("--start", type=click.IntRange(0), help="With a number of blocks: the first of them.  [default: 0]")
@click.option(
    "--branch", type=int, help="Skip what lies inside this skip connection of a U-Net instead, 0 the outermost."
)
@subject_options
@search_with_target_options
@output_option
@json_option
def delta_cache(
    interval: int,
    blocks: str,
    start: int | None,
    branch: int | None,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
    **searching: Any,
) -> None:
    """Skip a range of blocks at most steps, and add what it added at the last full one (arXiv 2406.01125)."""
    from dicache.calibrate.delta_cache import DeltaCache, DeltaCacheSpace

    settings = DeltaCache(interval, blocks, start, branch)
    plan_and_write(settings, DeltaCacheSpace, searching, profile_file, model, steps, output, as_json)


@click.command("delta-dit", cls=Command)
@click.option("--interval", type=int, help="Steps from one full computation to the next.  [default: 2]")
@click.option("--blocks", type=int, help="How many blocks are skipped in between.  [default: three quarters]")
@click.option("--target-speedup", type=click.FloatRange(1), help="How many times fewer MACs, such as 1.6.")
@click.option(
    "--max-macs", "budget", type=Macs(), help="Share of the MACs instead, such as 0.55, or 53.53T as papers count."
)
@click.option(
    "--boundary", type=int, help="Elapsed steps from which on the shallow blocks are skipped.  [default: 0.6 of all]"
)
@click.option(
    "--order",
    type=click.Choice(["aligned", "reversed", "auto"]),
    help="Deep blocks early, shallow ones early, or by the profile.  [default: auto with a profile, else aligned]",
)
@subject_options
@search_options
@output_option
@json_option
def delta_dit(
    interval: int | None,
    blocks: int | None,
    target_speedup: float | None,
    budget: Budget | None,
    boundary: int | None,
    order: Any,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
    **searching: Any,
) -> None:
    """Skip the deep blocks early and the shallow ones late (arXiv 2406.01125).

    With --target-speedup or --max-macs it takes interval and blocks from the paper's equations 6 and 7, which round
    up to whole blocks. With --search it tries intervals, blocks, boundaries and orders on real runs; what is given
    on the command line is kept.
    """
    from dicache.calibrate.delta_dit import DeltaDit, DeltaDitSpace, ordered, within_budget
    from dicache.calibrate.methods import planned_schedule

    search = Searching(**searching)
    if target_speedup is not None and budget is not None:
        raise click.UsageError("give either --target-speedup or --max-macs")
    if target_speedup is not None:
        budget = Budget(1 / target_speedup, absolute=False)
    if budget is not None and blocks is not None and not search.wanted:
        raise click.UsageError("give either --blocks or one of --target-speedup and --max-macs, which choose them")
    settings = DeltaDit(2 if interval is None else interval, blocks, boundary, order or "aligned")
    subject = (
        planned_subject(profile_file, model, steps)
        if not search.wanted
        else subject_of(profile_file, model, steps, search.device)
    )
    share = None if budget is None else _share_of(budget, subject)
    goal = search.goal(share) if search.wanted else None
    if share is not None and goal is None:
        chosen = within_budget(subject.steps, len(subject.anatomy.blocks), share, interval)
        settings = replace(settings, interval=chosen[0], blocks=chosen[1])
    errors: dict[str, float] = {}
    if order == "auto" or (order is None and model is None):
        settings, errors = ordered(settings, _profile(profile_file, model))
    if goal is not None:
        output = output or Path("delta-dit.json")
        schedule, told = search_for(subject, plan_space(DeltaDitSpace, settings)(subject, goal), goal, search, output)
    else:
        schedule = planned_schedule(settings, subject.anatomy, subject.target, subject.steps)
        schedule = replace(schedule, measured={**schedule.measured, "order": errors} if errors else {})
        told = _told(settings, schedule.anatomy, errors)
    write_schedule(schedule, told, subject.model, output, as_json)


def _share_of(budget: Budget, subject: Subject) -> float:
    """Return a budget as a share of what is computed without a schedule, counted as papers do if it is absolute."""
    if not budget.absolute:
        return budget.value
    from dicache.calibrate import CalibrationError
    from dicache.evaluate.cost import passes_of
    from dicache.evaluate.counting import PassCost, Size
    from dicache.models.configs import read_config

    source, sampling = read_config(subject.model), subject.sampling
    usual = source.usual
    guidance = usual.get("guidance") if sampling.guidance is None else sampling.guidance
    size = Size(
        sampling.height or usual["height"],
        sampling.width or usual["width"],
        sampling.text_tokens or usual.get("text_tokens"),
    )
    uncached = PassCost(source, size).total.papers * passes_of(source, guidance) * subject.steps
    if budget.value >= uncached:
        raise CalibrationError(
            f"{subject.steps} steps of {subject.model} take {in_words(uncached)} multiply-accumulates; "
            f"needed fewer than that, found {in_words(budget.value)}"
        )
    return budget.value / uncached


def _profile(profile_file: Path | None, model: str | None) -> "Profile":
    from dicache.cli.profiles import newest
    from dicache.profiler.storage import load

    if model is not None:
        raise click.UsageError("--order auto is read from a profile; give --profile instead of --model")
    return load(profile_file or newest())


def _told(settings: "DeltaDit", anatomy: "Anatomy", errors: Mapping[str, float]) -> str:
    early, late = settings.spans(anatomy)
    told = f"Interval {settings.interval}; blocks {early} are skipped early, {late} late"
    if not errors:
        return told
    return (
        f"{told}: order {settings.order}\n  at the skipped steps their deltas change by {errors['aligned']:.3f} on "
        f"average with the deep blocks first, by {errors['reversed']:.3f} with the shallow blocks first"
    )
