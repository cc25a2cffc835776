"""`dicache calibrate taylorseer | faster-diffusion | smoothcache | magcache | pab | tgate | eoc`: they make plans."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from dicache.cli.calibrating import (
    output_option,
    plan_and_write,
    profile_and_write,
    profile_option,
    search_and_write,
    search_with_target_options,
    subject_of,
    subject_options,
    write_schedule,
)
from dicache.cli.command import Command, json_option
from dicache.cli.profiles import newest
from dicache.cli.searching import Searching, Subject, given_options


@click.command(cls=Command)
@click.option("--interval", type=int, default=3, show_default=True, help="Steps from one computation to the next.")
@click.option(
    "--order", type=int, default=3, show_default=True, help="Order of the expansion; 0 holds the last output."
)
@click.option("--warm-up", type=int, default=2, show_default=True, help="Steps at the start that are computed.")
@click.option(
    "--granularity",
    type=click.Choice(["branch", "body"]),
    default="branch",
    show_default=True,
    help="What is foretold: each branch's output, or the change that all blocks make together.",
)
@click.option(
    "--anchor",
    type=click.Choice(["reference", "diffusers"]),
    default="reference",
    show_default=True,
    help="How the interval is counted: as the authors' code or as diffusers does.",
)
@subject_options
@search_with_target_options
@output_option
@json_option
def taylorseer(
    interval: int,
    order: int,
    warm_up: int,
    granularity: Any,
    anchor: Any,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
    **searching: Any,
) -> None:
    """Compute every few steps, and predict the outputs in between by a Taylor expansion (arXiv 2503.06923)."""
    from dicache.calibrate.taylorseer import TaylorSeer, TaylorSeerSpace

    settings = TaylorSeer(interval, order, warm_up, granularity, anchor)
    plan_and_write(settings, TaylorSeerSpace, searching, profile_file, model, steps, output, as_json)


@click.command("faster-diffusion", cls=Command)
@click.option("--interval", type=int, default=2, show_default=True, help="Steps from one full computation to the next.")
@click.option("--blocks", type=int, help="How many of the first blocks are skipped in between.  [default: half]")
@subject_options
@search_with_target_options
@output_option
@json_option
def faster_diffusion(
    interval: int,
    blocks: int | None,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
    **searching: Any,
) -> None:
    """Skip the first blocks at most steps, and go on from the feature map that they last made (arXiv 2312.09608)."""
    from dicache.calibrate.faster_diffusion import FasterDiffusion, FasterDiffusionSpace

    settings = FasterDiffusion(interval, blocks)
    plan_and_write(settings, FasterDiffusionSpace, searching, profile_file, model, steps, output, as_json)


@click.command(cls=Command)
@click.option("--alpha", type=float, help="Largest relative error of what is reused, such as 0.15.")
@profile_option
@search_with_target_options
@output_option
@json_option
def smoothcache(
    alpha: float | None, profile_file: Path | None, output: Path | None, as_json: bool, **searching: Any
) -> None:
    """Reuse each kind of branch while its measured change stays below a threshold (arXiv 2411.10510).

    It looks as many steps ahead as the profile has lags (`dicache profile --lags`).
    """
    from dicache.calibrate.smoothcache import USUAL_ALPHA, SmoothCache, SmoothCacheSpace

    if (alpha is None) != searching["wanted"]:
        raise click.UsageError("give either --alpha or --search, which finds it")
    settings = SmoothCache(USUAL_ALPHA if alpha is None else alpha)
    profile_and_write(settings, SmoothCacheSpace, searching, profile_file, output, as_json)


@click.command(cls=Command)
@click.option("--threshold", type=float, default=0.12, show_default=True, help="Limit of the accumulated error.")
@click.option("--max-skip", type=int, default=2, show_default=True, help="Most steps skipped in a row.")
@click.option("--retention", type=float, default=0.2, show_default=True, help="Share of the steps computed at first.")
@click.option("--never-skip", default="", help="Other steps that are always computed, separated by commas.")
@profile_option
@search_with_target_options
@output_option
@json_option
def magcache(
    threshold: float,
    max_skip: int,
    retention: float,
    never_skip: str,
    profile_file: Path | None,
    output: Path | None,
    as_json: bool,
    **searching: Any,
) -> None:
    """Skip the body while its residual's magnitude changes little (arXiv 2506.09045)."""
    from dicache.calibrate.magcache import MagCache, MagCacheSpace

    try:
        steps = tuple(int(part) for part in never_skip.split(",") if part.strip())
    except ValueError:
        raise click.UsageError(f"--never-skip takes steps such as 11 or 11,20, found {never_skip!r}") from None
    settings = MagCache(threshold, max_skip, retention, steps)
    profile_and_write(settings, MagCacheSpace, searching, profile_file, output, as_json)


@click.command(cls=Command)
@click.option(
    "--ranges",
    help="Kinds of branch, each computed once in so many steps: attn=2,cross_attn=6. "
    "Of one list of blocks: temporal_transformer_blocks.attn=4.",
)
@click.option("--window", default="100-800", show_default=True, help="Timesteps between which branches are reused.")
@subject_options
@search_with_target_options
@output_option
@json_option
def pab(
    ranges: str | None,
    window: str,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
    **searching: Any,
) -> None:
    """Reuse each kind of attention over a range of its own, in the middle of the sampling (arXiv 2408.12588)."""
    from dicache.anatomy.clock import timesteps
    from dicache.calibrate.pab import USUAL_RANGES, Pab, PabSpace

    search = Searching(**searching)
    if ranges is None and not search.wanted:
        raise click.UsageError("give --ranges, or --search, which finds them")
    low, _, high = window.partition("-")
    try:
        lengths = (
            USUAL_RANGES
            if ranges is None
            else {kind.strip(): int(n) for kind, _, n in (part.partition("=") for part in ranges.split(","))}
        )
    except ValueError:
        raise click.UsageError(f"--ranges takes branches and numbers such as attn=2,mlp=3, found {ranges!r}") from None
    try:
        bounds = float(low), float(high)
    except ValueError:
        raise click.UsageError(f"--window takes two timesteps such as 100-800, found {window!r}") from None
    settings, given = Pab(lengths, bounds), given_options()

    def space_of(subject: Subject, _: object) -> PabSpace:
        times = subject.target.timesteps or timesteps(subject.pipeline.scheduler)
        return PabSpace(subject.anatomy, subject.target, subject.steps, settings, given, times)

    if search.wanted:
        return search_and_write(search, "pab", space_of, profile_file, model, steps, output, as_json)
    subject = subject_of(profile_file, model, steps)
    return write_schedule(space_of(subject, None).made(settings), "", subject.model, output, as_json)


@click.command(cls=Command)
@click.option("--gate", type=int, default=10, show_default=True, help="First step at which cross-attention is held.")
@click.option(
    "--sp-interval", type=int, default=5, show_default=True, help="Steps between self-attentions before the gate."
)
@click.option(
    "--fi-interval",
    type=int,
    default=1,
    show_default=True,
    help="Rhythm of self-attention from the gate on; 1 computes it always.",
)
@click.option("--warm-up", type=int, default=2, show_default=True, help="Steps at the start that are computed.")
@click.option(
    "--after-gate",
    type=click.Choice(["single", "guided"]),
    default="single",
    show_default=True,
    help="What to do with guidance behind the gate: one pass with the mean of what both held, or both as before.",
)
@subject_options
@search_with_target_options
@output_option
@json_option
def tgate(
    gate: int,
    sp_interval: int,
    fi_interval: int,
    warm_up: int,
    after_gate: Any,
    profile_file: Path | None,
    model: str | None,
    steps: int | None,
    output: Path | None,
    as_json: bool,
    **searching: Any,
) -> None:
    """Hold cross-attention from a gate on, and compute one guidance pass from there (arXiv 2404.02747).

    For models with cross-attention, such as PixArt. Published are --gate 15 --sp-interval 3 for 25 steps of PixArt, and
    --gate 1 --sp-interval 1 --warm-up 0 for 4 steps of its LCM.
    """
    from dicache.calibrate.tgate import TGate, TGateSpace

    settings = TGate(gate, sp_interval, fi_interval, warm_up, after_gate)
    plan_and_write(settings, TGateSpace, searching, profile_file, model, steps, output, as_json)


@click.command(cls=Command)
@click.option("--base", type=click.Path(path_type=Path), required=True, help="The schedule whose outputs to correct.")
@click.option("--weight", type=float, default=0.01, show_default=True, help="Weight of the trend.")
@click.option("--first-steps", type=int, help="Correct only in the first so many steps.  [default: all]")
@click.option(
    "--position-weight", type=float, default=1.0, show_default=True, help="Weight of early steps in the score."
)
@click.option("--threshold", type=float, default=0.0, show_default=True, help="Score above which a block is corrected.")
@click.option("--branches", help="Kinds of branch to correct, separated by commas: attn,mlp.  [default: all]")
@click.option(
    "--form",
    type=click.Choice(["multiply", "add"]),
    default="multiply",
    show_default=True,
    help="Correct what is held, C, to C * (1 + weight * T) or to C + weight * T.",
)
@profile_option
@search_with_target_options
@output_option
@json_option
def eoc(
    base: Path,
    weight: float,
    first_steps: int | None,
    position_weight: float,
    threshold: float,
    branches: str | None,
    form: Any,
    profile_file: Path | None,
    output: Path | None,
    as_json: bool,
    **searching: Any,
) -> None:
    """Correct what a schedule reuses by how each branch's mean output changes (arXiv 2501.19243).

    The profile needs priors: `dicache profile --priors`, or `--priors-for` with the base schedule. What is needed of
    them is written beside the schedule, into a safetensors file of its name. With --search it tries weights, scores and
    first steps on real runs; without a target for those that are closest to the uncached images.
    """
    from dicache.calibrate.eoc import Eoc, EocSpace
    from dicache.profiler.storage import load, load_prior
    from dicache.schedules import Schedule

    kinds = tuple(part.strip() for part in branches.split(",")) if branches else ()
    settings = Eoc(weight, form, first_steps, position_weight, threshold, kinds)
    held = Schedule.load(base)
    file = profile_file or newest()
    profile, prior = load(file), partial(load_prior, file)
    search = Searching(**searching)
    if search.wanted:
        # What is computed is the base's, so without another goal the images are to be as good as they can be for that.
        bare = all(goal is None for goal in (search.min_psnr, search.target_speedup, search.max_macs))
        space = EocSpace(profile, settings, given_options(), base=held, prior=prior)
        share = 1.0 if bare else None
        return search_and_write(search, "eoc", lambda *_: space, file, None, None, output, as_json, share)
    schedule = settings.calibrate(profile, held, prior)
    found = schedule.measured
    told = (
        f"Corrects {found['corrected']} of the {found['held']} outputs that {base} holds, "
        f"with {found['correction_bytes'] / 1e6:.3g} MB of trends"
    )
    return write_schedule(schedule, told, profile.provenance.model, output, as_json)
