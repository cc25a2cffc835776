"""How many runs a second are profiled by one process and by two, with one thread each.

python -m benchmarks.scaling        # on a machine with two idle cores
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

RESULTS = Path(__file__).parent / "results" / "scaling.txt"


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=32, help="Of a process; a quarter of it is taken off again.")
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(given.repetitions):  # in turns, so that what else the machine does meets both
        for count, found in rates.items():
            few, many = count * given.runs // 4, count * given.runs
            took = seconds(given.model, given.steps, many, count) - seconds(given.model, given.steps, few, count)
            found.append((many - few) / took)
    one, two = median(rates[1]), median(rates[2])
    said = [
        f"dicache profile --model {given.model} --steps {given.steps}, one thread a process, {os.cpu_count()} cores.",
        f"Runs a second beyond the first {given.runs // 4} of a process, the median of {given.repetitions}:",
        *(
            f"  processes {count}  {median(each):.3f}  ({', '.join(map('{:.3f}'.format, each))})"
            for count, each in rates.items()
        ),
        f"  ratio         {two / one:.2f}",
    ]
    RESULTS.write_text("\n".join(said) + "\n")
    sys.stdout.write("\n".join(said) + "\n")


def seconds(model: str, steps: int, runs: int, count: int) -> float:
    """Return how long a profile takes, the start of its processes included."""
    module = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "dicache"]
    with TemporaryDirectory() as folder:
        options = ["--model", model, "--steps", str(steps), "--runs", str(runs), "-o", f"{folder}/p.h5"]
        since = time.monotonic()
        subprocess.run(
            [*module, "profile", *options],
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return time.monotonic() - since


if __name__ == "__main__":
    main()
