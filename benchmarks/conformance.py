"""The runtime's laws over every transformer class of diffusers, and what attaching a schedule to a large model takes.

python -m benchmarks.conformance classes      how many cases of each law were tried, and hold, on each class
python -m benchmarks.conformance attach       seconds to survey a model of sixty blocks and to attach a schedule to it
"""

import statistics
import time
import warnings

import click
import diffusers
import torch
from tqdm import tqdm

import dicache
from dicache.anatomy import Inputs, survey
from dicache.cli.command import table
from dicache.conformance import LAWS, Subject
from dicache.schedules import Plan, Rule, Schedule, Target
from tests.tiny import arguments, flux
from tests.transformers import TRANSFORMERS


@click.group(help=__doc__)
def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


@main.command()
def classes() -> None:
    """Try every law on every class."""
    rows = []
    for name, tiny in tqdm(TRANSFORMERS.items(), unit="model", leave=False):
        model, inputs = tiny.build(), tiny.inputs()
        subject = Subject(model, inputs, survey(model, inputs), thorough=True)
        cases = [law(subject) for law in LAWS.values()]
        branches = dict.fromkeys(" ".join(site.branch for site in block.sites) for block in subject.anatomy.blocks)
        runs = " ".join(str(stop - start) for start, stop in subject.anatomy.segments)
        rows.append((tiny.kind, name, *(str(count or "-") for count in cases), runs, ", ".join(branches)))
    kinds = len({row[0] for row in rows})
    click.echo(
        f"diffusers {diffusers.__version__}: {len(rows)} models of {kinds} classes; cases of each law; all hold\n"
    )
    rows.sort()
    header, rule, *lines = table(("class", "model", *LAWS, "segments"), [row[:-1] for row in rows]).splitlines()
    click.echo(f"{header}  branches of its blocks\n{rule}")
    for line, row in zip(lines, rows, strict=True):
        click.echo(f"{line}  {row[-1]}")


@main.command()
@click.option("--rounds", default=7, show_default=True)
def attach(rounds: int) -> None:
    """Time a survey and an attachment."""
    model = flux(single_layers=40, num_layers=20)
    inputs = Inputs((), arguments(model))
    surveying, attaching = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        anatomy = survey(model, inputs)
        middle = time.perf_counter()
        schedule = Schedule("fora", {}, anatomy, Target(), 20, Plan(20, (Rule("reuse", "C." * 10),)))
        dicache.apply(model, schedule).detach()
        surveying.append(middle - start)
        attaching.append(time.perf_counter() - middle)
    click.echo(
        f"Flux, 20 double and 40 single blocks of width 24: survey {statistics.median(surveying):.2f} s, "
        f"attach and detach {statistics.median(attaching):.3f} s (medians of {rounds})"
    )


if __name__ == "__main__":
    main()
