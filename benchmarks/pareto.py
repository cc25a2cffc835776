"""dicache beside other projects' caches and fewer steps, at equal cost: `python -m benchmarks.pareto --model digits`.

Every method and every peer is tuned alike: the settings that are tried of it, as many of each at most, make the same 8
images, and at each budget, a share of the uncached run's multiply-accumulates, the best one within it is taken. What it
makes of other prompts and seeds, which neither the profile nor the tuning saw, is told: PSNR against the uncached
images, what the model's judge says, and the time of single images beside the uncached run in the same process. What is
more than 6 dB behind the best of the others on the first of these images is told of them alone. Fewer steps are of the
model's own solver and of DPM-Solver++. There are only ten classes, so that of `digits` the seeds differ.

`auto` is run twice, once with plans of all blocks alone. It may try more than single settings, on seeds of its own of
the prompts that all are tuned on; what it computed for that is told as `spent`, in uncached images. The 50 settings
that a method may try are up to 400 images.

Peers run in an environment and a process of their own; see `benchmarks.peers`. SmoothCache's rule is run by dicache,
and so is T-GATE's, whose package knows PixArt alone of the bundled models. What does not run is told below the table.
Rows that are done are kept in `build/pareto` and are not run again. Writes a table, JSON and a figure to `results/`.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.bench import RESULTS
from benchmarks.comparing import Comparison, Runs
from benchmarks.peers import Peer, Settings, peers
from benchmarks.tuning import Method, Trial, best
from dicache.calibrate.auto import Granularity
from dicache.cli.command import table
from dicache.evaluate.quality import mean_with_interval, paired_difference
from dicache.figures import save
from dicache.figures.pareto import pareto, read_series
from dicache.models.sampling import Sampling
from dicache.schedules import Schedule

AUTO: Mapping[str, Granularity] = {"auto": "any", "auto, blocks": "body"}
OWN_STEPS, OTHER_STEPS = "fewer steps", "DPM-Solver++"
SLACK = 0.005  # of a share of the MACs
FAR_BEHIND = 6.0  # dB on the first images, several times what the means of so many differ by chance


@dataclass
class Row:
    """One method or peer at one budget.

    Attributes:
        name: Of the method.
        source: As figures have it: `dicache`, `peer` or `steps`.
        budget: Share of the MACs that it is not to exceed.
        settings: All of them.
        told: Those that were tuned.
        made: What it made of the judged runs; see `Comparison.row`.
        speedup: Measured, once it was.
    """

    name: str
    source: str
    budget: float
    settings: Mapping[str, Any]
    told: Mapping[str, Any]
    made: Mapping[str, Any]
    speedup: float | None = None

    @property
    def key(self) -> str:
        """The same where the same thing was chosen at two budgets."""
        return f"{self.name} {json.dumps(self.settings, sort_keys=True, default=str)}"


def varied(grid: Sequence[Settings], settings: Settings) -> dict[str, Any]:
    """Return those settings that differ over a grid."""
    return {name: value for name, value in settings.items() if any(other[name] != value for other in grid)}


@dataclass(frozen=True)
class Contender:
    """The settings of a method or a peer that are the best within a budget, by the tuning runs."""

    budget: float
    of: Method | Peer
    settings: Settings

    def row(self, made: Mapping[str, Any]) -> Row:
        source = "peer" if isinstance(self.of, Peer) else "dicache"
        return Row(self.of.name, source, self.budget, self.settings, varied(self.of.grid, self.settings), made)


def tuned(comparison: Comparison, failed: list[str]) -> list[Contender]:
    """Return what is chosen of every method and every peer at every budget; what is not to be had is told."""
    with ThreadPoolExecutor(1) as beside:  # the peers have a process of their own
        promised = beside.submit(comparison.tuned_peers)
        every: list[tuple[Method | Peer, list[Trial], str]] = [*comparison.tuned_methods(), *promised.result()]
    found = []
    for one, trials, why in every:
        if why:
            failed.append(f"{one.name}: {why}")
            continue
        for budget in comparison.budgets:
            chosen = best(trials, budget)
            if chosen is not None:
                found.append(Contender(budget, one, chosen.settings))
            else:
                least = min(trial.macs_fraction for trial in trials)
                failed.append(f"{one.name}: {budget:g} not reached; {least:.3f} is the least that was tried")
    return found


def made_by(comparison: Comparison, contenders: Sequence[Contender], runs: Runs) -> list[Mapping[str, Any]]:
    """Return what each makes of some runs."""
    theirs = [(one.of, one.settings) for one in contenders if isinstance(one.of, Peer)]
    with ThreadPoolExecutor(1) as beside:
        promised = beside.submit(comparison.of_peers, theirs, runs)
        ours = [None if isinstance(one.of, Peer) else comparison.ours(one.of, one.settings, runs) for one in contenders]
        rest = iter(promised.result())
    return [next(rest) if made is None else made for made in ours]


def contested(comparison: Comparison, failed: list[str]) -> list[Row]:
    """Return the rows of the methods and the peers, all images judged of those that are not far behind."""
    contenders = tuned(comparison, failed)
    rows = [
        one.row(made) for one, made in zip(contenders, made_by(comparison, contenders, comparison.first), strict=True)
    ]
    failed += [f"{row.name} at {row.budget:g}: {row.made['error']}" for row in rows if "error" in row.made]
    psnr = {id(row): float(np.mean(row.made["psnr"])) for row in rows if "error" not in row.made}
    ahead = {
        b: max((psnr[id(row)] for row in rows if row.budget == b and id(row) in psnr), default=0.0)
        for b in comparison.budgets
    }
    close = [place for place, row in enumerate(rows) if psnr.get(id(row), -np.inf) >= ahead[row.budget] - FAR_BEHIND]
    whole = made_by(comparison, [contenders[place] for place in close], comparison.judged)
    for place, made in zip(close, whole, strict=True):
        rows[place] = contenders[place].row(made)
    return [row for row in rows if "error" not in row.made]


def compare(
    comparison: Comparison, autos: Sequence[str], extra: Sequence[tuple[str, Schedule]]
) -> tuple[list[Row], list[str]]:
    """Return the rows of the table, and what could not be had."""
    failed: list[str] = []
    runs, budgets = comparison.judged, comparison.budgets
    schedules: dict[str, tuple[Any, Sampling, Schedule | None]] = {}  # a pipeline, how it is called, and a schedule
    own = comparison.bench.pipeline, comparison.sampling
    rows = contested(comparison, failed)
    methods = {method.name: method for method in comparison.methods}
    for row in rows:
        if row.source == "dicache":
            schedules[row.key] = *own, methods[row.name].schedule(row.settings)

    def add(row: Row, pipeline: Any, sampling: Sampling, schedule: Schedule | None) -> None:
        if "error" in row.made:
            failed.append(f"{row.name} at {row.budget:g}: {row.made['error']}")
            return
        rows.append(row)
        schedules[row.key] = pipeline, sampling, schedule

    for name in autos:
        for budget in budgets:
            schedule = comparison.auto(budget, AUTO[name])
            told = {"form": schedule.settings["form"], "spent": schedule.measured["auto"]["spent_images"]}
            made = comparison.extra(name, schedule, runs)
            add(Row(name, "dicache", budget, {**told, "budget": budget}, told, made), *own, schedule)
    for name, schedule in extra:
        made = comparison.extra(name, schedule, runs)
        budget = min((b for b in budgets if b >= made.get("macs_fraction", 1.0) - SLACK), default=1.0)
        settings = {"settings": schedule.settings, "number": len(rows)}
        add(Row(name, "dicache", budget, settings, schedule.settings, made), *own, schedule)
    for name, pipeline in ((OWN_STEPS, comparison.bench.pipeline), (OTHER_STEPS, comparison.dpm)):
        for budget in budgets:
            count = {"steps": int(budget * comparison.steps + 1e-9)}
            made = comparison.fewer(name, pipeline, count["steps"], runs)
            sampling = replace(comparison.sampling, **count)
            add(Row(name, "steps", budget, count, count, made), pipeline, sampling, None)
    if comparison.rounds:
        kinds = {peer.name: peer.kind for peer in peers(comparison.steps)}
        theirs = [row for row in rows if row.source == "peer"]
        jobs = {row.key: {"key": row.key, "peer": kinds[row.name], "settings": row.settings} for row in theirs}
        speedups = {**comparison.timed(schedules), **comparison.timed_peers(list(jobs.values()))}
        for row in rows:
            row.speedup = speedups[row.key]
    return rows, failed


def results(comparison: Comparison, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows as `dicache evaluate --json` has them, with the gain over fewer steps of the same budget."""
    prompts, steps = comparison.judged[0], {row.budget: row for row in rows if row.name == OWN_STEPS}

    def told(row: Row) -> dict[str, Any]:
        each, rival = row.made["psnr"], steps.get(row.budget)
        count = len(each)
        gain = None
        if rival is not None and rival is not row:
            gain = paired_difference(each, rival.made["psnr"][:count], prompts[:count]).to_json()
        return {
            "schedule": row.name,
            "source": row.source,
            "budget": row.budget,
            "settings": row.settings,
            "runs": count,
            "macs_fraction": row.made["macs_fraction"],
            "speedup": row.speedup,
            "psnr": mean_with_interval(np.array(each), prompts=prompts[:count]).to_json(),
            "psnr_gain": gain,
            "psnr_each": [round(value, 3) for value in each],
            **{name: row.made[name] for name in comparison.judges if name in row.made},
        }

    return [told(row) for row in rows]


def results_text(
    comparison: Comparison, rows: Sequence[Row], told: Sequence[Mapping[str, Any]], failed: Sequence[str]
) -> str:
    judges = list(comparison.judges)
    header = [
        "budget",
        "",
        "images",
        "MACs",
        "speed-up",
        "PSNR dB",
        "95 %",
        "to fewer steps",
        "95 %",
        *judges,
        "settings",
    ]
    cells = []
    for row, result in zip(rows, told, strict=True):
        mean, gain = result["psnr"], result["psnr_gain"]
        over = "!" if result["macs_fraction"] > row.budget + SLACK else ""  # as these runs' own latents decided
        cells.append(
            [
                f"{row.budget:g}",
                row.name,
                str(result["runs"]),
                f"{result['macs_fraction']:.3f}{over}",
                "-" if row.speedup is None else f"{row.speedup:.2f}",
                f"{mean['mean']:.1f}",
                f"{mean['low']:.1f} to {mean['high']:.1f}",
                "-" if gain is None else f"{gain['mean']:+.1f}",
                "-" if gain is None else f"{gain['low']:+.1f} to {gain['high']:+.1f}",
                *(f"{result[name]:.3f}" if name in result else "-" for name in judges),
                in_words(row.told),
            ]
        )
    about = (
        f"pareto: {comparison.bench.model}, {comparison.steps} steps, guidance {comparison.sampling.guidance:g}, "
        f"{len(comparison.judged[0])} held-out images, or the first {len(comparison.first[0])} of them where a method "
        f"is {FAR_BEHIND:g} dB behind on these; tuned on {len(comparison.tuning[0])}, at most "
        f"{comparison.trials} settings of each. MACs are shares of the uncached run's."
    )
    lost = ["\n".join(["Not in the table", *failed])] if failed else []
    return "\n\n".join([about, table(header, cells), *lost])


def in_words(settings: Mapping[str, Any]) -> str:
    def said(value: Any) -> str:
        if isinstance(value, list) and value and set(value) <= {0, 1}:
            return "".join("C" if computed else "." for computed in value)
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {said(value)}" for name, value in settings.items() if value is not None)


def named_schedule(text: str) -> tuple[str, Schedule]:
    name, _, file = text.partition("=")
    if not file:
        raise argparse.ArgumentTypeError(f"found {text!r}; needed NAME=FILE.json")
    return name, Schedule.load(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=("digits", "scenes", "clips", "flow"), default="digits")
    parser.add_argument("--images", type=int, default=200, help="that are judged [default: 200]")
    parser.add_argument("--first", type=int, default=24, help="images that show what is far behind [default: 24]")
    parser.add_argument(
        "--budgets", type=lambda text: [float(part) for part in text.split(",")], default="0.7,0.5,0.4,0.3"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trials", type=int, default=50, help="settings of each method at most [default: 50]")
    parser.add_argument("--auto", nargs="+", choices=tuple(AUTO), default=list(AUTO), help="[default: both]")
    parser.add_argument("--rounds", type=int, default=7, help="of timing; 0 times nothing")
    parser.add_argument(
        "--schedule", action="append", type=named_schedule, default=[], metavar="NAME=FILE", help="another row"
    )
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    comparison = Comparison(options)
    rows, failed = compare(comparison, options.auto, options.schedule)
    shutil.rmtree(comparison.folder, ignore_errors=True)
    rows.sort(key=lambda row: (-row.budget, -float(np.mean(row.made["psnr"]))))
    told = results(comparison, rows)
    text = results_text(comparison, rows, told, failed)
    print(text)  # noqa: T201
    output = RESULTS / f"pareto-{options.model}"
    output.with_suffix(".txt").write_text(text + "\n")
    content = {
        "model": options.model,
        "steps": options.steps,
        "guidance": comparison.sampling.guidance,
        "prompts": comparison.judged[0],
        "results": told,
        "failed": failed,
    }
    output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    save(pareto(read_series([output.with_suffix(".json")])), output.with_suffix(".png"))


if __name__ == "__main__":
    main()
