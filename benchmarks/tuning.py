"""dicache's own methods, and the settings that are tried of each: as many as of every peer."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.bench import Bench
from benchmarks.peers import THRESHOLDS, Settings, grid
from dicache.calibrate.adacache import AdaCache
from dicache.calibrate.delta_cache import DeltaCache
from dicache.calibrate.delta_dit import DeltaDit
from dicache.calibrate.dp import Dp
from dicache.calibrate.first_block import FirstBlock
from dicache.calibrate.fora import Fora
from dicache.calibrate.magcache import MagCache
from dicache.calibrate.methods import planned_schedule
from dicache.calibrate.pab import Pab
from dicache.calibrate.smoothcache import SmoothCache
from dicache.calibrate.taylorseer import TaylorSeer
from dicache.calibrate.teacache import TeaCache
from dicache.calibrate.tgate import TGate
from dicache.schedules import Schedule

MOST_FIRST = 4  # blocks that always run, as of the peers


@dataclass(frozen=True)
class Method:
    """A method of dicache and the settings that are tried of it.

    Attributes:
        name: As tables have it.
        grid: Settings.
        schedule: Makes a schedule of some of them.
    """

    name: str
    grid: tuple[Settings, ...]
    schedule: Callable[[Settings], Schedule]


@dataclass(frozen=True)
class Trial:
    """What some settings made of the tuning runs: PSNR in dB and share of the multiply-accumulates."""

    settings: Settings
    psnr: float
    macs_fraction: float


def best(trials: Sequence[Trial], budget: float) -> Trial | None:
    """Return the trial of the highest PSNR among those within the budget; of equal ones the cheapest."""
    kept = [trial for trial in trials if trial.macs_fraction <= budget + 1e-9]
    return max(kept, key=lambda trial: (trial.psnr, -trial.macs_fraction), default=None)


def thinned(settings: Sequence[Settings], most: int) -> list[Settings]:
    """Return at most so many of them, drawn at random, always in the same order: more of them begin with the fewer."""
    drawn = list(settings)
    if len(drawn) > most:
        random.Random(0).shuffle(drawn)
    return drawn[:most]


def methods(bench: Bench, steps: int, budgets: Sequence[float]) -> list[Method]:
    """Return those that can be asked of a model. Targets of methods that take one lie at and about the budgets."""
    anatomy, target, _ = bench.survey(steps)
    profile = bench.profile(steps)
    blocks = len(anatomy.blocks)

    def of(kind: type[Any]) -> Callable[[Settings], Schedule]:
        if hasattr(kind, "calibrate"):
            return lambda settings: kind(**settings).calibrate(profile)
        return lambda settings: planned_schedule(kind(**settings), *bench.survey(steps))

    def broadcast(settings: Settings) -> Schedule:
        ranges = {name: settings[name] for name in settings if name != "window"}
        plan = Pab(ranges, settings["window"]).plan(anatomy, steps, profile.provenance.target.timesteps)
        return Schedule("pab", {}, anatomy, target, steps, plan)

    intervals, targets = range(2, 7), [x / budget for budget in budgets for x in (1.0, 1.05, 1.15)]
    firsts = [count for count in profile.provenance.first_blocks if count <= MOST_FIRST]
    limits = [0.01 * 1.17**i for i in range(26)]
    expanded: dict[str, Sequence[Any]] = {"interval": intervals, "order": (1, 2, 3), "warm_up": (1, 2, 3)}
    windows = ((100, 800), (100, 950), (0, 1000), (0, 800), (200, 1000))
    found = [
        Method("FORA", grid(interval=intervals, anchor=("end", "start"), first=(0, 2, 4)), of(Fora)),
        Method("SmoothCache", grid(alpha=limits), of(SmoothCache)),
        Method(
            "TeaCache",
            grid(target_speedup=targets, degree=(1, 4), fit_to=("output", "residual")),
            of(TeaCache),
        ),
        Method("MagCache", grid(threshold=THRESHOLDS, max_skip=(1, 2, 3, 5), retention=(0.05, 0.1, 0.2)), of(MagCache)),
        Method(
            "first-block",
            grid(target_speedup=targets, first=firsts, max_continuous=(None, 2)),
            of(FirstBlock),
        ),
        Method("AdaCache", grid(target_speedup=targets), of(AdaCache)),
        Method("TaylorSeer, branches", grid(granularity=("branch",), **expanded), of(TaylorSeer)),
        Method("TaylorSeer, body", grid(granularity=("body",), **expanded), of(TaylorSeer)),
    ]
    if len(anatomy.segments) == 1:
        counts = sorted({max(1, round(blocks * share / 6)) for share in range(2, 7)})
        spans = sorted(
            {f"{first}-{first + n - 1}" for n in counts for first in (0, 1, blocks - n) if first + n <= blocks}
        )
        boundaries = [round(steps * share / 5) for share in range(6)]
        found += [
            Method("Delta-Cache", grid(interval=intervals, blocks=spans), of(DeltaCache)),
            Method(
                "Delta-DiT",
                grid(interval=intervals, blocks=counts, boundary=boundaries, order=("aligned", "reversed")),
                of(DeltaDit),
            ),
        ]
    if "cross_attn" in profile.branches:
        found += [
            Method("PAB", grid(attn=(2, 3, 5), cross_attn=(2, 4, 8), window=windows), broadcast),
            Method(
                "T-GATE rule",
                grid(gate=range(3, steps, 2), sp_interval=(1, 2, 3, 5), fi_interval=(1, 2, 4)),
                of(TGate),
            ),
        ]
    options: dict[str, Sequence[Any]] = {
        "max_macs": budgets,
        "granularity": ("body", "branch"),
        "aggregate": ("norms", "squares"),
        "warm_up": (1, 2, 3),
    }
    return [
        *found,
        Method("dp, hold", grid(predictor=("hold",), **options), of(Dp)),
        Method("dp, Taylor", grid(predictor=("taylor",), order=(1, 2), **options), of(Dp)),
    ]
