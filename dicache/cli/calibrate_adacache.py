"""`dicache calibrate adacache`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicache.cli.calibrating import output_option, profile_and_write, profile_option, share_of, target_options
from dicache.cli.command import Command, Numbers, json_option
from dicache.cli.searching import search_options

if TYPE_CHECKING:
    from dicache.schedules import Schedule


@click.command(cls=Command)
@click.option(
    "--codebook", help="Pairs of a limit and a rate in steps: 0.03:12,0.05:10,1:3. The last limit has no effect."
)
@click.option(
    "--preset",
    type=click.Choice(["slow", "fast", "long"]),
    help="A published codebook: two are for 30 steps of Open-Sora, `long` for 100.",
)
@target_options
@click.option(
    "--decision-block",
    type=Numbers(least=0),
    help="Blocks to decide by: 13, or 13,20.  [default: those of the profile]",
)
@click.option(
    "--branch",
    type=click.Choice(["attn", "rest", "block"]),
    default="attn",
    show_default=True,
    help="Part of these blocks to decide by: what the attention adds, what all behind it adds, or both.",
)
@click.option("--motion/--no-motion", default=True, show_default=True, help="Compute fast videos more often.")
@click.option("--published-motion", is_flag=True, help="Take the constants of Open-Sora, not those of the profile.")
@profile_option
@search_options
@output_option
@json_option
def adacache(
    codebook: str | None,
    preset: Any,
    target_speedup: float | None,
    max_macs: float | None,
    decision_block: tuple[int, ...] | None,
    branch: Any,
    motion: bool,
    published_motion: bool,
    profile_file: Path | None,
    output: Path | None,
    as_json: bool,
    **searching: Any,
) -> None:
    """Hold everything for some steps, by how much a block's output has changed (arXiv 2411.02397).

    With --target-speedup or --max-macs all limits of the codebook are scaled to reach it; without a codebook, those of
    the published one that errs least. With nothing given it aims at 1.8 times fewer MACs. With --search it tries
    codebooks, what is measured and whether motion counts on real runs; what is given on the command line is kept.
    """
    from dicache.calibrate.adacache import USUAL_SPEEDUP, AdaCache, AdaCacheSpace

    share = share_of(target_speedup, max_macs)
    pairs = () if codebook is None else read_codebook(codebook)
    if codebook is None and preset is None and share is None and searching["min_psnr"] is None:
        share = 1 / USUAL_SPEEDUP
    if published_motion and not motion:
        raise click.UsageError("--published-motion goes with --motion")
    speedup = target_speedup or (None if share is None else 1 / share)
    if searching["wanted"]:
        speedup = speedup or USUAL_SPEEDUP
    settings = AdaCache(
        pairs,
        preset,
        speedup,
        decision_block or (),
        branch,
        "published" if published_motion else "profile" if motion else "none",
    )
    profile_and_write(settings, AdaCacheSpace, searching, profile_file, output, as_json, told_of, share)


def read_codebook(text: str) -> tuple[tuple[float, int], ...]:
    """Read `0.03:12,0.05:10`."""
    try:
        return tuple((float(limit), int(rate)) for limit, rate in (part.split(":") for part in text.split(",")))
    except ValueError:
        raise click.UsageError(f"--codebook takes pairs such as 0.03:12,0.05:10,1:3, found {text!r}") from None


def told_of(schedule: "Schedule") -> str:
    """Say what was fitted."""
    from dicache.schedules import AdaCachePolicy

    policy, found = schedule.policy, schedule.measured
    assert isinstance(policy, AdaCachePolicy)
    lines = [
        f"Foreseen on {found['runs']} runs: {found['computed_steps']:g} steps computed, {found['fewest_steps']} to "
        f"{found['most_steps']}; relative change of the residual from the step that stands in "
        + ("not known" if found["residual_error"] is None else f"{found['residual_error']:.4f}")
    ]
    if policy.motion is not None:
        lines.append(
            f"The motion factor is 1 at a motion of {policy.motion.scale:.3g}, power {policy.motion.power:.3g}"
        )
    elif not found["frames"]:
        lines.append("No frames in the latents, or none that can be told apart: the motion factor is 1")
    return "\n".join(lines)
