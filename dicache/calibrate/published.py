"""The numbers of operations that papers state, and what is counted for the same settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from dicache.anatomy import Anatomy
from dicache.calibrate.deepcache import DeepCache
from dicache.calibrate.delta_cache import DeltaCache
from dicache.calibrate.delta_dit import DeltaDit
from dicache.calibrate.fora import Fora
from dicache.calibrate.tgate import TGate
from dicache.evaluate.cost import planned_cost
from dicache.evaluate.counting import Macs, PassCost, Size
from dicache.models.configs import read_config
from dicache.schedules import Plan

T, G = 1e12, 1e9
WITHIN = 1e-3  # relative: papers' counters add some of what is neither a linear layer nor a convolution, such as norms
DELTA, TGATE, FORA, DIT = "Delta-DiT", "T-GATE", "FORA", "DiT"


@dataclass(frozen=True)
class Row:
    """A published number beside what is counted.

    Attributes:
        paper: Short name.
        what: Model and settings.
        published: The number.
        found: What is counted.
        unit: `T` or `G` multiply-accumulates, `layers`, or `%` of the layers.
        note: What to know of it.
    """

    paper: str
    what: str
    published: float
    found: float
    unit: str = "T"
    note: str = ""

    @property
    def deviation(self) -> float:
        return self.found / self.published - 1

    @property
    def reproduced(self) -> bool:
        return abs(self.deviation) <= WITHIN


def published_rows() -> list[Row]:
    """Return all rows. The models are built from their configurations, without weights."""
    return [*_delta_dit_rows(), *_tgate_rows(), *_fora_rows(), *_dit_rows()]


@cache
def _of(name: str) -> PassCost:
    source = read_config(name)
    usual = source.usual
    return PassCost(source, Size(usual["height"], usual["width"], usual["text_tokens"]))


@cache
def _anatomy(name: str) -> Anatomy:
    return _of(name).anatomy()


def _uncached(name: str, steps: int, passes: int = 2) -> float:
    return _of(name).total.papers * steps * passes / T


def _planned(name: str, plan: Plan, passes: int = 2) -> float:
    macs: Macs = planned_cost(_of(name), _anatomy(name), plan, passes=passes)
    return macs.papers / T


def _delta_dit_rows() -> list[Row]:
    pixart, dit, sd3 = _anatomy("pixart"), _anatomy("dit"), _anatomy("sd3")

    def skipping(name: str, anatomy: Anatomy, steps: int, blocks: int, passes: int = 2, b: int | None = None) -> float:
        return _planned(name, DeltaDit(2, blocks, b).plan(anatomy, steps), passes)

    def faster(blocks: int) -> float:
        return _planned("pixart", DeltaCache(2, str(blocks)).plan(pixart, 20))

    same = "skips as many blocks as Delta-Cache would"
    lcm = [
        Row(DELTA, f"PixArt-LCM, 4 steps, N_c = {blocks}", published, skipping("pixart-lcm", pixart, 4, blocks, 1))
        for blocks, published in ((4, 7.953), (6, 7.647), (11, 6.883), (16, 6.118))
    ]
    unet = _anatomy("sd15")
    branch = "branch 1: computes one of two blocks down and two of three up at the highest resolution in between"
    return [
        Row(DELTA, "PixArt-alpha 1024, 20 steps", 85.651, _uncached("pixart", 20)),
        Row(DELTA, "PixArt-alpha 1024, 13 steps", 55.673, _uncached("pixart", 13)),
        Row(DELTA, "PixArt-alpha, 20 steps, b = 12, N_c = 21", 53.532, skipping("pixart", pixart, 20, 21, b=12)),
        Row(DELTA, "PixArt-alpha, 20 steps, b = 10, N_c = 12", 67.297, skipping("pixart", pixart, 20, 12, b=10)),
        Row(DELTA, "PixArt-alpha, 20 steps, b = 8, N_c = 20", 55.061, skipping("pixart", pixart, 20, 20, b=8)),
        Row(DELTA, "PixArt-alpha, Faster Diffusion, I = 14", 64.238, faster(14), note=same),
        Row(DELTA, "PixArt-alpha, Faster Diffusion, I = 21", 53.532, faster(21), note=same),
        Row(DELTA, "PixArt-LCM, 4 steps", 8.565, _uncached("pixart-lcm", 4, 1)),
        *lcm,
        Row(DELTA, "DiT-XL/2 256, 20 steps", 4.579, _uncached("dit", 20)),
        Row(DELTA, "DiT-XL/2 256, 13 steps", 2.976, _uncached("dit", 13)),
        Row(DELTA, "DiT-XL/2 256, 20 steps, N_c = 21", 2.862, skipping("dit", dit, 20, 21)),
        Row(DELTA, "DiT-XL/2 256, 250 steps", 57.24, _uncached("dit", 250)),
        Row(DELTA, "DiT-XL/2 256, 157 steps", 35.94, _uncached("dit", 157), note="157 steps give this number"),
        Row(DELTA, "DiT-XL/2 256, 250 steps, N_c = 21", 35.77, skipping("dit", dit, 250, 21)),
        Row(DELTA, "SD3-medium 1024, 28 steps", 168.256, _uncached("sd3", 28), note="333 text tokens"),
        Row(DELTA, "SD3-medium, 18 steps", 108.164, _uncached("sd3", 18)),
        Row(
            DELTA,
            "SD3-medium, 28 steps, N_c = 18",
            105.160,
            skipping("sd3", sd3, 28, 18),
            note="N_c is not stated, and follows from the number",
        ),
        Row(DELTA, "SD1.5 512, 20 steps", 13.553, _uncached("sd15", 20)),
        Row(
            DELTA,
            "SD1.5 512, 20 steps, DeepCache, N = 2",
            7.923,
            _planned("sd15", DeepCache(2, branch=1).plan(unet, 20)),
            note=branch,
        ),
        Row(
            DELTA,
            "SD1.5 512, 20 steps, Delta-Cache, N = 2",
            7.923,
            _planned("sd15", DeltaCache(2, branch=1).plan(unet, 20)),
            note=branch,
        ),
    ]


def _tgate_rows() -> list[Row]:
    def row(what: str, published: float, gate: int, steps: int, name: str, passes: int) -> Row:
        found = _planned(name, TGate(gate, 1, 1, 0).plan(_anatomy(name), steps), passes)
        return Row(TGATE, f"{what}, {steps} steps, gate {gate}, sp 1, no warm-up", published, found)

    return [
        row("PixArt-alpha", 61.075, 10, 20, "pixart", 2),
        row("PixArt-alpha", 56.170, 8, 20, "pixart", 2),
        row("PixArt-LCM", 7.936, 2, 4, "pixart-lcm", 1),
        row("PixArt-LCM", 7.623, 1, 4, "pixart-lcm", 1),
    ]


def _fora_rows() -> list[Row]:
    anatomy = _anatomy("dit")
    layers = len(anatomy.blocks)
    published: Mapping[int, float] = {100: 2800, 250: 7000, 500: 14000}
    rows = [Row(FORA, f"DiT-XL/2, {n} steps", layers_, layers * n, "layers") for n, layers_ in published.items()]
    for steps, interval, share in ((100, 2, 50.0), (100, 3, 33.3), (500, 3, 33.3), (500, 6, 16.7)):
        end, start = (
            100 * len(Fora(interval, anchor).plan(anatomy, steps).computed_steps) / steps for anchor in ("end", "start")
        )
        told = f"the paper states 1/N; computed are {end:.1f} % counted from the end, {start:.1f} % from the start"
        rows.append(Row(FORA, f"DiT-XL/2, {steps} steps, N = {interval}", share, end, "%", told))
    return rows


def _dit_rows() -> list[Row]:
    note = "all operators, a pass; the paper calls them flops"
    published = {"dit": 118.64, "dit-512": 524.60}
    sizes = {"dit": 256, "dit-512": 512}
    return [Row(DIT, f"DiT-XL/2 {sizes[n]}", value, _of(n).total.all / G, "G", note) for n, value in published.items()]
