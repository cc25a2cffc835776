"""`dicache doctor`: does caching work on this model?"""

from typing import TYPE_CHECKING, Any

import click

from dicache.cli.command import Command, json_option, model_option, page_width, painted, show_json, table

if TYPE_CHECKING:
    from dicache.anatomy import Anatomy
    from dicache.conformance.examining import Verdict


@click.command(cls=Command)
@model_option()
@click.option("--component", help="Where two models share the steps, as in Wan 2.2: transformer or transformer_2.")
@click.option("--steps", type=click.IntRange(2), default=4, show_default=True, help="Inference steps of a picture.")
@click.option("--scheduler", help="Another scheduler, by class or short name, such as dpm or ddim.")
@click.option("--guidance", type=click.FloatRange(0), help="Guidance scale.  [default: the pipeline's]")
@click.option("--height", type=click.IntRange(1), help="Height in pixels.  [default: the pipeline's]")
@click.option("--width", type=click.IntRange(1), help="Width in pixels.  [default: the pipeline's]")
@click.option("--frames", type=click.IntRange(1), help="Frames of a video.  [default: the pipeline's]")
@click.option("--device", default=None, help="Device, such as cuda or cpu.  [default: cuda if there is one]")
@click.option("--dtype", help="float32, float16 or bfloat16.  [default: float32 on cpu, else bfloat16]")
@click.option("--thorough", is_flag=True, help="Try every branch and every range of blocks, not one of each kind.")
@json_option
def doctor(
    model: str,
    component: str | None,
    steps: int,
    scheduler: str | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    device: str | None,
    dtype: str | None,
    thorough: bool,
    as_json: bool,
) -> None:
    """Show what a model is made of, and check on it the laws that caching rests on.

    Exits with 1 if one of them is broken: then no schedule is to be trusted on this model.
    """
    import sys

    from tqdm import tqdm

    from dicache.anatomy import survey
    from dicache.anatomy.inputs import capture_inputs
    from dicache.conformance import LAWS, Subject
    from dicache.conformance.examining import examine, examine_pipeline
    from dicache.models.loading import load
    from dicache.models.sampling import Sampling, default_conditions, sample
    from dicache.runtime.apply import denoiser

    pipeline = load(model, device=device, dtype=dtype, scheduler=scheduler)
    sampling = Sampling(steps, guidance, height, width, frames).usual_for(model).resolved(pipeline)
    transformer, condition = denoiser(pipeline, component), default_conditions(pipeline, 1)

    def run() -> Any:
        return sample(pipeline, condition, [0], sampling)

    inputs = capture_inputs(transformer, run)
    anatomy = survey(transformer, inputs)
    verdicts = []
    with tqdm(total=len(LAWS) + 1, desc=f"examine {model}", unit="law", file=sys.stderr, leave=False) as bar:
        for verdict in examine(Subject(transformer, inputs, anatomy, thorough)):
            verdicts.append(verdict)
            bar.update()
        verdict, passes = examine_pipeline(pipeline, anatomy, run, component)
        verdicts.append(verdict)
        bar.update()
    if as_json:
        show_json(
            {
                "model": anatomy.model,
                "anatomy": anatomy.to_json(),
                "passes": passes,
                "laws": [
                    {
                        "law": verdict.law,
                        "says": verdict.says,
                        "holds": not verdict.broken,
                        "cases": verdict.cases,
                        "seconds": round(verdict.seconds, 3),
                        "found": verdict.broken,
                    }
                    for verdict in verdicts
                ],
            }
        )
    else:
        click.echo(_described(anatomy, passes))
        click.echo()
        for verdict in verdicts:
            click.echo(_told(verdict))
        broken = sum(bool(verdict.broken) for verdict in verdicts)
        click.echo(f"\n{broken} of {len(verdicts)} laws are broken" if broken else f"\nAll {len(verdicts)} laws hold")
    if any(verdict.broken for verdict in verdicts):
        raise click.exceptions.Exit(1)


def _told(verdict: "Verdict") -> str:
    holds, style = ("BROKEN", "red") if verdict.broken else ("holds", "green") if verdict.cases else ("-", None)
    cases = f"{verdict.cases} case{'s' * (verdict.cases > 1)}" if verdict.cases else ""
    found = f"\n{'':28}found: {verdict.broken}" if verdict.broken else ""
    return f"{painted(f'{holds:<6}', fg=style)}  {cases:>9}  {verdict.seconds:5.1f} s  {verdict.says}{found}"


def _described(anatomy: "Anatomy", passes: dict[str, str]) -> str:
    from dicache.anatomy.parts import span

    rows = []
    for entry in anatomy.to_json()["blocks"]:
        work = sum(site["macs"] for site in entry["sites"].values()) / entry["macs"] if entry["macs"] else 0
        rows.append((entry["blocks"], entry["module"], entry["class"], " ".join(entry["sites"]), f"{work:.1%}"))
    blocks = sum(block.macs for block in anatomy.blocks) / anatomy.macs
    said = [
        f"{anatomy.model}: {len(anatomy.blocks)} blocks with {blocks:.1%} of its {anatomy.macs / 1e9:.4g} GMACs a call",
        "one delta may replace " + ", ".join(span(start, stop - 1) for start, stop in anatomy.segments),
        f"a step calls it {'once' if len(passes) == 1 else f'{len(passes)} times'}{_named(passes)}",
        "",
        table(("blocks", "modules", "class", "branches", "of its work"), rows, page_width()),
    ]
    return "\n".join(said)


def _named(passes: dict[str, str]) -> str:
    names = [name for name in passes if not name.isdigit()]
    return f", for {', '.join(names)}" if names else ""
