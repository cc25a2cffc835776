"""The tables and figures of the papers on a bundled model: `python -m benchmarks.ablations methods`.

Each experiment is one table in `results/`: what every schedule makes of the same conditions and seeds, beside the
uncached run and fewer steps at its cost. `python -m benchmarks.ablations all` runs them one after another; uncached
runs and profiles are kept in `build/` and used again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.bench import BUILD, RESULTS, Bench, Named, run
from dicache.anatomy.overrides import Overrides
from dicache.calibrate.delta_cache import DeltaCache
from dicache.calibrate.delta_dit import DeltaDit, ordered
from dicache.calibrate.dp import Dp
from dicache.calibrate.eoc import Eoc
from dicache.calibrate.faster_diffusion import FasterDiffusion
from dicache.calibrate.fora import Fora
from dicache.calibrate.forecast import agreement
from dicache.calibrate.l2c import LearningToCache
from dicache.calibrate.l2c_training import Training, train
from dicache.calibrate.magcache import MagCache
from dicache.calibrate.mask import Mask
from dicache.calibrate.pab import Pab
from dicache.calibrate.smoothcache import SmoothCache
from dicache.calibrate.taylorseer import TaylorSeer
from dicache.calibrate.teacache import TeaCache
from dicache.calibrate.tgate import TGate
from dicache.cli.command import table
from dicache.cli.evaluate import results_table
from dicache.evaluate.evaluation import reference_run
from dicache.evaluate.quality import psnr
from dicache.figures import save
from dicache.figures.spectrum import spectra
from dicache.models.sampling import default_conditions, sample
from dicache.profiler import storage
from dicache.schedules import Schedule

RANGES = ("shallow", "middle", "deep")
TEMPORAL = "temporal_transformer_blocks"


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


def foretold(bench: Bench, steps: int) -> str:
    """What a forecast is expected to leave in the last latents, beside what it does leave there: root mean squares."""
    profile, sampling = bench.profile(steps), bench.sampling(steps)
    counts = [round(steps * share / 20) for share in (14, 11, 9, 8, 6)]
    rows, accumulated = [], []
    for granularity in ("body", "branch"):
        for count in counts:
            settings = Dp(steps_computed=count, predictor="forecast", granularity=granularity)
            rows.append((f"{granularity}, {count} steps", schedule := settings.calibrate(profile)))
            errors = schedule.measured["expected_accumulated"].values()
            accumulated.append(np.sqrt(np.mean(np.square(list(errors)), axis=0)))  # (steps,)
    made = bench.untimed(rows, sampling)[1:]
    seeds = [1000 + i for i in range(len(bench.conditions))]
    latents = reference_run(bench.pipeline, bench.conditions, seeds, sampling, BUILD / "references").latents[:, -1]
    size = float(np.sqrt(np.mean(np.square(latents.astype(np.float64)))))
    ends = np.array([each[-1] for each in accumulated]), size * np.array([one.latent_error[-1] for one in made])
    cells = [
        [name, f"{expected:.3f}", f"{measured:.3f}", f"{expected / measured:.2f}", f"{one.psnr.mean:.1f}"]
        for (name, _), expected, measured, one in zip(rows, *ends, made, strict=True)
    ]
    correlation, ratio = agreement(*ends)
    told = f"of the logarithms the correlation is {correlation:.3f}; the median of foretold / measured is {ratio:.2f}"
    return "\n".join([table(["", "foretold", "measured", "ratio", "PSNR dB"], cells), told])


EXPERIMENTS: dict[str, Callable[[Bench, int], str]] = {
    "methods": methods,
    "fora-steps": fora_steps,
    "fora-guidance": fora_guidance,
    "fora-branches": fora_branches,
    "delta": delta,
    "skipping": skipping,
    "eoc": eoc,
    "tgate": tgate,
    "l2c": l2c,
    "foretold": foretold,
}
NEEDS_CROSS_ATTENTION = ("tgate",)
TIMED = ("methods",)


if __name__ == "__main__":
    run(__doc__, EXPERIMENTS, TIMED, skipped={"digits": NEEDS_CROSS_ATTENTION})
