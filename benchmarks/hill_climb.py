"""`dicache calibrate auto` beside a plain hill climb: `python -m benchmarks.hill_climb climb --images 200`.

The climb begins with evenly spread computed steps of all blocks, and moves one of them by one or two steps as long as
the mean PSNR of 20 runs is higher for it; at every plan the weights of the last three outputs follow from the profile
and the solver. `auto` has the same share of the multiply-accumulates, 8 runs and 300 uncached images to spend, once
with plans of all blocks alone and once with all. Both are judged on other seeds.
"""

from collections.abc import Sequence

from tqdm import tqdm

from benchmarks.bench import Bench, run
from dicache.calibrate.auto import Auto, AutoSearch
from dicache.calibrate.foretelling import OfProfile
from dicache.calibrate.forms import forms_of
from dicache.calibrate.judging import Goal
from dicache.calibrate.layouts import Layout, Layouts, Part
from dicache.calibrate.refining import tried
from dicache.cli.evaluate import results_table
from dicache.evaluate.rerunning import Reruns
from dicache.models.sampling import default_conditions
from dicache.schedules import Schedule

RUNS, AUTO_RUNS, SEED = 20, 8, 500_000
OUTPUTS, OWN, REACH = 3, 0.1, 2


def climbed(bench: Bench, steps: int, count: int) -> tuple[Schedule, float]:
    """Return the schedule that a climb ends with, and what it computed, in uncached images."""
    profile = bench.profile(steps)
    layouts, form, source = Layouts(profile, 1.0), forms_of(profile.anatomy)[0], OfProfile(profile)
    conditions = default_conditions(bench.pipeline, RUNS)
    runs = Reruns(bench.pipeline, conditions, [SEED + i for i in range(RUNS)], bench.sampling(steps))
    first, last = form.block_range(profile.anatomy)

    def schedule(computed: Sequence[int]) -> Schedule:
        plan = layouts.plan(Layout(form, (Part(first, last, tuple(computed)),), source, OUTPUTS, OWN))
        return Schedule("auto", {}, profile.anatomy, profile.provenance.target, steps, plan)

    here = [place * steps // count for place in range(count)]
    best, seen = tried(runs, "", schedule(here)).decibels, {tuple(here)}
    with tqdm(desc=f"climb {count}", leave=False) as bar:
        moved = True
        while moved:
            moved = False
            for old in here[1:]:
                for new in range(max(1, old - REACH), min(steps, old + REACH + 1)):
                    other = sorted({*here} - {old} | {new})
                    if len(other) < count or tuple(other) in seen:
                        continue
                    seen.add(tuple(other))
                    found = tried(runs, "", schedule(other)).decibels
                    bar.update()
                    if found > best:
                        here, best, moved = other, found, True
                        break
                if moved:
                    break
    return schedule(here), runs.spent


def climb(bench: Bench, steps: int) -> str:
    """A hill climb and `auto`, with 11, 8 and 6 of 20 steps computed."""
    parts = []
    for count in (round(steps * share / 20) for share in (11, 8, 6)):
        schedule, spent = climbed(bench, steps, count)
        conditions = default_conditions(bench.pipeline, AUTO_RUNS)
        on = bench.profile(steps), bench.pipeline, conditions, [SEED + i for i in range(AUTO_RUNS)]
        goal, rows, costs = Goal(schedule.macs_fraction()), [(f"hill climb {count}", schedule)], [spent]
        for name, settings in (("auto, blocks", Auto(goal, granularity="body")), ("auto", Auto(goal))):
            found = AutoSearch(*on, bench.sampling(steps), settings)()
            rows.append((name, found.schedule))
            costs.append(found.spent)
        told = [
            f"{name}: {one.expected_steps}, {one.settings.get('form', 'body')}; {cost:.0f} uncached images computed"
            for (name, one), cost in zip(rows, costs, strict=True)
        ]
        parts.append("\n".join([results_table(bench.results(rows, bench.sampling(steps))), *told]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    run(__doc__, {"climb": climb}, ("climb",), skipped={})
