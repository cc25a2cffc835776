"""What every method gives for a share of the multiply-accumulates, and what a search varies it in."""

from collections.abc import Callable, Iterator
from functools import partial

from dicache.anatomy.parts import kind_of_branch
from dicache.calibrate.adacache import AdaCache, AdaCacheSpace
from dicache.calibrate.delta_cache import DeltaCache, DeltaCacheSpace
from dicache.calibrate.delta_dit import DeltaDit, DeltaDitSpace
from dicache.calibrate.dp import Dp
from dicache.calibrate.eoc import Eoc, Prior
from dicache.calibrate.faster_diffusion import FasterDiffusion, FasterDiffusionSpace
from dicache.calibrate.first_block import FirstBlock, FirstBlockSpace
from dicache.calibrate.fora import Fora, ForaSpace
from dicache.calibrate.judging import ROUNDING
from dicache.calibrate.magcache import MagCache, MagCacheSpace
from dicache.calibrate.mask import Mask
from dicache.calibrate.methods import CalibrationError, planned_schedule
from dicache.calibrate.pab import Pab, PabSpace
from dicache.calibrate.smoothcache import SmoothCache, SmoothCacheSpace
from dicache.calibrate.spaces import MethodSpace
from dicache.calibrate.taylorseer import TaylorSeer, TaylorSeerSpace
from dicache.calibrate.teacache import TeaCache, TeaCacheSpace
from dicache.calibrate.tgate import TGate, TGateSpace
from dicache.profiler import Profile
from dicache.schedules import Schedule
from dicache.schedules.corrections import Form

CORRECTIONS: tuple[tuple[Form, float], ...] = (("add", 1.0), ("add", 0.5), ("multiply", 0.1), ("multiply", 0.01))
USUAL = 0.1  # of settings whose value is replaced by what the share asks for


def spaces_of(profile: Profile, share: float) -> dict[str, Callable[[], MethodSpace]]:
    """Return what makes the spaces that a search varies each method in, by name; it raises where the method cannot.

    Args:
        profile: That they are calibrated on.
        share: Of the multiply-accumulates, that is aimed at.
    """
    on_plan = profile.anatomy, profile.provenance.target, profile.steps
    speedup = 1 / share
    attention = {kind: 2 for kind in profile.branches if "attn" in kind_of_branch(kind)}
    spaces: dict[str, Callable[[], MethodSpace]] = {
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
            spaces[f"taylorseer {granularity} {order}"] = partial(TaylorSeerSpace, *on_plan, settings)
    return spaces


def singles_of(profile: Profile, share: float) -> dict[str, Callable[[], Schedule]]:
    """Return what makes each method's schedule for a share, by name; it raises where the method cannot.

    Args:
        profile: That they are calibrated on.
        share: Of the multiply-accumulates, that is not to be exceeded.
    """

    def calibrated(space: Callable[[], MethodSpace]) -> Schedule:
        made = space()
        return made.schedule(made.plain(share))

    methods: dict[str, Callable[[], Schedule]] = {
        name: partial(calibrated, space) for name, space in spaces_of(profile, share).items()
    }
    methods["mask"] = partial(_even, profile, share)
    for order in (0, 1, 2):
        methods[f"dp {order}"] = partial(Dp(max_macs=share, order=order).calibrate, profile)
    return methods


def corrected(profile: Profile, prior: Prior, base: Schedule) -> Iterator[tuple[str, Schedule]]:
    """Yield a schedule that holds branches, corrected by the trend of their priors in several ways (EOC).

    Raises:
        CalibrationError: If it holds none.
    """
    for form, weight in CORRECTIONS:
        yield f"eoc, {form} {weight:g}", Eoc(weight, form).calibrate(profile, base, prior)


def _even(profile: Profile, share: float) -> Schedule:
    """Return the mask that computes as many steps as the share allows, evenly spread, and holds branches between."""
    anatomy, target, steps = profile.anatomy, profile.provenance.target, profile.steps
    for count in range(steps, 0, -1):
        computed = ",".join(str(place * steps // count) for place in range(count))
        schedule = planned_schedule(Mask({"*": computed}), anatomy, target, steps)
        if schedule.macs_fraction() <= share + ROUNDING:
            return schedule
    raise CalibrationError(f"mask: a share of {share:.3f} of the MACs cannot be reached in {steps} steps")
