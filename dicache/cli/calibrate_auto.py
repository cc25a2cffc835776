"""`dicache calibrate auto`: the best schedule that can be found for a budget."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicache.cli.calibrating import (
    output_option,
    profile_option,
    share_of,
    subject_of_profile,
    target_options,
    write_schedule,
)
from dicache.cli.command import Command, json_option, page_width, table
from dicache.cli.evaluate import results_table
from dicache.cli.profiles import newest
from dicache.cli.searching import fresh_conditions, fresh_seeds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dicache.calibrate.auto import Best
    from dicache.evaluate.evaluation import Result

ROUNDS = 3  # of timing


@click.command(cls=Command)
@target_options
@click.option("--min-psnr", type=float, help="Find the fewest MACs for images this close, in dB, instead.")
@click.option("--max-rows", type=int, default=6, show_default=True, help="Most different rows of a plan.")
@click.option(
    "--granularity",
    type=click.Choice(["any", "body", "branch"]),
    default="any",
    show_default=True,
    help="Plans of all blocks, which hold little, or of their branches, which are often closer.",
)
@click.option("--budget", type=float, default=300.0, show_default=True, help="What to compute, in uncached images.")
@click.option(
    "--trials",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Settings of each of the best three methods to search with Optuna, beside the budget.",
)
@click.option("--storage", help="Where trials are kept, as with --search.  [default: a file beside the schedule]")
@click.option("--runs", type=click.IntRange(2), default=8, show_default=True, help="Images to try schedules on.")
@click.option("--held-out", type=click.IntRange(1), default=16, show_default=True, help="Images to judge them on.")
@click.option("--prompts", type=click.Path(dir_okay=False), help="A file with a prompt or class a line.")
@click.option("--seed", type=int, default=5000, show_default=True, help="Seed of the first image.")
@click.option("--device", help="Device, such as cuda or cpu.  [default: cuda if there is one]")
@profile_option
@output_option
@json_option
def auto(
    target_speedup: float | None,
    max_macs: float | None,
    min_psnr: float | None,
    max_rows: int,
    granularity: Any,
    budget: float,
    trials: int,
    storage: str | None,
    runs: int,
    held_out: int,
    prompts: str | None,
    seed: int,
    device: str | None,
    profile_file: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Find the best schedule for a speed-up, or the cheapest for a quality, by trying on real runs.

    It measures what leaving out each step does to the finished images, finds the steps and the weights of forecasts
    that should do least together, tries these and every method, and refines the weights of the best on what they
    really do. What was found is judged on runs that nothing was tried on. What is measured is kept in a folder beside
    the schedule, so that the same command goes on after Ctrl-C.
    """
    from dicache.calibrate.auto import Auto, AutoSearch, default_folder
    from dicache.calibrate.judging import Goal
    from dicache.evaluate.evaluation import evaluate
    from dicache.evaluate.references import default_folder as kept_references
    from dicache.profiler.storage import has_priors, load, load_prior

    share = share_of(target_speedup, max_macs)
    if (share is None) == (min_psnr is None):
        raise click.UsageError("give one of --target-speedup, --max-macs and --min-psnr")
    if storage is not None and not trials:
        raise click.UsageError("--storage goes with --trials")
    settings = Auto(Goal(share, min_psnr), max_rows, budget, granularity=granularity, trials=trials)
    file = profile_file or newest()
    profile = load(file)
    subject = subject_of_profile(profile.provenance, profile.runs)
    output = output or Path("auto.json")
    pipeline = subject.loaded(device)
    conditions = fresh_conditions(pipeline, subject, prompts, runs, held_out)
    seeds = fresh_seeds(subject, seed, runs + held_out)
    kept = default_folder(output)
    if trials and storage is None:
        kept.mkdir(parents=True, exist_ok=True)
    best = AutoSearch(
        profile,
        pipeline,
        conditions[:runs],
        list(seeds[:runs]),
        subject.sampling,
        settings,
        kept,
        partial(load_prior, file) if has_priors(file) else None,
        storage or f"sqlite:///{kept / 'trials.db'}",
    )()
    compared = [("auto", best.schedule)]
    compared += [one for one in (best.single, best.other) if one and one[0] != best.schedule.settings["form"]]
    _, results, fewer = evaluate(
        pipeline,
        compared,
        conditions[runs:],
        sampling=subject.sampling,
        seed=seeds[runs],
        timing_rounds=ROUNDS,
        references=kept_references(),
    )
    judged = [result.to_json() for result in (*results, *fewer)]
    for row in judged:
        del row["latent_error"]
    measured: dict[str, Any] = {**best.schedule.measured, "held_out": {"seeds": list(seeds[runs:]), "results": judged}}
    schedule = replace(best.schedule, measured=measured)
    write_schedule(schedule, _told(best, settings.goal, [*results, *fewer]), subject.model, output, as_json)


def _told(best: "Best", goal: Any, results: "Sequence[Result]") -> str:
    rows = [
        [
            line.name,
            f"{line.psnr:.1f}",
            f"{line.macs_fraction:.3f}",
            f"{line.spent:.0f}",
            line.steps,
            line.note,
        ]
        for line in best.report
        if line.psnr is not None
    ]
    others = [f"  {line.name}: {line.note}" for line in best.report if line.psnr is None]
    report = best.schedule.measured["auto"]
    lines = [
        f"Tried for {goal}, on {report['runs']} runs; all of it computed as much as {best.spent:.0f} uncached images:",
        table(["", "PSNR dB", "MACs", "spent", "steps", ""], rows, page_width()),
        *others,
        f"Best: {best.schedule.settings['form']}, {best.psnr:.1f} dB"
        + (f"; the best of the methods is {best.single[0]}, {best.single_psnr:.1f} dB" if best.single else ""),
        "On runs that nothing was tried on:",
        results_table(results, page_width()),
    ]
    if best.single is not None and len(results) > 1 and results[1].name == best.single[0]:
        mine, single = results[0], results[1]
        if single.psnr.mean > mine.psnr.mean and single.macs_fraction <= mine.macs_fraction:
            lines.append(f"There {best.single[0]} is closer to the uncached images; try more --runs.")
        elif single.psnr.mean <= mine.psnr.mean:
            lines.append(f"There, too, it is ahead of {best.single[0]}.")
    if best.other is not None:
        name, other = best.other
        way = "body" if other.plan is not None and other.plan.rules[0].action == "skip" else "branch"
        lines.append(f"The {name} is what --granularity {way} gives.")
    return "\n".join(lines)
