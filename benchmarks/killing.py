"""Kill a process that writes a profile, again and again at random moments, and compare what comes of it.

    python -m benchmarks.killing --kills 30

A process adds runs to a profile, with priors, as fast as the disk takes them; it is killed (SIGKILL) at a random moment
of the next, and begun again. After each kill the profile must open and hold all that was finished, and in the end it
must equal one that was written without a kill. No model runs: what is tried is the writing, in which most kills then
come.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.profiler.test_nothing_lost import killed_again_and_again

RESULTS = Path(__file__).parent / "results" / "killing.txt"


def main() -> None:
    """Kill, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        kept = killed_again_and_again(Path(folder), given.kills, given.seed)
    said = (
        f"{len(kept)} of {given.kills} kills: each time the profile opened, with all that was finished. Its\n"
        f"{kept[-1] + 1} runs and priors equal those of an undisturbed one. Runs after each kill:\n"
        f"{' '.join(map(str, kept))}\n"
    )
    RESULTS.write_text(said)
    sys.stdout.write(said)


if __name__ == "__main__":
    main()
