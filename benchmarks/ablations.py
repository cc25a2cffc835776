"""The tables and figures of the papers on a bundled model: `python benchmarks/ablations.py methods`.

Each experiment is one table in `results/`: what every schedule makes of the same conditions and seeds, beside the
uncached run and fewer steps at its cost. `python benchmarks/ablations.py all` runs them one after another; uncached
runs and profiles are kept in `build/` and used again.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicache.anatomy import Anatomy
from dicache.anatomy.overrides import Overrides
from dicache.calibrate.adacache import AdaCache
from dicache.calibrate.delta_cache import DeltaCache
from dicache.calibrate.delta_dit import DeltaDit, ordered
from dicache.calibrate.eoc import Eoc
from dicache.calibrate.faster_diffusion import FasterDiffusion
from dicache.calibrate.first_block import FirstBlock
from dicache.calibrate.fora import Fora
from dicache.calibrate.freezing import freeze
from dicache.calibrate.l2c import LearningToCache
from dicache.calibrate.l2c_training import Training, train
from dicache.calibrate.magcache import MagCache
from dicache.calibrate.mask import Mask
from dicache.calibrate.methods import CalibrationError, PlanMethod, planned_schedule
from dicache.calibrate.pab import Pab
from dicache.calibrate.simulating import decisions
from dicache.calibrate.smoothcache import SmoothCache
from dicache.calibrate.taylorseer import TaylorSeer
from dicache.calibrate.teacache import TeaCache
from dicache.calibrate.tgate import TGate
from dicache.cli.command import table
from dicache.cli.evaluate import results_table
from dicache.evaluate.evaluation import evaluate
from dicache.evaluate.quality import psnr
from dicache.figures import save
from dicache.figures.spectrum import spectra
from dicache.models.judges import judges_of
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions, sample
from dicache.profiler import Profile, storage
from dicache.profiler.profiling import profile_pipeline, survey_pipeline
from dicache.runtime import apply
from dicache.schedules import Schedule, Target

BUILD = Path(__file__).parents[1] / "build" / "ablations"
RESULTS = Path(__file__).parent / "results"
RANGES = ("shallow", "middle", "deep")
TEMPORAL = "temporal_transformer_blocks"
RUNS = 32  # of a profile; with priors, so many conditions are averaged
GUIDANCE = {"digits": 4.0}  # other models: what is usual for them
FORESEEN = 12  # of the profile's runs are replayed, to compare decisions with those foreseen
Named = list[tuple[str, Schedule]]


class Bench:
    """One bundled model, its conditions and judges."""

    def __init__(self, model: str, images: int, rounds: int) -> None:
        self.model, self.rounds = model, rounds
        self.pipeline = load(model)
        self.conditions = default_conditions(self.pipeline, images)
        self.judges = judges_of(model, self.pipeline, self.conditions)
        self._surveys: dict[int, tuple[Anatomy, Target, int]] = {}

    def sampling(self, steps: int, guidance: float | None = None) -> Sampling:
        asked = Sampling(steps, GUIDANCE.get(self.model) if guidance is None else guidance)
        return asked.usual_for(self.model).resolved(self.pipeline)

    def profile(self, steps: int) -> Profile:
        return storage.load(self.profile_file(steps))

    def profile_file(self, steps: int) -> Path:
        """Return a profile with priors, made if it is not there."""
        file = BUILD / f"{self.model}-{steps}.h5"
        if not file.exists():
            conditions, sampling = default_conditions(self.pipeline, RUNS), self.sampling(steps)
            profile_pipeline(self.pipeline, self.model, file, conditions, sampling=sampling, priors=True)
        return file

    def survey(self, steps: int) -> tuple[Anatomy, Target, int]:
        if steps not in self._surveys:
            self._surveys[steps] = survey_pipeline(self.pipeline, self.sampling(steps))
        return self._surveys[steps]

    def planned(self, steps: int, name: str, settings: PlanMethod) -> tuple[str, Schedule]:
        return name, planned_schedule(settings, *self.survey(steps))

    def results(self, schedules: Named, sampling: Sampling, *, fewer_steps: bool = True) -> list[Any]:
        uncached, cached, fewer = evaluate(
            self.pipeline,
            schedules,
            self.conditions,
            sampling=sampling,
            judges=self.judges,
            timing_rounds=self.rounds,
            references=BUILD / "references",
            fewer_steps=fewer_steps,
        )
        return [uncached, *cached, *fewer]


def methods(bench: Bench, steps: int) -> str:
    """Every method that needs no training, at its usual settings."""
    profile = bench.profile(steps)
    rows: Named = [bench.planned(steps, f"fora {n}", Fora(n)) for n in (2, 3, 4)]
    fora = rows[0][1]
    if len(profile.anatomy.segments) == 1:
        rows += [bench.planned(steps, f"delta-cache {r}", DeltaCache(blocks=r)) for r in RANGES]
        settings, _ = ordered(DeltaDit(), profile)
        rows += [bench.planned(steps, "delta-dit", DeltaDit()), bench.planned(steps, "delta-dit auto", settings)]
        rows += [bench.planned(steps, "faster-diffusion", FasterDiffusion())]
    rows += [bench.planned(steps, f"taylorseer {k}", TaylorSeer(3, k)) for k in (0, 1, 2)]
    rows += [bench.planned(steps, "taylorseer body 1", TaylorSeer(3, 1, granularity="body"))]
    rows += [(f"smoothcache {a}", SmoothCache(a).calibrate(profile)) for a in (0.08, 0.18)]
    rows += [(f"magcache {t}", MagCache(t).calibrate(profile)) for t in (0.06, 0.12)]
    rows += [(f"teacache {x}x", TeaCache(target_speedup=x).calibrate(profile)) for x in (1.5, 2.0)]
    prior = partial(storage.load_prior, bench.profile_file(steps))
    rows += [("eoc on fora 2", Eoc().calibrate(profile, fora, prior))]
    if "cross_attn" in profile.branches:
        times = profile.provenance.target.timesteps
        ranges = {"attn": 2, "cross_attn": 6}
        if any(block.path == TEMPORAL for block in profile.anatomy.blocks):
            ranges[f"{TEMPORAL}.attn"] = 4
        plan = Pab(ranges).plan(profile.anatomy, profile.steps, times)
        rows += [("pab", Schedule("pab", {}, profile.anatomy, profile.provenance.target, profile.steps, plan))]
        rows += [bench.planned(steps, "tgate", TGate(round(0.6 * steps), 3))]
    return results_table(bench.results(rows, bench.sampling(steps)))


def fora_steps(bench: Bench, _: int) -> str:
    """FORA's table 3: the interval against the number of steps."""
    parts = []
    for steps, intervals in ((20, (2, 3)), (50, (2, 3, 5)), (100, (2, 3, 6)), (250, (3, 6))):
        rows = [bench.planned(steps, f"fora {n}", Fora(n)) for n in intervals]
        parts.append(results_table(bench.results(rows, bench.sampling(steps), fewer_steps=False)))
    return "\n\n".join(parts)


def fora_guidance(bench: Bench, steps: int) -> str:
    """FORA's table 4 and figure 5: the interval against the guidance scale."""
    parts = []
    for guidance in (1.5, 3.0, 4.5):
        rows = [bench.planned(steps, f"fora {n}", Fora(n)) for n in (2, 3, 5)]
        told = results_table(bench.results(rows, bench.sampling(steps, guidance), fewer_steps=False))
        parts.append(f"guidance {guidance}\n{told}")
    return "\n\n".join(parts)


def fora_branches(bench: Bench, steps: int) -> str:
    """FORA on one kind of branch or all, from both anchors, and EOC's masks."""
    sites = bench.survey(steps)[0].sites
    kinds = [(kind,) for kind in dict.fromkeys(key.partition(".")[2] for key in sites)] + [()]
    rows = [
        bench.planned(steps, f"{' '.join(kind) or 'all'}, {anchor}", Fora(2, anchor, kind))
        for kind in kinds
        for anchor in ("end", "start")
    ]
    masks = {"odd steps of the first half": {"*": f"0-{steps // 2}:2,{steps // 2 + 1}-"}, "odd steps": {"*": "0-:2"}}
    rows += [bench.planned(steps, name, Mask(computed)) for name, computed in masks.items()]
    return results_table(bench.results(rows, bench.sampling(steps)))


def delta(bench: Bench, steps: int) -> str:
    """Delta-DiT's figures 5, 6 and 7, table 5 and appendix H: which blocks, which boundary, how many."""
    count = len(bench.survey(steps)[0].blocks)
    quarters = [f"{i * count // 4}-{(i + 1) * count // 4 - 1}" for i in range(4)]
    ranges = (*RANGES, *quarters)
    rows = [bench.planned(steps, f"delta-cache {r}", DeltaCache(blocks=r)) for r in ranges]
    for order in ("aligned", "reversed"):
        boundaries = [round(steps * share / 5) for share in range(6)]
        rows += [bench.planned(steps, f"{order} b={b}", DeltaDit(boundary=b, order=order)) for b in boundaries]
    many = sorted({max(1, round(count * share / 8)) for share in range(1, 9)})
    rows += [bench.planned(steps, f"aligned N_c={n}", DeltaDit(blocks=n)) for n in many]
    results = bench.results(rows, bench.sampling(steps))
    kept = {result.name: result.images for result in results}
    chosen = ("uncached", *(f"delta-cache {r}" for r in RANGES))
    save(spectra([(name, kept[name]) for name in chosen]), RESULTS / f"spectrum-{bench.model}.png")
    return results_table(results)


def skipping(bench: Bench, steps: int) -> str:
    """Delta-DiT's figure 4a: each block left out at every step, with nothing in its place."""
    sampling, seeds = bench.sampling(steps), range(1000, 1000 + len(bench.conditions))
    plain = sample(bench.pipeline, bench.conditions, seeds, sampling)
    judged = {name: judge(plain) for name, judge in bench.judges.items()}
    rows = [["uncached", "-", *(f"{value:.3f}" for value in judged.values())]]
    for block in bench.survey(steps)[0].blocks:
        with left_out(bench.pipeline.transformer, block.module, block.streams, block.returns):
            made = sample(bench.pipeline, bench.conditions, seeds, sampling)
        cells = (psnr(made, plain).mean(), *(judge(made) for judge in bench.judges.values()))
        rows.append([f"without block {block.index}", f"{cells[0]:.1f}", *(f"{value:.3f}" for value in cells[1:])])
    return table(["", "PSNR dB", *judged], rows)


@contextmanager
def left_out(model: torch.nn.Module, path: str, streams: Sequence[str], returns: Any) -> Iterator[None]:
    """Let a block give its streams back as they are."""
    block = model.get_submodule(path)
    names = list(type(block).forward.__code__.co_varnames[1:])

    def unchanged(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return given[returns] if isinstance(returns, str) else tuple(given[name] if name else None for name in returns)

    with Overrides() as overrides:
        overrides.set(block, unchanged)
        yield


def eoc(bench: Bench, steps: int) -> str:
    """EOC's tables: the weight and the first steps on FORA at two intervals, and its other options."""
    profile, prior = bench.profile(steps), partial(storage.load_prior, bench.profile_file(steps))
    parts = []
    for interval in (2, 4):
        _, base = bench.planned(steps, "", Fora(interval))
        held = [i for i in range(steps) if i not in base.plan.computed_steps]  # type: ignore[union-attr] # it has one
        firsts = sorted({held[len(held) // 4], held[len(held) // 2], steps})
        rows = [(f"fora {interval}", base)]
        for weight in (0.003, 0.01, 0.1, 0.3, 1.0):
            for first in firsts:
                settings = Eoc(weight, first_steps=None if first == steps else first)
                rows.append((f"weight {weight}, first {first}", settings.calibrate(profile, base, prior)))
        for weight in (0.1, 0.5, 1.0, 1.5):
            rows.append((f"add, weight {weight}", Eoc(weight, "add").calibrate(profile, base, prior)))
        for kind in profile.branches:
            rows.append((f"{kind} alone, weight 0.01", Eoc(branches=(kind,)).calibrate(profile, base, prior)))
        for position in (0.0, 2.0):
            settings = Eoc(position_weight=position, threshold=0.5)
            rows.append((f"position {position:g}, threshold 0.5", settings.calibrate(profile, base, prior)))
        parts.append(results_table(bench.results(rows, bench.sampling(steps), fewer_steps=False)))
    return "\n\n".join(parts)


def tgate(bench: Bench, steps: int) -> str:
    """T-GATE's gates, with self-attention every third step before the gate and always, and without the collapse."""
    gates = [round(steps * share) for share in (0.25, 0.4, 0.5, 0.6, 0.75)]
    rows = [bench.planned(steps, f"gate {g}, sp 3", TGate(g, 3)) for g in gates]
    rows += [bench.planned(steps, f"gate {g}, sp 1", TGate(g, 1)) for g in gates[1::2]]
    rows += [bench.planned(steps, f"gate {g}, sp 3, guided", TGate(g, 3, after_gate="guided")) for g in gates[1::2]]
    return results_table(bench.results(rows, bench.sampling(steps)))


def first_block(bench: Bench, steps: int) -> str:
    """FirstBlockCache beside TeaCache at equal cost, with more first and last blocks, and with usual settings."""
    anatomy = bench.survey(steps)[0]
    firsts = tuple(n for n in (1, 2, 4, 8) if n < anatomy.segments[0][1])
    file = BUILD / f"{bench.model}-{steps}-first-blocks.h5"
    if not file.exists():
        conditions, sampling = default_conditions(bench.pipeline, RUNS), bench.sampling(steps)
        profile_pipeline(bench.pipeline, bench.model, file, conditions, sampling=sampling, first_blocks=firsts)
    profile = storage.load(file)
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


def l2c(bench: Bench, steps: int) -> str:
    """Learning-to-Cache: routers learned at three penalties, beside FORA at the steps that they may hold."""
    anatomy, target, count = bench.survey(steps)
    conditions = list(dict.fromkeys(default_conditions(bench.pipeline, 1000)))
    rows: Named = [bench.planned(steps, "fora 2, start", Fora(2, "start"))]
    for penalty in (5e-6, 2e-5, 2e-4):
        file = BUILD / f"{bench.model}-{steps}-{penalty:g}.router.pt"
        training = Training(penalty=penalty, iterations=200, learning_rate=0.02, batch=4)
        router = train(bench.pipeline, anatomy, target, count, conditions, bench.sampling(steps), training, file)
        rows.append((f"penalty {penalty:g}", LearningToCache().schedule(router, anatomy, target, count, bench.model)))
    return results_table(bench.results(rows, bench.sampling(steps)))


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
        foreseen, same, alike = _foreseen(bench, profile, schedule, steps)
        numbers = (schedule.measured["computed_steps"], found.mean(), foreseen, same)
        cells.append([name, *(f"{x:.1f}" for x in (*numbers, *of)), f"{alike:.3f}"])
    header = ["computed steps", "foreseen", "achieved", f"of {FORESEEN}: foreseen", "achieved", *said, "decided alike"]
    return f"{results_table(results)}\n\n{table(header, cells)}"


def _foreseen(bench: Bench, profile: Profile, schedule: Schedule, steps: int) -> tuple[float, float, float]:
    """Return the computed steps that are foreseen of some of the profile's runs, those achieved in the same runs, and
    the share of decisions that are alike."""
    assert schedule.policy is not None
    foreseen = decisions(schedule.policy, profile)[:FORESEEN, 0]  # (runs, steps)
    achieved = np.zeros_like(foreseen)
    with apply(bench.pipeline, schedule) as cache:
        for place, run in enumerate([run for run in profile.runs if run.ok][:FORESEEN]):
            sample(bench.pipeline, [run.prompt], [run.seed], bench.sampling(steps))
            achieved[place] = [letter == "C" for letter in next(iter(cache.stats.steps.values()))]
    one, two = (float(each.sum(axis=1).mean()) for each in (foreseen, achieved))
    return one, two, float((foreseen == achieved).mean())


EXPERIMENTS: dict[str, Callable[[Bench, int], str]] = {
    "methods": methods,
    "fora-steps": fora_steps,
    "fora-guidance": fora_guidance,
    "fora-branches": fora_branches,
    "delta": delta,
    "skipping": skipping,
    "eoc": eoc,
    "tgate": tgate,
    "first-block": first_block,
    "l2c": l2c,
    "adacache": adacache,
}
NEEDS_CROSS_ATTENTION = ("tgate",)
TIMED = ("methods", "first-block", "adacache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("experiment", choices=(*EXPERIMENTS, "all"))
    parser.add_argument("--model", default="digits", help="a bundled one [default: digits]")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7, help="of timing; 0 times nothing")
    options = parser.parse_args()
    every = [name for name in EXPERIMENTS if options.model != "digits" or name not in NEEDS_CROSS_ATTENTION]
    for name in every if options.experiment == "all" else (options.experiment,):
        bench = Bench(options.model, options.images, options.rounds if name in TIMED else 0)
        text = f"{name}: {options.model}, {options.images} images, {options.steps} steps but where stated\n\n"
        text += EXPERIMENTS[name](bench, options.steps)
        print(text)  # noqa: T201
        (RESULTS / f"{name}-{options.model}.txt").write_text(text + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
