"""What each method lets a search vary: laws that hold for all of them, and what is one's own."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest

from dicache.calibrate import CalibrationError
from dicache.calibrate.adacache import AdaCache, AdaCacheSpace
from dicache.calibrate.deepcache import DeepCache, DeepCacheSpace
from dicache.calibrate.delta_cache import DeltaCache, DeltaCacheSpace
from dicache.calibrate.delta_dit import DeltaDit, DeltaDitSpace
from dicache.calibrate.eoc import Eoc, EocSpace
from dicache.calibrate.faster_diffusion import FasterDiffusion, FasterDiffusionSpace
from dicache.calibrate.first_block import FirstBlock, FirstBlockPlainSpace, FirstBlockSpace
from dicache.calibrate.fora import Fora, ForaSpace
from dicache.calibrate.magcache import MagCache, MagCacheSpace
from dicache.calibrate.methods import Between, Space
from dicache.calibrate.pab import Pab, PabSpace
from dicache.calibrate.smoothcache import SmoothCache, SmoothCacheSpace
from dicache.calibrate.spaces import MethodSpace, PlanSpace
from dicache.calibrate.studies import distribution
from dicache.calibrate.taylorseer import TaylorSeer, TaylorSeerSpace
from dicache.calibrate.teacache import TeaCache, TeaCacheSpace
from dicache.calibrate.tgate import TGate, TGateSpace
from dicache.profiler.storage import load, load_prior
from dicache.schedules import FirstBlockPolicy, Schedule, Target
from tests.cli.test_commands import dicache
from tests.tiny import anatomy_of, pixart, unet

STEPS, LONG = 8, 20
PLANS: dict[type[PlanSpace], Any] = {
    DeepCacheSpace: DeepCache(),
    DeltaCacheSpace: DeltaCache(blocks="2"),
    DeltaDitSpace: DeltaDit(),
    FasterDiffusionSpace: FasterDiffusion(),
    ForaSpace: Fora(2),
    PabSpace: Pab({"attn": 2, "cross_attn": 2, "mlp": 2}),
    TaylorSeerSpace: TaylorSeer(),
    TGateSpace: TGate(),
}


def plan_space(kind: type[PlanSpace], *fixed: str) -> PlanSpace:
    anatomy = anatomy_of(unet if kind is DeepCacheSpace else pixart)
    return kind(anatomy, Target(), LONG, PLANS[kind], fixed)


def executed(schedule: Schedule) -> tuple[object, ...]:
    return schedule.table(), schedule.collapse_guidance_from, schedule.macs_fraction()


def drawn(space: Space, count: int) -> list[Schedule]:
    """Return the schedules of random points, without those that are refused."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    axes = {name: distribution(name, axis) for name, axis in space.axes.items()}
    made = []
    for _ in range(count):
        with suppress(CalibrationError):
            made.append(space.schedule(study.ask(axes).params))
    return made


@pytest.mark.parametrize("kind", PLANS)
def test_a_space_of_plans_begins_with_what_the_method_gives(kind: type[PlanSpace]) -> None:
    space = plan_space(kind)
    assert executed(space.schedule(space.plain(None))) == executed(space.made(PLANS[kind]))
    assert space.schedule(space.plain(0.8)).macs_fraction() <= 0.8
    with pytest.raises(CalibrationError, match=r"a share of 0.001 of the MACs cannot be reached in 20 steps"):
        space.plain(0.001)
    assert json.loads(json.dumps(space.identity))["made_for"] == space.made_for
    made = drawn(space, 40)
    assert len(made) > 10
    assert len({json.dumps(schedule.to_json()["plan"]) for schedule in made}) > 5


@pytest.mark.parametrize("kind", PLANS)
def test_what_is_given_is_not_varied(kind: type[PlanSpace]) -> None:
    for name in plan_space(kind).axes:
        given = "window" if name in ("low", "high") else "ranges" if kind is PabSpace else name
        fewer = plan_space(kind, given)
        assert name not in fewer.axes
        assert executed(fewer.schedule(fewer.plain(None))) == executed(fewer.made(PLANS[kind]))


def test_of_a_unet_delta_cache_varies_the_branch() -> None:
    space = DeltaCacheSpace(anatomy_of(unet), Target(), LONG, DeltaCache())
    assert space.axes["branch"] == (0, 1, 4, 5, 6, 7, 8)
    assert len(drawn(space, 10)) == 10


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spaces")
    base = folder / "base.json"
    dicache("calibrate", "fora", "--model", "digits", "--steps", STEPS, "--interval", 2, "-o", base)
    words = ("--runs", 2, "--steps", STEPS, "--first-blocks", "1,2", "--priors-for", base)
    dicache("profile", "--model", "digits", *words, "-o", folder / "p.h5")
    return folder / "p.h5"


def eoc_space(file: Path) -> EocSpace:
    base = Schedule.load(file.with_name("base.json"))
    return EocSpace(load(file), Eoc(), base=base, prior=partial(load_prior, file))


PROFILED: dict[str, Callable[[Path], MethodSpace]] = {
    "adacache": lambda file: AdaCacheSpace(load(file), AdaCache(preset="fast", target_speedup=1.4)),
    "eoc": eoc_space,
    "first-block": lambda file: FirstBlockSpace(load(file), FirstBlock(target_speedup=1.8)),
    "magcache": lambda file: MagCacheSpace(load(file), MagCache(retention=0.25)),
    "smoothcache": lambda file: SmoothCacheSpace(load(file), SmoothCache(0.15)),
    "teacache": lambda file: TeaCacheSpace(load(file), TeaCache(target_speedup=1.8)),
}


@pytest.mark.parametrize("method", PROFILED)
def test_a_space_of_a_profile_begins_with_what_the_method_gives(method: str, profile_file: Path) -> None:
    space = PROFILED[method](profile_file)
    want = space.made(space.settings)
    plain = space.schedule(space.plain(None))
    assert (plain.method, plain.plan, plain.policy) == (method, want.plan, want.policy)
    assert json.loads(json.dumps(space.identity))["made_for"] == space.made_for
    assert space.schedule(space.plain(0.7)).macs_fraction() <= 0.7 + 1e-4
    made = drawn(space, 12)
    contents = [schedule.to_json() for schedule in made]
    parts = ("plan", "policy", "corrections")
    assert len({json.dumps([content.get(part) for part in parts]) for content in contents}) > 3


def test_spaces_of_other_profiles_are_not_the_same(profile_file: Path) -> None:
    space = SmoothCacheSpace(load(profile_file), SmoothCache(0.15))
    arrays = dict(space.profile.arrays)
    name = next(iter(arrays))
    arrays[name] = arrays[name] + 1
    other = replace(space, profile=replace(space.profile, arrays=arrays))
    assert other.identity != space.identity


def test_shares_are_drawn_from_around_the_target(profile_file: Path) -> None:
    space = FirstBlockSpace(load(profile_file), FirstBlock(target_speedup=2.0), ("warm_up",), 0.5)
    shares = space.axes["macs"]
    assert isinstance(shares, Between)
    assert (shares.low, shares.high) == pytest.approx((0.4, 0.6))
    assert set(space.axes) == {"macs", "first", "last"}
    assert space.plain(0.5)["macs"] == 0.5
    with pytest.raises(CalibrationError, match=r"0.100 of the MACs cannot be reached in 8 steps; the least is"):
        assert replace(space, max_macs=0.1).axes


def test_without_a_profile_the_threshold_itself_is_drawn() -> None:
    space = FirstBlockPlainSpace(anatomy_of(pixart), Target(), LONG, FirstBlock(0.08))
    assert space.plain(0.5) == {"threshold": 0.08, "last": 0, "warm_up": 1}
    policies = [schedule.policy for schedule in drawn(space, 10)]
    assert len({policy.threshold for policy in policies if isinstance(policy, FirstBlockPolicy)}) == 10
