"""What every method gives for a share of the multiply-accumulates, without a search."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from dicache.calibrate.adacache import AdaCache, AdaCacheSpace
from dicache.calibrate.delta_cache import DeltaCache, DeltaCacheSpace
from dicache.calibrate.delta_dit import DeltaDit, DeltaDitSpace
from dicache.calibrate.dp import Dp
from dicache.calibrate.faster_diffusion import FasterDiffusion, FasterDiffusionSpace
from dicache.calibrate.first_block import FirstBlock, FirstBlockSpace
from dicache.calibrate.fora import Fora, ForaSpace
from dicache.calibrate.magcache import MagCache, MagCacheSpace
from dicache.calibrate.pab import Pab, PabSpace
from dicache.calibrate.smoothcache import SmoothCache, SmoothCacheSpace
from dicache.calibrate.taylorseer import TaylorSeer, TaylorSeerSpace
from dicache.calibrate.teacache import TeaCache, TeaCacheSpace
from dicache.calibrate.tgate import TGate, TGateSpace
from dicache.profiler import Profile
from dicache.schedules import Schedule

USUAL = 0.1  # of settings whose value is replaced by what the share asks for


def singles_of(profile: Profile, share: float) -> Mapping[str, Callable[[], Schedule]]:
    """Return what makes each method's schedule for a share, by name; it raises where the method cannot.

    Args:
        profile: That they are calibrated on.
        share: Of the multiply-accumulates, that is not to be exceeded.
    """
    on_plan = profile.anatomy, profile.provenance.target, profile.steps
    speedup = 1 / share
    attention = {kind: 2 for kind in profile.branches if "attn" in kind.partition(".")[0]}
    spaces: dict[str, Callable[[], Any]] = {
        "fora": lambda: ForaSpace(*on_plan, Fora(2)),
        "delta-cache": lambda: DeltaCacheSpace(*on_plan, DeltaCache()),
        "delta-dit": lambda: DeltaDitSpace(*on_plan, DeltaDit()),
        "faster-diffusion": lambda: FasterDiffusionSpace(*on_plan, FasterDiffusion()),
        "pab": lambda: PabSpace(*on_plan, Pab(attention)),
        "tgate": lambda: TGateSpace(*on_plan, TGate(max(1, profile.steps // 2))),
        "smoothcache": lambda: SmoothCacheSpace(profile, SmoothCache(USUAL)),
        "magcache": lambda: MagCacheSpace(profile, MagCache()),
        "teacache": lambda: TeaCacheSpace(profile, TeaCache(target_speedup=speedup), (), share),
        "adacache": lambda: AdaCacheSpace(profile, AdaCache(target_speedup=speedup), (), share),
        "first-block": lambda: FirstBlockSpace(profile, FirstBlock(target_speedup=speedup), (), share),
    }
    for granularity in ("body", "branch"):
        for order in (1, 2):
            settings = TaylorSeer(2, order, 1, granularity=granularity)
            fixed = ("order", "warm_up", "granularity")
            spaces[f"taylorseer {granularity} {order}"] = partial(TaylorSeerSpace, *on_plan, settings, fixed)

    def calibrated(space: Callable[[], Any]) -> Schedule:
        made = space()
        schedule: Schedule = made.schedule(made.plain(share))
        return schedule

    methods = {name: partial(calibrated, space) for name, space in spaces.items()}
    for order in (0, 1, 2):
        methods[f"dp {order}"] = partial(Dp(max_macs=share, order=order).calibrate, profile)
    return methods
