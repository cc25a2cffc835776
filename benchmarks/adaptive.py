"""Methods that decide at run time, on a bundled model: `python -m benchmarks.adaptive teacache`.

Each experiment is one text in `results/`; see `benchmarks.ablations`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.bench import Bench, Named, run
from dicache.calibrate.adacache import AdaCache
from dicache.calibrate.first_block import FirstBlock
from dicache.calibrate.freezing import freeze
from dicache.calibrate.methods import CalibrationError, body_plan
from dicache.calibrate.simulating import decisions
from dicache.calibrate.teacache import TeaCache, published_fits
from dicache.cli.command import table
from dicache.cli.evaluate import results_table
from dicache.evaluate.quality import psnr
from dicache.models.sampling import sample
from dicache.runtime import apply
from dicache.schedules import Schedule

PUBLISHED = (
    ("flux", 0.4),
    ("hunyuanvideo", 0.1),
    ("latte", 0.1),
)  # polynomials of the modulated input, a threshold each


def teacache(bench: Bench, steps: int) -> str:
    """TeaCache at five costs, beside its frozen plan and as many steps spread evenly; and published polynomials."""
    profile = bench.profile(steps)
    rows: Named = []
    for target in (1.25, 1.5, 1.75, 2.0, 2.5):
        schedule = TeaCache(target_speedup=target).calibrate(profile)
        rows += [(f"teacache {target}x", schedule), (f"frozen {target}x", freeze(schedule, profile, "typical"))]
    evenly = [(f"{count} steps evenly", spread(bench, steps, count)) for count in range(steps // 3, steps)]
    fit = rows[0][1].measured["fit"]
    for known, threshold in PUBLISHED:
        rows += [(f"{known} {threshold}", TeaCache(threshold, published=known).calibrate(profile))]
        as_published = TeaCache(threshold, published=known, negative="reference")
        rows += [(f"{known} {threshold} reference", as_published.calibrate(profile))]
        rows += [(f"{known} 1.5x", TeaCache(target_speedup=1.5, published=known).calibrate(profile))]
    results = bench.results(rows, bench.sampling(steps))
    even = bench.untimed(evenly, bench.sampling(steps))
    gains = [gain_over(result, even[1:], even[0].images) for result in results[1 : len(rows) + 1]]
    fits = [["own, on held-out runs", *(f"{fit[key]:.3f}" for key in ("held_out_r2", "held_out_rmse"))]]
    fits += [
        [name, f"{found.r2:.3f}", f"{found.rmse:.3f}"]
        for name, found in published_fits(profile, [known for known, _ in PUBLISHED]).items()
    ]
    return "\n\n".join(
        [
            results_table(results),
            results_table(even),
            table(["PSNR over steps spread evenly, at equal MACs", "dB", "95 %"], [g for g in gains if g]),
            table(["polynomial", "R2", "RMSE"], fits),
        ]
    )


def gain_over(result: Any, others: Sequence[Any], uncached: np.ndarray) -> list[str]:
    """Return a row: by how much a result's PSNR is above that of others at its cost, between the two nearest of them.

    Args:
        result: Of one schedule.
        others: Of schedules of rising cost.
        uncached: The images without a schedule.

    Returns:
        Name, mean of the paired differences in dB, and its 95 % interval; empty where no two others enclose the cost.
    """
    below = [each for each in others if each.macs_fraction <= result.macs_fraction]
    above = [each for each in others if each.macs_fraction > result.macs_fraction]
    if not below or not above:
        return []
    low, high = below[-1], above[0]
    share = (result.macs_fraction - low.macs_fraction) / (high.macs_fraction - low.macs_fraction)
    mine, one, other = (psnr(each.images, uncached) for each in (result, low, high))
    gain = mine - ((1 - share) * one + share * other)
    half = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
    return [result.name, f"{gain.mean():+.1f}", f"{gain.mean() - half:+.1f} to {gain.mean() + half:+.1f}"]


def spread(bench: Bench, steps: int, count: int) -> Schedule:
    """Return the plan that computes all blocks at so many steps, spread evenly, the first and the last among them."""
    anatomy, target, evaluations = bench.survey(steps)
    computed = set(np.linspace(0, evaluations - 1, count).round().astype(int).tolist())
    letters = "".join("C" if step in computed else "." for step in range(evaluations))
    return Schedule("evenly", {}, anatomy, target, evaluations, body_plan({"*": letters}))


def first_block(bench: Bench, steps: int) -> str:
    """FirstBlockCache beside TeaCache at equal cost, with more first and last blocks, and with usual settings."""
    profile = bench.profile(steps)
    firsts = profile.provenance.first_blocks
    tried: list[tuple[str, FirstBlock | TeaCache]] = []
    for x in (1.25, 1.5, 2.0, 2.5):
        tried += [(f"first-block {x}x", FirstBlock(target_speedup=x)), (f"teacache {x}x", TeaCache(target_speedup=x))]
    for n, last in ((2, 0), (4, 0), (8, 0), (1, 1), (1, 3), (4, 2)):
        if n in firsts:
            tried += [(f"F{n}B{last} {x}x", FirstBlock(target_speedup=x, first=n, last=last)) for x in (1.25, 1.5)]
    tried += [(f"1.5x, {n} in a row", FirstBlock(target_speedup=1.5, max_continuous=n)) for n in (1, 2)]
    tried += [("1.5x, warm-up 4", FirstBlock(target_speedup=1.5, warm_up=4))]
    tried += [("diffusers' 0.05", FirstBlock(0.05, at_threshold="reuse"))]
    tried += [("vLLM-Omni's 0.24", FirstBlock(0.24, max_continuous=3, warm_up=4))]
    if 8 in firsts:
        tried += [("cache-dit's F8 0.08", FirstBlock(0.08, first=8, warm_up=8))]
    rows, not_reached = [], []
    for name, settings in tried:
        try:
            rows.append((name, settings.calibrate(profile)))
        except CalibrationError as error:
            not_reached.append(f"{name}: {error}")
    rows += [("1.5x, frozen", freeze(dict(rows)["first-block 1.5x"], profile))]
    told = results_table(bench.results(rows, bench.sampling(steps)))
    return "\n".join([told, "", *not_reached]) if not_reached else told


def adacache(bench: Bench, steps: int) -> str:
    """AdaCache's codebooks as published and fitted, with and without motion; of clips, who gets the steps."""
    profile = bench.profile(steps)
    settings = {f"{x}x": AdaCache(target_speedup=x) for x in (1.4, 1.8)}
    settings |= {
        "1.8x, fast": AdaCache(preset="fast", target_speedup=1.8),
        "slow as published": AdaCache(preset="slow"),
    }
    if profile.between_frames(profile.provenance.decision_blocks[-1], "attn") is not None:
        settings["1.8x, no motion"] = AdaCache(target_speedup=1.8, motion="none")
        settings["1.8x, fast, published motion"] = AdaCache(preset="fast", target_speedup=1.8, motion="published")
    rows = [(name, each.calibrate(profile)) for name, each in settings.items()]
    results = bench.results(rows, bench.sampling(steps))
    cells = []
    said = [word for word in ("fast", "slowly", "still") if any(word in text for text in bench.conditions)]
    for (name, schedule), result in zip(rows, results[1:], strict=False):
        found = np.array(result.computed_each)
        of = [found[[word in text for text in bench.conditions]].mean() for word in said]
        cells.append([name, *(f"{x:.1f}" for x in (schedule.measured["computed_steps"], found.mean(), *of))])
    header = ["computed steps", "foreseen", "achieved", *said]
    return f"{results_table(results)}\n\n{table(header, cells)}"


def agreement(bench: Bench, steps: int) -> str:
    """What policies do in a profile's runs, beside what it foresees of the same runs and of the most of all of them."""
    profile = bench.profile(steps)
    methods: dict[str, Callable[[float], Any]] = {
        "teacache": lambda target: TeaCache(target_speedup=target),
        "first-block": lambda target: FirstBlock(target_speedup=target),
        "adacache": lambda target: AdaCache(target_speedup=target),
    }
    rows, letters = [], []
    for method, settings in methods.items():
        for target in (1.6, 1.8, 2.1):
            name = f"{method} {target}x"
            try:
                schedule = settings(target).calibrate(profile)
            except CalibrationError as error:
                letters.append(f"{name}: {error}")
                continue
            assert schedule.policy is not None
            foreseen = decisions(schedule.policy, profile)  # (runs, contexts, steps)
            done = achieved(bench, schedule, foreseen.shape, [run for run in profile.runs if run.ok])
            free = [step for step in range(steps) if not schedule.policy.forced(step, steps)]
            most = foreseen.mean(axis=(0, 1)) >= 0.5
            alike, frozen = (done == foreseen)[..., free].mean(), (done == most)[..., free].mean()
            skipped = [1 - each[..., free].mean() for each in (foreseen, done)]
            rows.append([name, *(f"{share:.3f}" for share in (*skipped, alike, frozen))])
            shares = (
                f"{'':4}{told:9}{' '.join(f'{x:4.0%}' for x in each.mean(axis=(0, 1)))}"
                for told, each in (("foreseen", foreseen), ("achieved", done))
            )
            letters.append("\n".join([f"{name}, runs that compute each step", *shares]))
    header = ["", "skipped: foreseen", "achieved", "alike: with the run's own", "with the majority's"]
    about = f"in the {len(profile.runs)} runs of the profile, over the steps that are not always computed"
    return "\n\n".join([about, table(header, rows), *letters])


def achieved(bench: Bench, schedule: Schedule, shape: tuple[int, ...], runs: Any) -> np.ndarray:
    """Return which steps are computed when a schedule is replayed in runs, boolean, shape (runs, contexts, steps)."""
    done = np.zeros(shape, dtype=bool)
    with apply(bench.pipeline, schedule) as cache:
        for place, each in enumerate(runs):
            sample(bench.pipeline, [each.prompt], [each.seed], bench.sampling(shape[-1]))
            for context, row in enumerate(cache.stats.steps.values()):
                done[place, context] = [letter == "C" for letter in row]
    return done


EXPERIMENTS: dict[str, Callable[[Bench, int], str]] = {
    "teacache": teacache,
    "first-block": first_block,
    "adacache": adacache,
    "agreement": agreement,
}

if __name__ == "__main__":
    run(__doc__, EXPERIMENTS, timed=("teacache", "first-block", "adacache"), skipped={})
