"""`dicache calibrate METHOD --search`: the options, the runs that trials are judged by, and what is told at the end."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from dicache.cli.command import page_width, table
from dicache.cli.evaluate import results_table

if TYPE_CHECKING:
    from dicache.anatomy import Anatomy
    from dicache.calibrate.judging import Goal
    from dicache.calibrate.methods import Space
    from dicache.calibrate.search import Found
    from dicache.evaluate.evaluation import Result
    from dicache.models.sampling import Sampling
    from dicache.schedules import Schedule, Target

FOUND, PLAIN = "searched", "not searched"
F = TypeVar("F", bound=Callable[..., Any])

OPTIONS = (
    click.option("--min-psnr", type=float, help="With --search: the fewest MACs for images this close, in dB."),
    click.option("--search", "wanted", is_flag=True, help="Try settings on real runs, with Optuna, and take the best."),
    click.option("--trials", type=click.IntRange(1), default=50, show_default=True, help="Trials of a search, in all."),
    click.option(
        "--storage",
        help="Where a search keeps its trials: sqlite:///FILE, journal:FILE or postgresql://..., which several "
        "processes and machines may share, each with this same command. A search that is there is resumed.  [default: sqlite:///OUTPUT.search.db]",
    ),
    click.option("--runs", type=click.IntRange(1), default=8, show_default=True, help="Images a trial is judged by."),
    click.option(
        "--prompts", type=click.Path(dir_okay=False), help="Prompts of a search: a file with a prompt or class a line."
    ),
    click.option("--seed", type=int, default=5000, show_default=True, help="Seed of the first image of a search."),
    click.option("--device", help="Device of a search, such as cuda or cpu.  [default: cuda if there is one]"),
)


def search_options(function: F) -> F:
    """Add the options of a search; the command takes them as keywords, and makes a `Searching` of them."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


@dataclass(frozen=True)
class Searching:
    """The options of a search; the last two are those of a command that takes them for nothing else."""

    min_psnr: float | None
    wanted: bool
    trials: int
    storage: str | None
    runs: int
    prompts: str | None
    seed: int
    device: str | None
    target_speedup: float | None = None
    max_macs: float | None = None

    def __post_init__(self) -> None:
        given = [n for n in given_options() if n != "wanted" and vars(self).get(n) is not None]
        if given and not self.wanted:
            raise click.UsageError(f"--{given[0].replace('_', '-')} goes with --search")

    def goal(self, max_macs: float | None) -> "Goal":
        """Return the goal, of which exactly one must be given."""
        from dicache.calibrate.judging import Goal

        if (max_macs is None) == (self.min_psnr is None):
            raise click.UsageError("give one of --target-speedup, --max-macs and --min-psnr with --search")
        return Goal(max_macs, self.min_psnr)


def given_options() -> set[str]:
    """Return the names of the options that stand on the command line."""
    context = click.get_current_context()
    return {n for n in context.params if context.get_parameter_source(n) is ParameterSource.COMMANDLINE}


@dataclass(frozen=True)
class Subject:
    """What a schedule is made for.

    Attributes:
        model: Its name.
        anatomy: Of it.
        target: What the schedule is bound to.
        steps: As the step clock counts them.
        sampling: How the pipeline is called.
        prompts: Of the profile's runs, if there is one.
        seeds: Of the profile's runs.
        pipeline: If it was loaded already.
    """

    model: str
    anatomy: "Anatomy"
    target: "Target"
    steps: int
    sampling: "Sampling"
    prompts: Collection[str] = ()
    seeds: Collection[int] = ()
    pipeline: Any = field(default=None, repr=False)

    def loaded(self, device: str | None) -> Any:
        from dicache.models.loading import load

        if self.pipeline is not None:
            return self.pipeline
        return load(self.model, device=device, dtype=self.target.dtype, scheduler=self.target.scheduler)


def search_for(
    subject: Subject, space: "Space", goal: "Goal", options: Searching, output: Path
) -> tuple["Schedule", str]:
    """Search, judge what was found on runs that the search did not see, and return the schedule and what to tell."""
    from dicache.calibrate.judging import RealRuns
    from dicache.calibrate.search import search
    from dicache.calibrate.studies import axes_json, versions
    from dicache.evaluate.evaluation import evaluate
    from dicache.evaluate.references import default_folder

    pipeline = subject.loaded(options.device)
    conditions = fresh_conditions(pipeline, subject, options.prompts, options.runs, options.runs)
    seeds = fresh_seeds(subject, options.seed, 2 * options.runs)
    mine, others = slice(options.runs), slice(options.runs, None)
    kept = default_folder()
    runs = RealRuns.of(pipeline, conditions[mine], seeds[mine], subject.sampling, references=kept)
    database = output.with_name(output.name.removesuffix(".json") + ".search.db")
    if options.storage is None:
        database.parent.mkdir(parents=True, exist_ok=True)
    found = search(
        space,
        goal,
        runs,
        trials=options.trials,
        storage=options.storage or f"sqlite:///{database}",
        name=output.name.removesuffix(".json"),
        where=str(database) if options.storage is None else "--storage",
        identity=runs.identity,
    )
    _, results, fewer = evaluate(
        pipeline,
        _compared(subject, space, goal, found),
        conditions[others],
        sampling=subject.sampling,
        seed=seeds[options.runs],
        timing_rounds=0,
        references=kept,
    )
    told = {
        "goal": {name: value for name, value in vars(goal).items() if value is not None},
        **found.to_json(),
        "axes": axes_json(space.axes),
        "runs": options.runs,
        "seeds": list(seeds[mine]),
        "held_out": {"seeds": list(seeds[others]), "results": [_summary(result) for result in (*results, *fewer)]},
        "sampler": "none" if found.enumerated else "TPESampler",
        "versions": versions(),
    }
    schedule = replace(found.schedule, measured={**found.schedule.measured, "search": told})
    return schedule, _told(found, goal, options, [*results, *fewer])


def fresh_conditions(pipeline: Any, subject: Subject, prompts: str | None, runs: int, others: int) -> list[str]:
    """Return conditions for so many runs of a search, and behind them for others, which the search does not see.

    They are spread over what there is, and are not among the profile's if there are any others.
    """
    from dicache.models.sampling import default_conditions, read_conditions

    every = read_conditions(prompts) if prompts else default_conditions(pipeline, 10_000)
    known = list(dict.fromkeys(every))
    fresh = [condition for condition in known if condition not in subject.prompts] or known
    total = runs + others
    stride = max(1, len(fresh) // total)
    chosen = [fresh[i * stride % len(fresh)] for i in range(total)]
    mine = [i * total // runs for i in range(runs)]
    return [chosen[i] for i in mine] + [chosen[i] for i in range(total) if i not in mine]


def fresh_seeds(subject: Subject, first: int, count: int) -> range:
    """Return a seed for each image, none of them of the profile's runs."""
    seeds = range(first, first + count)
    if set(seeds) & set(subject.seeds):
        start = max(subject.seeds) + 1
        return range(start, start + count)
    return seeds


def _compared(subject: Subject, space: "Space", goal: "Goal", found: "Found") -> "list[tuple[str, Schedule]]":
    """Return what was found, what the method gives without a search, and the plainest schedule, at one cost."""
    from dicache.calibrate import CalibrationError
    from dicache.calibrate.judging import evenly_spaced

    cost = found.score.macs_fraction
    compared = [(FOUND, found.schedule)]
    try:
        compared.append((PLAIN, space.schedule(space.plain(goal.max_macs or cost))))
    except CalibrationError as error:
        click.echo(f"Without a search: {error}", err=True)
    even = evenly_spaced(subject.anatomy, subject.target, subject.steps, cost)
    return [*compared, ("evenly spaced", even)]


def _summary(result: "Result") -> dict[str, Any]:
    return {
        "schedule": result.name,
        "steps": result.steps,
        "computed_steps": round(result.computed_steps, 2),
        "macs_fraction": round(result.macs_fraction, 4),
        "psnr": {name: round(value, 3) for name, value in result.psnr.to_json().items()},
    }


def _told(found: "Found", goal: "Goal", options: Searching, results: "Sequence[Result]") -> str:
    best, *others = results
    psnr, macs = found.score.psnr, found.score.macs_fraction
    lines = [
        f"Searched for {goal}: {found.trials} trials, {found.feasible} of them within it"
        + (f", {found.pruned} stopped early" if found.pruned else "")
        + (f"; {found.not_run} more points needed no run" if found.not_run else ""),
        f"  {'each schedule that differs was tried' if found.enumerated else 'drawn by TPE'}; all trials computed "
        f"as much as {found.spent:.1f} uncached images",
        f"  best: {_in_words(found.parameters)}",
        f"  {psnr:.1f} dB at {macs:.3f} of the MACs on the {options.runs} runs of the search",
        "What nothing beats in both, on these runs:",
        front_table(found),
        f"On {options.runs} runs that the search did not see:",
        results_table(results, page_width()),
    ]
    for result in results:
        if goal.max_macs is not None and result.name in (FOUND, PLAIN) and result.macs_fraction > goal.max_macs + 5e-4:
            share = result.macs_fraction
            lines.append(f"There {result.name!r} computes {share:.3f} of the MACs, more than {goal.max_macs:.3f}.")
    if goal.min_psnr is not None and best.psnr.mean < goal.min_psnr:
        lines.append(f"There it has {best.psnr.mean:.1f} dB, below {goal.min_psnr:g}; search with more --runs.")
    better = [r.name for r in others if r.macs_fraction <= best.macs_fraction + 0.01 and r.psnr.mean > best.psnr.mean]
    if any((r.macs_fraction, r.psnr) == (best.macs_fraction, best.psnr) for r in others if r.name == PLAIN):
        lines.append("No trial was better than calibrating without a search.")
    if better:
        lines.append(f"At no higher cost these are closer to the uncached images: {', '.join(better)}.")
    return "\n".join(lines)


def front_table(found: "Found") -> str:
    """Return the Pareto front as text, the cheapest first, with the best by the goal marked."""
    rows = [
        [
            _in_words(tried.parameters) + (" (best)" if tried.parameters == found.parameters else ""),
            f"{tried.score.macs_fraction:.3f}",
            f"{tried.score.psnr:.1f}",
        ]
        for tried in found.front
    ]
    return table(["", "MACs", "PSNR dB"], rows, page_width())


def _in_words(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in parameters.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
