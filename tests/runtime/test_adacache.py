"""AdaCache against a plain copy of its published rule, which keeps what every branch of every block adds."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import LatteTransformer3DModel
from torch import Tensor, nn

from dicache import Schedule, apply
from dicache.anatomy import Anatomy, AnatomyError, survey
from dicache.anatomy.inputs import Inputs
from dicache.anatomy.overrides import Overrides
from dicache.runtime.ranks import Ranks
from dicache.schedules import AdaCachePolicy, Motion, Target
from tests.counting import macs, operators
from tests.tiny import (
    CHANNELS,
    SIZE,
    TOKENS,
    WIDTH,
    anatomy_of,
    arguments,
    dit,
    every_transformer,
    flux,
    latte,
    pixart,
    predict,
    replay,
)

FRAMES = 3
STEPS = 16
CODEBOOK = ((0.1, 4), (0.2, 3), (0.5, 2), (9.0, 1))
MOTION = Motion(scale=0.016, power=2.0, gradient=1.0, start=0.1, stop=0.9)
Build = Callable[[], nn.Module]
Call = dict[str, Any]


def call_of(model: nn.Module, frames: int = FRAMES, seed: int = 0) -> Call:
    if not isinstance(model, LatteTransformer3DModel):
        return arguments(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, CHANNELS, frames, SIZE, SIZE, generator=generator),
        "timestep": torch.full((2,), 500),
        "encoder_hidden_states": torch.randn(2, 8, 16, generator=generator),
    }


@cache
def anatomy(build: Build) -> Anatomy:
    model = build()
    return survey(model, Inputs((), call_of(model)))


def scheduled(build: Build, steps: int = STEPS, **settings: Any) -> Schedule:
    policy = AdaCachePolicy(**{"codebook": CODEBOOK, "decision_blocks": (1,), **settings})
    return Schedule("adacache", {}, anatomy(build), Target(), steps, policy=policy)


def denoised(model: nn.Module, seed: int, begin: Callable[[], None] | None = None) -> Iterator[Tensor]:
    """Sample with small steps, so that neighbouring ones are alike; yield the model's output at each."""
    given = call_of(model, seed=seed)
    for step in range(STEPS):
        if begin is not None:
            begin()
        given["timestep"] = torch.full((2,), 900 - (2, 5, 12)[seed % 3] * step)
        out = predict(model, given)
        given["hidden_states"] = given["hidden_states"] - 0.3 / STEPS * out[:, :CHANNELS]
        yield out


class Published:
    """AdaCache as released: every block keeps what its attention adds, and what its cross-attention and MLP add.

    Steps are counted from 1, as there.
    """

    def __init__(self, model: nn.Module, settings: AdaCachePolicy) -> None:
        self.settings = settings
        self.step, self.last, self.rate, self.moved = 0, 0, 1, 1.0
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.computed = ""
        self.overrides = Overrides()
        for block in anatomy(latte if isinstance(model, LatteTransformer3DModel) else dit).blocks:
            module = model.get_submodule(block.module)
            self.overrides.set(module, self.block(block.index, module))

    def begin(self) -> None:
        self.step += 1
        self.active = self.step == self.last + self.rate or self.step in (1, STEPS - 1, STEPS)
        self.computed += "C" if self.active else "."
        self.next_rate = self.rate
        if self.active:
            self.last = self.step

    def end(self) -> None:
        self.rate = self.next_rate

    def block(self, index: int, module: Any) -> Callable[..., Tensor]:
        def run(
            x: Tensor,
            attention_mask: Tensor | None,
            encoder_hidden_states: Tensor | None,
            encoder_attention_mask: Tensor | None,
            timestep: Tensor,
            cross_attention_kwargs: Any = None,
            class_labels: Tensor | None = None,
        ) -> Tensor:
            if not self.active:
                attention, rest = self.kept[index]
                return x + attention + rest
            if module.norm_type == "ada_norm_zero":
                normed, gate, shift, scale, gate_mlp = module.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
                gate, shift, scale, gate_mlp = (part[:, None] for part in (gate, shift, scale, gate_mlp))
                norm2 = module.norm3
            else:
                table = module.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)
                shift_msa, scale_msa, gate, shift, scale, gate_mlp = table.chunk(6, dim=1)
                normed, norm2 = module.norm1(x) * (1 + scale_msa) + shift_msa, module.norm2
            attention = gate * module.attn1(normed)
            x = x + attention
            rest = torch.zeros_like(x)
            if module.attn2 is not None:
                rest = module.attn2(x, encoder_hidden_states=encoder_hidden_states)
            rest = rest + gate_mlp * module.ff(norm2(x + rest) * (1 + scale) + shift)
            if index in self.settings.decision_blocks and index in self.kept:
                place = 0 if self.settings.branch == "attn" else 1
                self.decide(self.kept[index][place], (attention, rest)[place])
            self.kept[index] = attention, rest
            out: Tensor = x + rest
            return out

        return run

    def decide(self, cache: Tensor, res: Tensor) -> None:
        distance = float((cache - res).norm(p=1) / cache.norm(p=1)) / self.rate
        motion = self.settings.motion
        if motion is not None:
            moved = 1.0
            if motion.start * STEPS <= self.step <= motion.stop * STEPS:
                apart = (res[:, 1:] - res[:, :-1]).norm(p=1)  # a temporal block: (batch * places, frames, channels)
                m = float(apart / (res[:, 1:].norm(p=1) + res[:, :-1].norm(p=1)))
                moved = (m / motion.scale) ** motion.power
            gradient = motion.gradient * (moved - self.moved) / self.rate
            self.moved = moved
            distance *= moved + abs(gradient)
        rates = [rate for limit, rate in self.settings.codebook[:-1] if distance < limit]
        self.next_rate = rates[0] if rates else self.settings.codebook[-1][1]


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (dit, {}),
        (dit, {"branch": "rest", "decision_blocks": (2,)}),
        (latte, {}),
        (latte, {"motion": MOTION}),
        (latte, {"branch": "rest", "motion": replace(MOTION, scale=0.4), "decision_blocks": (3,)}),
    ],
)
def test_it_computes_and_gives_what_the_published_rule_does(build: Build, settings: dict[str, Any]) -> None:
    schedule = scheduled(build, **settings)
    assert isinstance(schedule.policy, AdaCachePolicy)
    counts = set()
    for seed in range(3):
        model = build()
        plain = Published(model, schedule.policy)
        want = []
        with plain.overrides:
            run = denoised(model, seed, plain.begin)
            for out in run:
                plain.end()
                want.append(out)
        with apply(model, schedule) as cache:
            cache.begin_generation()
            found = list(denoised(model, seed, cache.begin_step))
            assert cache.stats.steps == {"0": plain.computed}
        for one, two in zip(found, want, strict=True):
            assert torch.allclose(one, two, rtol=1e-3, atol=1e-4 * float(two.abs().max()))
        counts.add(plain.computed)
    assert any("." in letters for letters in counts)
    assert any("CC" in letters[2:-3] or ".." in letters for letters in counts)  # more than one rate


@every_transformer
def test_a_reused_step_runs_no_block(build: Build) -> None:
    model = build()
    given = arguments(model)
    schedule = scheduled(build, codebook=((1.0, 3),))
    with apply(model, schedule) as cache:
        replay(model, cache, [given] * 2)
        cache.begin_step()
        blocks = sum(block.macs for block in anatomy(build).blocks)
        assert macs(lambda: predict(model, given)) == anatomy(build).macs - blocks
        cache.begin_step()
        assert not any("scaled_dot_product" in name for name in operators(lambda: predict(model, given)))
        cache.begin_step()
        assert macs(lambda: predict(model, given)) == anatomy(build).macs
        assert cache.stats.steps == {"0": "CC..C"}
        want = (3 * anatomy(build).macs + 2 * (anatomy(build).macs - blocks)) / anatomy(build).macs
        assert cache.stats.macs == pytest.approx(want)


def test_what_is_kept_is_one_delta_and_one_residual() -> None:
    model = dit()
    with apply(model, scheduled(dit)) as cache:
        replay(model, cache, [call_of(model)] * 3)
        assert cache.stats.bytes_held == 2 * 2 * TOKENS * WIDTH * 4  # of two samples in float32


@pytest.mark.parametrize("branch", ["attn", "rest", "block"])
def test_two_passes_of_a_step_decide_by_themselves(branch: str) -> None:
    model = dit()
    schedule = scheduled(dit, branch=branch)
    seeds = (0, 5)

    def alone(seed: int) -> tuple[str, list[Tensor]]:
        with apply(model, schedule) as cache:
            cache.begin_generation()
            outputs = list(denoised(model, seed, cache.begin_step))
            return cache.stats.steps["0"], outputs

    want = [alone(seed) for seed in seeds]
    with apply(model, schedule) as cache:
        cache.begin_generation()
        first, second = denoised(model, seeds[0], cache.begin_step), denoised(model, seeds[1])
        found = list(zip(first, second, strict=True))
        assert cache.stats.steps == {"0": want[0][0], "1": want[1][0]}
    assert want[0][0] != want[1][0]
    for place in (0, 1):
        assert all(torch.equal(pair[place], one) for pair, one in zip(found, want[place][1], strict=True))


def test_a_generation_that_was_broken_off_leaves_nothing_behind() -> None:
    model = latte()
    schedule = scheduled(latte, motion=MOTION)
    with apply(model, schedule) as cache:
        cache.begin_generation()
        want = list(denoised(model, 0, cache.begin_step))
        letters = cache.stats.steps
        cache.begin_generation()
        broken = denoised(model, 7, cache.begin_step)
        for _ in range(6):
            next(broken)
        cache.begin_generation()
        found = list(denoised(model, 0, cache.begin_step))
        assert cache.stats.steps == letters
    assert all(torch.equal(one, two) for one, two in zip(found, want, strict=True))


def test_a_call_that_fails_is_computed_anew() -> None:
    model = dit()
    given = call_of(model)
    with apply(model, scheduled(dit, codebook=((1.0, 9),))) as cache:
        replay(model, cache, [given] * 3)
        cache.begin_step()
        with pytest.raises(RuntimeError, match="to have 4 channels"):
            predict(model, {**given, "hidden_states": torch.zeros(2, CHANNELS + 1, SIZE, SIZE)})
        cache.begin_step()
        assert torch.equal(predict(model, given), predict(dit(), given))
        assert cache.stats.steps["0"] == "CC.-C"


def test_detaching_gives_every_forward_back() -> None:
    model = latte()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with apply(model, scheduled(latte, branch="rest")) as cache:
        replay(model, cache, [call_of(model)] * 3)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_the_host_waits_once_in_a_computed_step_and_never_in_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    quotients = Ranks.quotients

    def counted(self: Ranks, sums: Tensor) -> list[float]:
        asked.append(len(sums))
        return quotients(self, sums)

    monkeypatch.setattr(Ranks, "quotients", counted)
    model = latte()
    with apply(model, scheduled(latte, 10, codebook=((9.0, 3),), decision_blocks=(1, 3), motion=MOTION)) as cache:
        found = []
        cache.begin_generation()
        for _ in range(10):
            cache.begin_step()
            predict(model, call_of(model))
            found.append(len(asked))
        assert cache.stats.steps == {"0": "CC..C..CCC"}
    assert found == [0, 1, 1, 1, 2, 2, 2, 2, 2, 2]  # nor where the next step is computed anyway
    assert asked == [3, 3]  # two blocks and motion together


def test_equal_steps_are_held_as_long_as_the_codebook_lets() -> None:
    model = pixart()
    with apply(model, scheduled(pixart, 12, codebook=((1e-9, 5), (1.0, 1)))) as cache:
        outputs = replay(model, cache, [call_of(model)] * 12)
        assert cache.stats.steps == {"0": "CC....C...CC"}
        assert cache.stats.distances["0"][1] == 0.0
    assert torch.allclose(outputs[3], outputs[1], atol=1e-5)


def test_motion_of_an_image_is_refused() -> None:
    model = dit()
    with apply(model, scheduled(dit, motion=MOTION)) as cache, pytest.raises(AnatomyError, match="--no-motion"):
        replay(model, cache, [call_of(model)] * 2)


def test_single_blocks_can_be_decided_by_as_a_whole() -> None:
    model = flux()
    schedule = Schedule(
        "adacache", {}, anatomy_of(flux), Target(), 8, policy=AdaCachePolicy(((1.0, 2),), (4,), branch="block")
    )
    with apply(model, schedule) as cache:
        replay(model, cache, [arguments(model)] * 8)
        assert cache.stats.steps == {"0": "CC.C.CCC"}
        assert cache.stats.distances["0"][3] == 0.0
