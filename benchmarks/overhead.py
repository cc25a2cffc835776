"""What a step costs beside the model's own work, and where: `python -m benchmarks.overhead`.

Each kind of step of a plan is timed in lockstep beside the unhooked model and the loop by hand, as in
`benchmarks.replay`. Then a plan runs under Python's profiler, whose own cost is in its figures: they say where the time
goes rather than how much it is.
"""

import argparse
import cProfile
import pstats
import sys
from collections.abc import Mapping

import torch
from tqdm import tqdm

import dicache
from benchmarks.lockstep import in_turns
from benchmarks.loops import cached
from benchmarks.replay import Bench, letters
from dicache.cli.command import table
from dicache.schedules import Plan, Rule
from dicache.schedules.plan import Action

PLANS: Mapping[str, Action] = {"branches": "reuse", "bodies": "skip"}


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="small")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--lines", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given.size, None, "cpu", with_peers=False)
    computes = letters(2, bench.steps)
    for kind, action in PLANS.items():
        loops = {
            name: loop for name, loop in getattr(bench, kind)().items() if name.endswith(("unhooked", "hand", "N=2"))
        }
        taken, _ = in_turns(loops, bench.steps, given.repetitions, "cpu")
        rows = [
            [name, *(f"{1e6 * each[[x == letter for x in computes]].mean():.0f}" for letter in "C.")]
            for name, each in taken.items()
        ]
        rule = Rule(action, computes)
        print_table([f"{given.size}, {kind}: microseconds", "computed", "not"], rows)
        print_table(
            ["under the profiler, a step", "own", "calls"], profiled(bench, rule, given.repetitions, given.lines)
        )


@torch.no_grad()
def profiled(bench: Bench, rule: Rule, repetitions: int, lines: int) -> list[list[str]]:
    """Return the functions of dicache that take longest by themselves: microseconds and calls of each a step."""
    model = bench.model()
    cache = dicache.apply(model, bench.schedule(Plan(bench.steps, (rule,))))
    list(cached(model, bench.steps, cache))
    with cProfile.Profile() as profile:
        for _ in tqdm(range(repetitions), leave=False):
            list(cached(model, bench.steps, cache))
    count = repetitions * bench.steps
    own = [
        (spent, calls, f"{file.rpartition('/dicache/')[2]}: {function}")
        for (file, _, function), (_, calls, spent, _, _) in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined] # not in its types
        if "/dicache/" in file
    ]
    return [
        [name, f"{1e6 * spent / count:.1f}", f"{calls / count:.2f}"] for spent, calls, name in sorted(own)[::-1][:lines]
    ]


def print_table(header: list[str], rows: list[list[str]]) -> None:
    sys.stdout.write(table(header, rows) + "\n\n")


if __name__ == "__main__":
    main()
