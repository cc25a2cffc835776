"""What T-GATE gives on `scenes`, beside fewer steps at equal cost: `python benchmarks/tgate.py`.

Each gate with self-attention every third step before it, as published for PixArt, and for some of them at every step,
which shows what the gate does by itself. Images, judge and seeds are those of `dicache evaluate`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dicache.calibrate.methods import planned_schedule
from dicache.calibrate.tgate import TGate
from dicache.cli.command import table
from dicache.evaluate.evaluation import evaluate
from dicache.models.judges import judges_of
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions
from dicache.profiler.profiling import survey_pipeline

GATES = (5, 8, 10, 12, 15)
SETTINGS = (*(TGate(gate, 3, 1, 2) for gate in GATES), *(TGate(gate, 1, 1, 2) for gate in (8, 10, 15)))


def results(model: str, steps: int, runs: int, rounds: int) -> list[dict[str, Any]]:
    """Return the results of the uncached run, all settings, and fewer steps."""
    pipeline = load(model)
    conditions = default_conditions(pipeline, runs)
    sampling = Sampling(steps=steps).usual_for(model).resolved(pipeline)
    subject = survey_pipeline(pipeline, sampling)
    schedules = [
        (f"g{settings.gate}-sp{settings.sp_interval}", planned_schedule(settings, *subject))
        for settings in SETTINGS
        if settings.gate < subject[-1]
    ]
    judges = judges_of(model, pipeline, conditions)
    uncached, cached, fewer = evaluate(
        pipeline, schedules, conditions, sampling=sampling, judges=judges, timing_rounds=rounds
    )
    return [replace(result, latent_error=()).to_json() for result in (uncached, *cached, *fewer)]


def text_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return results as a table; the intervals are of 95 % over images."""

    def interval(mean: Mapping[str, float] | None, digits: int) -> str:
        if mean is None:
            return "-"
        return f"{mean['mean']:.{digits}f} ({mean['low']:.{digits}f} to {mean['high']:.{digits}f})"

    lines = []
    for row in rows:
        uncached = row["schedule"] == "uncached"
        lines.append(
            [
                row["schedule"],
                f"{row['macs_fraction']:.3f}",
                "-" if row["speedup"] is None else f"{row['speedup']:.2f}",
                "-" if uncached else interval(row["psnr"], 1),
                "-" if uncached else interval(row["psnr_gain"], 1),
                "-" if uncached else interval(row["ssim"], 3),
                f"{row['accuracy']:.3f}",
            ]
        )
    return table(["", "MACs", "speed-up", "PSNR dB", "minus fewer steps", "SSIM", "accuracy"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rows = results(options.model, options.steps, options.runs, options.rounds)
    text = f"{options.model}, {options.steps} steps, {options.runs} images\n{text_of(rows)}"
    print(text)  # noqa: T201
    (options.output / "tgate.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.output / "tgate.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
