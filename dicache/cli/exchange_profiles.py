"""`dicache profiles export` and `import`: measurements in the forms that other projects fit from."""

from pathlib import Path

import click

from dicache.cli.command import Command, json_option, model_option, show_json
from dicache.cli.profiles import newest

FORMS = ("teacache-pairs", "magcache", "smoothcache-errors", "sglang-rows")


@click.command("export", cls=Command)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--to", "name", required=True, type=click.Choice(FORMS))
@click.option(
    "--fit-to",
    type=click.Choice(["output", "body", "residual"]),
    default="output",
    show_default=True,
    help="For pairs and rows: whose change the change of the modulated input is set against.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="[default: FILE.FORMAT.json]")
@json_option
def export_profile(file: Path | None, name: str, fit_to: str, output: Path | None, as_json: bool) -> None:
    """Write what a profile has measured in the form of another project; the newest in ./profiles without FILE."""
    from dicache.formats.files import as_json as written
    from dicache.formats.measurements import MEASUREMENTS
    from dicache.profiler.storage import load

    file = file or newest()
    profile, form = load(file), MEASUREMENTS[name]
    output = output or file.with_name(f"{file.stem}.{name}.json")
    output.write_text(written(form.make(profile, fit_to)), encoding="utf-8")
    runs = sum(run.ok for run in profile.runs)
    if as_json:
        show_json({"file": str(output), "format": name, "runs": runs, "steps": profile.steps, "source": form.source})
        return
    click.echo(f"Wrote {output}: {form.holds}; {runs} runs of {profile.steps} steps of {profile.provenance.model}")


@click.command("import", cls=Command)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--from", "name", required=True, type=click.Choice(["sglang-rows"]))
@model_option()
@click.option("--steps", type=click.IntRange(1), help="Inference steps.  [default: the model's usual]")
@click.option("--scheduler", help="The sampler that they were made with.  [default: the model's]")
@click.option("--expert", default="single", show_default=True, help="Which of two models that share the steps.")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The profile.")
@json_option
def import_profile(
    files: tuple[Path, ...],
    name: str,
    model: str,
    steps: int | None,
    scheduler: str | None,
    expert: str,
    output: Path,
    as_json: bool,
) -> None:
    """Make a profile of the row files of SGLang's TeaCache calibration, a run a file.

    It holds the changes that TeaCache is calibrated from, and nothing else. It is bound to the sampler's steps, and not
    to the weights, which the files do not tell.
    """
    from dataclasses import replace

    from dicache.cli.calibrating import subject_of
    from dicache.formats import Given
    from dicache.formats.sglang_rows import records_of
    from dicache.profiler.describing import target_of
    from dicache.profiler.storage import append, create

    subject = subject_of(None, model, steps, scheduler=scheduler)
    whole = target_of(subject.pipeline, subject.anatomy, subject.sampling)
    target = replace(whole, weights=None, dtype=None, latents=None, guidance=None)
    provenance, records = records_of(files, Given(model, subject.anatomy, target, subject.steps), expert)
    create(output, provenance)
    for record in records:
        append(output, record)
    if as_json:
        show_json({"profile": str(output), "runs": len(records), "steps": subject.steps})
        return
    click.echo(f"Wrote {output}: {len(records)} runs of {subject.steps} steps of {model}, each the mean of a file")
    if len(records) < 2:
        click.echo("A fit is judged on runs that it does not see: import two files or more to calibrate TeaCache")
    else:
        click.echo(f"Next: dicache calibrate teacache --target-speedup 1.8 --profile {output}")
