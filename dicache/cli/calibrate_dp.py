"""`dicache calibrate dp`: the exact planner."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicache.cli.calibrating import output_option, profile_option, share_of, target_options, write_schedule
from dicache.cli.command import Command, json_option
from dicache.cli.profiles import newest

if TYPE_CHECKING:
    from dicache.schedules import Schedule


@click.command(cls=Command)
@click.option("--steps-computed", type=int, help="How many steps are computed, whichever they are.")
@target_options
@click.option(
    "--predictor",
    type=click.Choice(["taylor", "hold", "forecast"]),
    default="taylor",
    show_default=True,
    help="What stands in for what is not computed.",
)
@click.option(
    "--order", type=int, help="Order of the Taylor expansion, 0 to 2, or of the forecast, 1 to 4.  [default: 1, 3]"
)
@click.option(
    "--granularity",
    type=click.Choice(["body", "branch"]),
    default="body",
    show_default=True,
    help="What is computed or not: all blocks, or their branches.",
)
@click.option(
    "--together/--separate",
    default=True,
    show_default=True,
    help="Compute all branches at the same steps, or each kind at its own.",
)
@click.option(
    "--aggregate",
    type=click.Choice(["norms", "squares"]),
    default="norms",
    show_default=True,
    help="What is added up over the steps: relative errors, or their squares.",
)
@click.option(
    "--weigh",
    type=click.Choice(["none", "solver"]),
    default="none",
    show_default=True,
    help="With hold and taylor: weigh each step's error by what the solver makes of it.",
)
@click.option("--warm-up", type=int, default=1, show_default=True, help="Steps at the start that are computed.")
@click.option("--force-last/--no-force-last", default=False, show_default=True, help="Compute the last step.")
@click.option("--max-gap", type=int, help="Most steps from a computed one to the next.  [default: no limit]")
@click.option(
    "--own", type=float, default=0.1, show_default=True, help="With forecast: weight of each step's own error."
)
@click.option("--reaction", type=float, default=1.0, show_default=True, help="With forecast: how far held outputs err.")
@click.option(
    "--variance", type=float, default=0.1, show_default=True, help="Variance of the data, for the solver's effects."
)
@profile_option
@output_option
@json_option
def dp(
    steps_computed: int | None,
    target_speedup: float | None,
    max_macs: float | None,
    predictor: Any,
    order: int | None,
    granularity: Any,
    together: bool,
    aggregate: Any,
    weigh: Any,
    warm_up: int,
    force_last: bool,
    max_gap: int | None,
    own: float,
    reaction: float,
    variance: float,
    profile_file: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Compute the steps that leave the smallest error at all others, found exactly (DPCache, arXiv 2602.22654).

    The profile foretells the error of every step after any choice of computed steps, by holding or by a Taylor
    expansion; dynamic programming takes the best of all choices for a number of steps or a share of the MACs.
    A forecast is a sum of the last outputs with weights that keep small what all skipped steps together leave in the
    latents, by the solver's own coefficients; its steps are found by local search.
    """
    from dicache.calibrate.dp import Dp
    from dicache.profiler.storage import load

    share = share_of(target_speedup, max_macs)
    if (steps_computed is None) == (share is None):
        raise click.UsageError("give one of --steps-computed, --target-speedup and --max-macs")
    settings = Dp(
        steps_computed,
        share,
        predictor,
        order,
        granularity,
        together,
        aggregate,
        weigh,
        warm_up,
        force_last,
        max_gap,
        own,
        reaction,
        variance,
    )
    profile = load(profile_file or newest())
    schedule = settings.calibrate(profile)
    write_schedule(schedule, _told(schedule), profile.provenance.model, output, as_json)


def _told(schedule: "Schedule") -> str:
    """Return what was chosen, and what error it is expected to make, a line for each chain."""
    forecast = schedule.settings["predictor"] == "forecast"
    weighed = "weighed " if schedule.settings["weigh"] == "solver" and not forecast else ""
    unit = "relative error" if forecast or schedule.settings["aggregate"] == "norms" else "relative squared error"
    lines = []
    for kind, errors in schedule.measured["expected_errors"].items():
        computed = schedule.measured["computed_steps"][kind]
        told = f"{kind}: {computed} of {schedule.steps} steps computed"
        if left := schedule.steps - computed:
            step = max(range(schedule.steps), key=errors.__getitem__)
            told += (
                f"; expected {weighed}{unit} {sum(errors) / left:.3g} at the others, {errors[step]:.3g} at step {step}"
            )
        if forecast:
            told += f"; accumulated {schedule.measured['expected_accumulated'][kind][-1]:.3g} in the last latents"
        lines.append(told)
    return "\n".join(lines)
