"""FirstBlockCache against a plain rendering of its rule, and against diffusers' own."""

from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from dicache import Schedule, apply
from dicache.anatomy import survey
from dicache.runtime.ranks import Ranks
from dicache.runtime.streams import Streams, Tensors
from dicache.schedules import FirstBlockPolicy, Target
from tests.counting import alike, macs
from tests.tiny import (
    BATCH,
    TEXT_TOKENS,
    TOKENS,
    WIDTH,
    Build,
    anatomy_of,
    arguments,
    block_of,
    denoise,
    dit,
    every_transformer,
    first_block,
    flux,
    generate,
    pipeline_of,
    pixart,
    predict,
    replay,
    sample,
    sd3,
    sd35,
)
from tests.toys import CHAINS, Chain, every_chain, toy_inputs

STEPS = 8
SETTINGS: list[dict[str, Any]] = [
    {},
    {"first": 2},
    {"last": 1},
    {"max_continuous": 1},
    {"max_cached": 2},
    {"first_steps": 3, "last_steps": 1},
]
THRESHOLDS = {dit: 0.7, pixart: 0.2, sd3: 0.6, sd35: 0.5, flux: 0.6}  # that skip some steps and not others


class Plain:
    """The rule with nothing saved: all blocks run at every step, and what a skip would not have made is thrown away."""

    def __init__(self, model: nn.Module, build: Build, policy: FirstBlockPolicy) -> None:
        self.policy, self.letters = policy, ""
        self.kept_h: Tensor | None = None
        self.kept: dict[int, Tensors] = {}
        self.skipped = self.in_a_row = self.in_all = 0
        anatomy = anatomy_of(build)
        start, stop = policy.skipped(anatomy)
        parts = [(max(a, start), min(b, stop)) for a, b in anatomy.segments]
        self.entered: dict[int, Tensors] = {}
        for index, block in enumerate(anatomy.blocks):
            module = model.get_submodule(block.module)
            streams = Streams(block, module, module.forward)
            ends = [a for a, b in parts if a < b and b == index + 1]
            module.register_forward_pre_hook(self.enter(index, streams), with_kwargs=True)
            if index == start - 1:
                module.register_forward_hook(self.measure(streams))
            if ends:
                module.register_forward_hook(self.leave(ends[0], streams))

    def enter(self, index: int, streams: Streams) -> Any:
        def look(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.entered[index] = streams.read(args, kwargs)

        return look

    def measure(self, streams: Streams) -> Any:
        def look(_: nn.Module, args: Any, out: Any) -> None:
            h = streams.unpack(out)["hidden_states"] - self.entered[0]["hidden_states"]
            self.decide(len(self.letters), h)

        return look

    def decide(self, step: int, h: Tensor) -> None:
        policy = self.policy
        compute = self.kept_h is None or step < policy.first_steps or step >= STEPS - policy.last_steps
        compute = compute or self.in_a_row == policy.max_continuous or self.in_all == policy.max_cached
        if not compute:
            assert self.kept_h is not None
            compute = not float((self.kept_h - h).abs().mean() / self.kept_h.abs().mean()) < policy.threshold
        self.letters += "C" if compute else "."
        self.in_a_row = 0 if compute else self.in_a_row + 1
        self.in_all += not compute
        if compute:
            self.kept_h = h

    def leave(self, start: int, streams: Streams) -> Any:
        def look(_: nn.Module, args: Any, out: Any) -> Any:
            left, entered = streams.unpack(out), self.entered[start]
            if self.letters[-1] == "C":
                self.kept[start] = {name: tensor - entered[name] for name, tensor in left.items()}
                return out
            return streams.pack({name: entered[name] + change for name, change in self.kept[start].items()})

        return look


@pytest.mark.parametrize("settings", SETTINGS)
@every_transformer
def test_it_does_what_the_plain_rule_does(build: Build, settings: dict[str, Any]) -> None:
    compare_with_plain(build, settings)


def test_all_blocks_of_the_first_segment_may_be_first_ones() -> None:
    """The decision is then taken where the streams are already those of the next segment."""
    compare_with_plain(flux, {"first": 3, "threshold": 0.9})


def compare_with_plain(build: Build, settings: dict[str, Any]) -> None:
    schedule = first_block(build, **{"threshold": THRESHOLDS[build], "steps": STEPS, **settings})
    assert isinstance(schedule.policy, FirstBlockPolicy)
    reference = build()
    plain = Plain(reference, build, schedule.policy)
    want = sample(reference, steps=STEPS)
    model = build()
    with apply(model, schedule) as cache:
        got = sample(model, cache, steps=STEPS)
        assert cache.stats.steps == {"0": plain.letters}
    assert torch.equal(got, want)
    if not settings:
        assert 2 <= plain.letters.count(".") <= STEPS - 2


class Theirs:
    """diffusers' FirstBlockCache on a model, and at which steps it ran the blocks behind the first."""

    def __init__(self, model: Any, build: Build, threshold: float) -> None:
        self.model, self.letters = model, ""
        self.ran = False
        block = anatomy_of(build).blocks[1]
        branch = model.get_submodule(f"{block.module}.{block.sites[0].module}")
        branch.register_forward_hook(self.note)
        if not isinstance(model, CacheMixin):  # its hooks know the blocks, but the model does not offer to cache
            model.__class__ = type("Cached", (type(model), CacheMixin), {})
        model.enable_cache(FirstBlockCacheConfig(threshold=threshold))

    def note(self, *_: object) -> None:
        self.ran = True

    def sample(self) -> Tensor:
        outputs = []
        with self.model.cache_context("pass"):
            for out in denoise(self.model, steps=STEPS):
                outputs.append(out)
                self.letters, self.ran = self.letters + ("C" if self.ran else "."), False
        return torch.stack(outputs)


@pytest.mark.parametrize("build", [dit, pixart, flux])
def test_decisions_and_outputs_are_those_of_diffusers(build: Build) -> None:
    theirs = Theirs(build(), build, THRESHOLDS[build])
    want = theirs.sample()
    assert 2 <= theirs.letters.count(".") <= STEPS - 2
    model = build()
    with apply(model, first_block(build, THRESHOLDS[build], STEPS, at_threshold="reuse")) as cache:
        got = sample(model, cache, steps=STEPS)
        assert cache.stats.steps == {"0": theirs.letters}
    for step in range(STEPS):
        assert torch.allclose(got[step], want[step], rtol=1e-4, atol=1e-5)


@every_transformer
def test_a_step_equal_to_the_last_computed_one_is_skipped_and_gives_the_same_but_for_rounding(build: Build) -> None:
    model = build()
    given = arguments(model)
    want = predict(model, given)
    for last in (0, 1):
        with apply(model, first_block(build, 1e-9, last=last)) as cache:
            outputs = replay(model, cache, [given] * 4)
            assert cache.stats.steps == {"0": "C..."}
        assert torch.equal(outputs[0], want)
        for out in outputs[1:]:
            assert alike(out, want)


@every_chain
def test_equal_inputs_of_a_toy_are_skipped_wherever_its_segments_end(chain: str) -> None:
    model, inputs = Chain(**CHAINS[chain]), toy_inputs()
    schedule = Schedule("first-block", {}, survey(model, inputs), Target(), 4, policy=FirstBlockPolicy(1e-9))
    with torch.no_grad():
        want = model(*inputs.args, **inputs.kwargs)
    with apply(model, schedule) as cache, torch.no_grad():
        cache.begin_generation()
        for _ in range(4):
            cache.begin_step()
            assert alike(model(*inputs.args, **inputs.kwargs), want)
        assert cache.stats.steps == {"0": "C..."}


@every_transformer
def test_drift_is_counted_from_the_last_computed_step(build: Build) -> None:
    model = build()
    near, far = arguments(model), arguments(model, seed=1)
    with apply(model, first_block(build, 0.05)) as cache:
        replay(model, cache, [near, far, near, near])
        assert cache.stats.steps == {"0": "CCC."}
        distances = cache.stats.distances["0"]
        assert distances[0] is None
        assert distances[3] == 0
    with apply(model, first_block(build, 99.0)) as cache:
        replay(model, cache, [near, far, near, near])
        assert cache.stats.steps == {"0": "C..."}
        distances = cache.stats.distances["0"]
        assert distances[1] is not None
        assert distances[1] > 0
        assert distances[2:] == [0, 0]  # the first step is still what it is compared with


@every_transformer
@pytest.mark.parametrize("settings", SETTINGS[:3])
def test_a_skipped_step_runs_the_first_and_the_last_blocks_and_the_head(build: Build, settings: Any) -> None:
    model = build()
    anatomy, given = anatomy_of(build), arguments(model)
    schedule = first_block(build, 99.0, **settings)
    assert schedule.policy is not None
    start, stop = schedule.policy.skipped(anatomy)
    with apply(model, schedule) as cache:
        cache.begin_generation()
        cache.begin_step()
        assert macs(lambda: predict(model, given)) == anatomy.macs
        cache.begin_step()
        done = macs(lambda: predict(model, given))
        assert done == anatomy.macs - sum(block.macs for block in anatomy.blocks[start:stop])
        assert cache.stats.macs * anatomy.macs == pytest.approx(anatomy.macs + done)
        skipped = sum(len(block.sites) for block in anatomy.blocks[start:stop])
        assert cache.stats.skipped_sites == skipped


@every_transformer
def test_guidance_passes_decide_each_for_themselves(build: Build) -> None:
    model = build()
    still = arguments(model)
    with apply(model, first_block(build, 0.01)) as cache:
        cache.begin_generation()
        for step in range(4):
            cache.begin_step()
            predict(model, still)
            predict(model, arguments(model, seed=step))
        assert cache.stats.steps == {"0": "C...", "1": "CCCC"}


@every_transformer
def test_a_signal_that_is_not_a_number_computes(build: Build) -> None:
    model = build()
    broken = arguments(model)
    broken["hidden_states"] = torch.full_like(broken["hidden_states"], torch.nan)
    with apply(model, first_block(build, 99.0)) as cache:
        replay(model, cache, [broken] * 4)
        assert cache.stats.steps == {"0": "CCCC"}


@every_transformer
def test_what_is_kept_is_one_residual_and_the_deltas(build: Build) -> None:
    model = build()
    anatomy = anatomy_of(build)
    token = BATCH * WIDTH * 4  # bytes
    text = 2 * TEXT_TOKENS if build is flux else 0  # in both segments; SD3's last block makes none
    held = []
    with apply(model, first_block(build, THRESHOLDS[build], STEPS)) as cache:
        for _ in denoise(model, cache, steps=STEPS):
            held.append(cache.stats.bytes_held)
    assert held[:-1] == [token * (TOKENS + len(anatomy.segments) * TOKENS + text)] * (STEPS - 1)
    assert held[-1] == 0


@every_transformer
def test_a_pipeline_decides_like_a_bare_model_and_keeps_nothing_afterwards(build: Build) -> None:
    pipe = pipeline_of(build)
    with apply(pipe, first_block(build, 99.0, max_continuous=2)) as cache:
        first = generate(pipe)
        assert list(cache.stats.steps.values()) == ["C..C"]
        assert cache.stats.bytes_held == 0
        assert torch.equal(generate(pipe), first)


@every_transformer
def test_a_call_that_fails_between_the_first_block_and_the_decision_leaves_nothing(build: Build) -> None:
    model = build()
    given = arguments(model)
    want = predict(model, given)
    with apply(model, first_block(build, 99.0)) as cache:
        cache.begin_generation()
        cache.begin_step()
        predict(model, given)
        cache.begin_step()
        handle = block_of(model, build, 0).register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            predict(model, given)
        handle.remove()
        cache.begin_step()
        assert torch.equal(predict(model, given), want)  # computed: nothing is kept
    assert torch.equal(predict(model, given), want)


@pytest.mark.parametrize(
    ("settings", "step", "before", "after"),
    [
        ({}, 0, 1, 1),  # the others decide at the next step
        ({}, 3, 1, 0),
        ({"last_steps": 1}, 3, 0, 0),
        ({"threshold": 0.0}, 1, 0, 0),
        ({"max_cached": 1}, 1, 1, 0),
        ({"max_cached": 1}, 2, 0, 0),
        ({"max_continuous": 1}, 2, 1, 1),  # computed in any case, but the next one is not
        ({"max_continuous": 3}, 3, 1, 0),
        ({"max_continuous": 2}, 3, 0, 0),
    ],
)
@pytest.mark.parametrize("block", [0, 3])
def test_a_rank_that_fails_tells_the_others_if_they_will_wait_for_it(
    settings: dict[str, Any], step: int, before: int, after: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it fails before a step's decision, in the first block, or after it, in the last."""
    given_up: list[int] = []
    monkeypatch.setattr(Ranks, "give_up", lambda self, count: given_up.append(count))
    model = dit()
    given = arguments(model)
    with apply(model, first_block(dit, **{"threshold": 99.0, "last": 1, **settings})) as cache:
        replay(model, cache, [given] * step)
        cache.begin_step()
        handle = block_of(model, dit, block).register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            predict(model, given)
        handle.remove()
    assert given_up == [2] * (before if block == 0 else after)


def fail(*_: object) -> None:
    raise RuntimeError("on purpose")
