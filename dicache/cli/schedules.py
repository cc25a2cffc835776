"""`dicache schedules`: look at schedule files."""

import math
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dicache.cli.calibrating import profile_option, published_in_words
from dicache.cli.command import Group, json_option, model_option, page_width, painted, show_json
from dicache.cli.exchange import imported_in_words
from dicache.cli.profiles import newest

if TYPE_CHECKING:
    from dicache.schedules import Schedule
    from dicache.schedules.policies import Policy, TeaCachePolicy

LEGEND = "C computed, R reused, S skipped with its block; step 0 is the noisiest"
COLOURS: dict[str, dict[str, Any]] = {
    "C": {"fg": "blue", "bold": True},
    "R": {"fg": "cyan"},
    "S": {"fg": "bright_black"},
}
PASSES = "passes"  # line of a drawing with the number of guidance passes at each step


# What a policy makes of x outside the fitted range, and of a negative p(x).
NEGATIVE = {
    "clamp": ("x is held in", "a negative p(x) adds nothing"),
    "abs": ("x is held in", "a negative p(x) adds its magnitude"),
    "reference": ("x is taken as it is, also outside of", "a negative p(x) lowers the sum"),
}


@click.group(cls=Group)
def schedules() -> None:
    """Look at schedule files."""


@schedules.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def show(file: Path, as_json: bool) -> None:
    """Show which step computes what, and what the schedule is bound to."""
    from dicache.schedules import Schedule
    from dicache.schedules.drawing import alike, draw

    schedule = Schedule.load(file)
    if as_json:
        show_json(_as_json(schedule))
        return
    target = schedule.target
    settings = ", ".join(f"{k} {v}" for k, v in schedule.settings.items() if v not in (None, (), []))
    click.echo(f"{schedule.method}: {settings}" if settings else schedule.method)
    click.echo(f"{schedule.steps} steps of {schedule.anatomy.model}, {_share(schedule)}")
    bound = {k: v for k, v in target.to_json().items() if k not in ("timesteps", "noise_levels")}
    click.echo("made for " + (", ".join(f"{k} {v}" for k, v in bound.items()) or "nothing in particular"))
    if target.unbound():
        click.echo(f"does not bind {', '.join(name.replace('_', ' ') for name in target.unbound())}")
    if schedule.policy is not None:
        for line in _in_words(schedule.policy):
            click.echo(line)
    for line in (*published_in_words(schedule), *imported_in_words(schedule)):
        click.echo(line)
    if not schedule.foreseen:
        return
    for context in (*schedule.contexts, None):
        click.echo()
        if schedule.contexts:
            click.echo(f"{_pass(context)}, {_macs(schedule.macs_fraction(context))}")
        elif schedule.adaptive:
            click.echo("expected from its profile")
        click.echo(_coloured(draw([*alike(schedule.table(context)), *_passes(schedule)], page_width())))
    click.echo(f"\n{LEGEND}")
    if schedule.collapse_guidance_from is not None:
        click.echo(
            f"{PASSES}: how many guidance passes are computed, where there is guidance; else it is one throughout"
        )


@schedules.command()
@click.argument("one", metavar="A", type=click.Path(path_type=Path))
@click.argument("other", metavar="B", type=click.Path(path_type=Path))
@json_option
def diff(one: Path, other: Path, as_json: bool) -> None:
    """Show what differs between two schedule files: settings, target, steps, and what is computed when."""
    from dicache.schedules import Schedule
    from dicache.schedules.comparing import compare, in_words
    from dicache.schedules.drawing import against, alike, draw

    a, b = Schedule.load(one), Schedule.load(other)
    found = compare(a, b)
    if as_json:
        show_json(found.to_json())
        return
    if found.equal:
        click.echo(f"{one} and {other} say the same: {a.method}, {a.steps} steps of {a.anatomy.model}")
        return
    for letter, file, schedule in (("A", one, a), ("B", other, b)):
        click.echo(
            f"{letter}  {file}: {schedule.method}, {schedule.steps} steps of {schedule.anatomy.model}, "
            f"{_share(schedule)}"
        )
    for section in ("settings", "made_for", "policy", "corrections", "measured", "anatomy"):
        if pairs := found.sections[section]:
            click.echo(f"\n{section.replace('_', ' ')}")
            width = max(map(len, pairs))
            for name, pair in pairs.items():
                click.echo(f"  {name.ljust(width)}  {in_words(pair)}")
    click.echo()
    if a.collapse_guidance_from != b.collapse_guidance_from:
        ends = [
            f"{letter} from step {schedule.collapse_guidance_from}"
            for letter, schedule in (("A", a), ("B", b))
            if schedule.collapse_guidance_from is not None
        ]
        click.echo(f"One guidance pass is computed in the place of two: {', '.join(ends)}.\n")
    if found.not_compared:
        click.echo(f"What is computed at which step is not compared: {found.not_compared}.")
    elif a.steps != b.steps:
        click.echo("What is computed is not compared step by step, as the numbers of steps differ.")
    elif not found.sites and not any(found.sites_by_context.values()):
        foreseen = "it is expected that every" if a.adaptive or b.adaptive else "every"
        rules = ", by rules that are written differently" if found.sections["plan"] else ""
        click.echo(f"{foreseen} site is computed, reused and skipped at the same steps{rules}.".capitalize())
    else:
        for context, sites in (*found.sites_by_context.items(), (None, found.sites)):
            if not sites:
                continue
            where = f"{_pass(context)}: " if found.sites_by_context else ""
            steps = sum(any(x[i] != y[i] for x, y in sites.values()) for i in range(a.steps))
            click.echo(f"{where}{len(sites)} of {len(a.anatomy.sites)} sites differ, at {steps} of {a.steps} steps")
            theirs = b.table(context)
            rows = alike({key: (letters, theirs[key]) for key, letters in a.table(context).items()})
            click.echo(_coloured(draw(against([row for row in rows if row[1][0] != row[1][1]]), page_width())) + "\n")
        click.echo(LEGEND)


@schedules.command()
@click.argument("file", type=click.Path(path_type=Path))
@profile_option
@click.option(
    "--vote",
    type=click.Choice(["majority", "any", "typical"]),
    default="majority",
    show_default=True,
    help="A step is computed if half of the profile's runs compute it, if any does, or if the most typical run does.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="[default: FILE-frozen.json]")
@json_option
def freeze(file: Path, profile_file: Path | None, vote: Any, output: Path | None, as_json: bool) -> None:
    """Turn a schedule that decides at run time into a plan, by its decisions on the runs of a profile."""
    from dicache.calibrate.freezing import freeze as frozen
    from dicache.profiler.storage import load
    from dicache.schedules import Schedule

    schedule = Schedule.load(file)
    plan = frozen(schedule, load(profile_file or newest()), vote)
    output = output or file.with_name(f"{file.stem}-frozen.json")
    plan.save(output)
    found = plan.measured
    agreement = found["agreement"]
    if as_json:
        show_json({"schedule": str(output), "macs_fraction": plan.macs_fraction(), **found})
        return
    click.echo(f"Wrote {output}: {plan.method}, {plan.steps} steps, {plan.macs_fraction():.3f} of the MACs")
    assert plan.plan is not None
    click.echo(
        f"  {len(plan.plan.computed_steps)} steps computed in every pass; decided at run time, "
        f"{found['adaptive_computed_steps']:g} on average"
    )
    least = min(range(len(agreement)), key=agreement.__getitem__)
    told = f"; at step {least}, {agreement[least]:.0%} decide as the plan does" if agreement[least] < 1 else ""
    click.echo(f"  all {found['runs']} runs decide alike at {agreement.count(1.0)} of {plan.steps} steps{told}")
    if "residual_error" in found:
        click.echo(
            f"  relative change of the residual from the step that stands in: {found['residual_error']:.4f}; decided "
            f"at run time, {found['adaptive_residual_error']:.4f}"
        )
    click.echo(f"Next: dicache evaluate --model {found['model']} --schedule {file} --schedule {output}")


@schedules.command()
@json_option
def schema(as_json: bool) -> None:
    """Print the JSON Schema of schedule files, with or without --json."""
    from dicache.schedules.schema import schema_text

    click.echo(schema_text(), nl=False)


@schedules.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_option(required=False)
@json_option
def validate(files: tuple[Path, ...], model: str | None, as_json: bool) -> None:
    """Check schedule files, and with --model that they fit it."""
    from dicache.schedules import Schedule

    read = [(file, Schedule.load(file)) for file in files]
    if model is not None:
        from dicache.models.loading import load
        from dicache.models.sampling import Sampling, default_conditions, sample
        from dicache.runtime import apply

        pipeline = load(model)
        condition = default_conditions(pipeline, 1)
        for _, schedule in read:
            made_for = schedule.target
            sampling = Sampling(made_for.num_inference_steps or schedule.steps, made_for.guidance).usual_for(model)
            with apply(pipeline, schedule) as cache:  # refuses when the pipeline sets its timesteps
                cache.known = _break_off
                with suppress(_Fits):
                    sample(pipeline, condition, [0], sampling)
    if as_json:
        show_json({"valid": [str(file) for file in files]})
        return
    for file, schedule in read:
        fits = f", fits {model}" if model else ""
        click.echo(f"{file}: valid, {schedule.method}, {schedule.steps} steps{fits}")


class _Fits(BaseException):  # past the pipeline's own `except Exception`
    pass


def _break_off(step: int) -> None:
    raise _Fits


def _as_json(schedule: "Schedule") -> dict[str, Any]:
    content = {
        "method": schedule.method,
        "settings": dict(schedule.settings),
        "num_inference_steps": schedule.target.num_inference_steps or schedule.steps,
        "steps": schedule.steps,
        "adaptive": schedule.adaptive,
        "macs_fraction": _known(schedule.macs_fraction()),
        "made_for": schedule.target.to_json(),
        "unbound": list(schedule.target.unbound()),
        "measured": dict(schedule.measured),
        "sites": schedule.table(),
    }
    if schedule.collapse_guidance_from is not None:
        content["collapse_guidance_from"] = schedule.collapse_guidance_from
        content["macs_fraction_unguided"] = _known(schedule.macs_fraction(guided=False))
    if schedule.contexts:  # what stands above is for the passes without rules of their own
        content["macs_fraction_by_context"] = {c: _known(schedule.macs_fraction(c)) for c in schedule.contexts}
        content["sites_by_context"] = {c: schedule.table(c) for c in schedule.contexts}
    return content


def _known(fraction: float) -> float | None:
    return None if math.isnan(fraction) else fraction


def _coloured(drawing: str) -> str:
    """Return a drawing with its letters coloured."""

    def run(letters: "re.Match[str]") -> str:
        return painted(letters[0], **COLOURS[letters[0][0]])

    return re.sub(r"(?<=  )[CRS]+$", lambda row: re.sub(r"C+|R+|S+", run, row[0]), drawing, flags=re.MULTILINE)


def _passes(schedule: "Schedule") -> list[tuple[str, str]]:
    start = schedule.collapse_guidance_from
    return [] if start is None else [(PASSES, "2" * start + "1" * (schedule.steps - start))]


def _pass(context: str | None) -> str:
    return "any other pass" if context is None else f"pass {context}"


def _share(schedule: "Schedule") -> str:
    if schedule.contexts:
        return "passes treated differently"
    if schedule.adaptive and "macs_fraction" not in schedule.measured:
        return "how much of the MACs is decided at run time"
    share = _macs(schedule.macs_fraction())
    if schedule.collapse_guidance_from is not None:
        return f"{share} with guidance, {_macs(schedule.macs_fraction(guided=False))} without"
    return share + (" expected" if schedule.adaptive else "")


def _macs(fraction: float) -> str:
    return "MACs not known" if math.isnan(fraction) else f"{fraction:.3f} of the MACs"


def _in_words(policy: "Policy") -> list[str]:
    """Return what a policy decides by, in lines."""
    from dicache.anatomy.parts import span
    from dicache.schedules import AdaCachePolicy, FirstBlockPolicy, TeaCachePolicy

    if isinstance(policy, AdaCachePolicy):
        of = {"attn": "what the attention adds in", "rest": "what is behind the attention in", "block": "all of"}
        lines = [
            f"decides at run time: {policy.limit} on the change of {of[policy.branch]} "
            f"block {', '.join(map(str, policy.decision_blocks))}"
        ]
        if (motion := policy.motion) is not None:
            lines.append(
                f"times a factor of motion: M + |{motion.gradient:g} * change of M / rate|, "
                f"M = (m / {motion.scale:.4g}) ^ {motion.power:g}"
            )
        return lines
    if isinstance(policy, TeaCachePolicy):
        low, high = policy.input_range
        range_held, added = NEGATIVE[policy.negative]
        return [
            f"decides at run time: {policy.limit} on the sum of p(x), p = {_polynomial(policy)}",
            f"{range_held} [{low:.4g}, {high:.4g}]; {added}",
        ]
    if isinstance(policy, FirstBlockPolicy):
        blocks = "block 0" if policy.first == 1 else f"blocks {span(0, policy.first - 1)}"
        limits = [
            f"at most {count} steps skipped {where}"
            for count, where in ((policy.max_continuous, "in a row"), (policy.max_cached, "in all"))
            if count is not None
        ]
        equal = "computes" if policy.at_threshold == "compute" else "skips"
        return [
            f"decides at run time: {policy.limit} on the relative change of what {blocks} add"
            f"{'s' if policy.first == 1 else ''} since the last computed step",
            "; ".join([f"what equals it {equal}", *limits]),
        ]
    return [f"decides at run time: {policy.limit}"]


def _polynomial(policy: "TeaCachePolicy") -> str:
    coefficients = policy.coefficients
    powers = range(len(coefficients) - 1, -1, -1)
    terms = [
        f"{c:+.4g}" + (f" x^{p}" if p > 1 else " x" if p else "") for c, p in zip(coefficients, powers, strict=True)
    ]
    return " ".join(terms).lstrip("+")
