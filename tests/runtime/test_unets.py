"""U-Nets: what is replayed is what a hand-written loop with a cached feature map or delta gives, bit for bit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor, nn

from dicache import Cache, Schedule, ScheduleError, apply
from dicache.anatomy import survey
from dicache.anatomy.inputs import Inputs
from dicache.calibrate.deepcache import DeepCache
from dicache.calibrate.delta_cache import DeltaCache
from dicache.calibrate.fora import Fora
from dicache.schedules import Plan, PlanError, Rule, Target
from tests.counting import alike, macs
from tests.tiny import (
    BATCH,
    SIZE,
    Build,
    anatomy_of,
    arguments,
    both_unets,
    generate,
    pipeline_of,
    predict,
    replay,
    sample,
    scheduled,
    unet,
    unet_xl,
)

STEPS = 7
BRANCHES = 9  # of both tiny U-Nets: three stages with two residual blocks and a sampler each, less the last sampler


class ByHand:
    """A U-Net's forward written out, with what enters the upper layers behind skip connection `branch` cached."""

    def __init__(self, model: Any, branch: int = 0, *, delta: bool = False) -> None:
        self.model, self.branch, self.delta = model, branch, delta
        self.cached: Tensor | None = None

    def down(self, h: Tensor, run: dict[str, Any], adapter: list[Tensor]) -> Iterator[Tensor]:
        """Yield the skip connections, the outermost first."""
        h = self.model.conv_in(h)
        yield h
        for stage in self.model.down_blocks:
            for i, resnet in enumerate(stage.resnets):
                h = self.layer(resnet, stage, i, h, run)
                if i + 1 == len(stage.resnets) and adapter and hasattr(stage, "attentions"):
                    h = h + adapter.pop(0)
                yield h
            if stage.downsamplers:
                h = stage.downsamplers[0](h)
                yield h

    def layer(self, resnet: nn.Module, stage: Any, i: int, h: Tensor, run: dict[str, Any]) -> Tensor:
        h = resnet(h, run["emb"])
        if hasattr(stage, "attentions"):
            h = stage.attentions[i](h, encoder_hidden_states=run["text"], return_dict=False)[0]
        return h

    def __call__(self, *, full: bool, freeu: bool = False, **given: Any) -> Tensor:
        model, x = self.model, given["sample"]
        emb = model.time_embedding(model.get_time_embed(sample=x, timestep=given["timestep"]))
        text = given["encoder_hidden_states"]
        added = model.get_aug_embed(
            emb=emb, encoder_hidden_states=text, added_cond_kwargs=given.get("added_cond_kwargs")
        )
        run = {"emb": emb if added is None else emb + added, "text": text}
        control, middle = given.get("down_block_additional_residuals"), given.get("mid_block_additional_residual")
        skips: list[Tensor] = []
        for made in self.down(x, run, list(given.get("down_intrablock_additional_residuals", ()))):
            skips.append(made)
            if not full and len(skips) == self.branch + 1:
                break
        entered = skips[self.branch]
        h = skips[-1]
        if full:
            mid = model.mid_block
            h = self.layer(mid.resnets[0], mid, 0, h, run)
            h = mid.resnets[1](h, run["emb"])
        if control is not None:
            skips = [skip + control[k] for k, skip in enumerate(skips)]
        number = BRANCHES
        for stage in model.up_blocks:
            for i, resnet in enumerate(stage.resnets):
                number -= 1
                if number == self.branch:
                    if full:
                        self.cached = (h - entered if self.delta else h).clone()
                    else:
                        assert self.cached is not None
                        h = entered + self.cached if self.delta else self.cached.clone()
                if not full and number > self.branch:
                    continue
                if number == BRANCHES - 1 and middle is not None:
                    h = h + middle
                skip = skips[number]
                if freeu:
                    h, skip = apply_freeu(stage.resolution_idx, h, skip, s1=0.9, s2=0.2, b1=1.4, b2=1.6)
                h = self.layer(resnet, stage, i, torch.cat([h, skip], dim=1), run)
            if stage.upsamplers and (full or number <= self.branch):
                h = stage.upsamplers[0](h, None)
        out: Tensor = model.conv_out(model.conv_act(model.conv_norm_out(h)))
        return out


def calls(model: nn.Module, batch: int = BATCH, **extra: Any) -> list[dict[str, Any]]:
    """Return what each step's call is given; no two steps are alike."""
    return [
        arguments(model, batch=batch, seed=step, timestep=900 - 100 * step)
        | {name: make(step) for name, make in extra.items()}
        for step in range(STEPS)
    ]


def made_by_hand(hand: ByHand, given: list[dict[str, Any]], interval: int, **options: Any) -> list[Tensor]:
    with torch.no_grad():
        return [hand(full=step % interval == 0, **{**options, **one}) for step, one in enumerate(given)]


def of(build: Build, settings: DeepCache | DeltaCache | Fora, steps: int = STEPS) -> Schedule:
    return Schedule("test", {}, anatomy_of(build), Target(), steps, settings.plan(anatomy_of(build), steps))


@both_unets
def test_the_forward_written_out_here_is_the_models_own(build: Build) -> None:
    model = build()
    given = arguments(model)
    assert torch.equal(made_by_hand(ByHand(model), [given], 1)[0], predict(model, given))


@both_unets
@pytest.mark.parametrize("branch", range(BRANCHES))
def test_deepcache_is_the_loop_written_by_hand(build: Build, branch: int) -> None:
    model = build()
    given = calls(model)
    want = made_by_hand(ByHand(model, branch), given, 3)
    with apply(model, of(build, DeepCache(3, branch))) as cache:
        got = replay(model, cache, given)
        assert cache.stats.steps == {"0": "C..C..C"}
        assert all(map(torch.equal, got, want))
        assert all(map(torch.equal, replay(model, cache, given), want))  # a second generation
        other = calls(model, batch=3)
        assert all(map(torch.equal, replay(model, cache, other), made_by_hand(ByHand(model, branch), other, 3)))
    assert not torch.equal(got[1], predict(model, given[1]))
    assert torch.equal(got[3], predict(model, given[3]))


@both_unets
@pytest.mark.parametrize("branch", range(BRANCHES))
def test_delta_cache_is_the_loop_written_by_hand(build: Build, branch: int) -> None:
    model, anatomy = build(), anatomy_of(build)
    if anatomy.obstacle(*anatomy.enclosed(branch), delta=True):
        with pytest.raises(ValueError, match=f"found branch {branch} .*have no difference"):
            DeltaCache(2, branch=branch).plan(anatomy, STEPS)
        return
    given = calls(model)[:6]
    want = made_by_hand(ByHand(model, branch, delta=True), given, 2)
    with apply(model, of(build, DeltaCache(2, branch=branch), 6)) as cache:
        got = replay(model, cache, given)
    assert all(map(torch.equal, got, want))
    with apply(model, of(build, DeltaCache(2, branch=branch), 2)) as cache:
        first, second = replay(model, cache, [given[0]] * 2)
    assert alike(second, first)


@both_unets
@pytest.mark.parametrize("branch", [0, 1, 4, 8])
def test_the_work_that_is_counted_is_the_work_that_is_done(build: Build, branch: int) -> None:
    model, anatomy = build(), anatomy_of(build)
    start, stop = anatomy.enclosed(branch)
    given = arguments(model)
    with apply(model, of(build, DeepCache(2, branch), 2)) as cache:
        cache.begin_generation()
        cache.begin_step()
        assert macs(lambda: predict(model, given)) == anatomy.macs
        cache.begin_step()
        left = macs(lambda: predict(model, given))
        assert left == anatomy.macs - sum(block.macs for block in anatomy.blocks[start:stop])
        assert cache.stats.macs == pytest.approx(1 + left / anatomy.macs)
        assert cache.stats.macs_fraction == pytest.approx(cache.stats.planned_macs_fraction)


@both_unets
def test_held_are_one_feature_map_and_shapes(build: Build) -> None:
    model, anatomy = build(), anatomy_of(build)
    with apply(model, of(build, DeepCache(3, 1))) as cache:
        replay(model, cache, calls(model))
        _, stop = anatomy.enclosed(1)
        channels, height, width = anatomy.blocks[stop - 1].shapes[1]
        feature = 4 * BATCH * channels * height * width
        assert feature <= cache.stats.peak_bytes_held < feature + 200
        assert cache.stats.bytes_held == 0


@both_unets
@pytest.mark.parametrize("branch", range(BRANCHES))
def test_what_freeu_writes_into_is_not_what_is_held(build: Build, branch: int) -> None:
    model: Any = build()
    given = calls(model)
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    want = made_by_hand(ByHand(model, branch), given, 4, freeu=True)
    with apply(model, of(build, DeepCache(4, branch))) as cache:
        assert all(map(torch.equal, replay(model, cache, given), want))


def residuals(step: int, shapes: list[torch.Size]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@both_unets
@pytest.mark.parametrize("branch", [0, 3, 8])
def test_what_a_controlnet_adds_is_added_to_what_is_computed(build: Build, branch: int) -> None:
    model = build()
    first = arguments(model)
    with torch.no_grad():
        hand = ByHand(model)
        emb = model.time_embedding(model.get_time_embed(sample=first["sample"], timestep=first["timestep"]))  # type: ignore[operator]
        run = {"emb": emb, "text": first["encoder_hidden_states"]}
        shapes = [skip.shape for skip in hand.down(first["sample"], run, [])]
    given = calls(
        model,
        down_block_additional_residuals=lambda step: tuple(residuals(step, shapes)),
        mid_block_additional_residual=lambda step: residuals(100 + step, shapes[-1:])[0],
    )
    want = made_by_hand(ByHand(model, branch), given, 3)
    assert torch.equal(want[0], predict(model, given[0]))
    assert survey(model, Inputs((), given[0])) == anatomy_of(build)
    with apply(model, of(build, DeepCache(3, branch))) as cache:
        assert all(map(torch.equal, replay(model, cache, given), want))


@pytest.mark.parametrize("branch", [0, 1, 5, 8])
def test_what_an_adapter_adds_is_added_to_what_is_computed(branch: int) -> None:
    model = unet()
    shapes = [torch.Size((BATCH, 8, SIZE, SIZE)), torch.Size((BATCH, 16, SIZE // 2, SIZE // 2))]

    def given() -> list[dict[str, Any]]:
        return calls(model, down_intrablock_additional_residuals=lambda step: residuals(step, shapes))

    want = made_by_hand(ByHand(model, branch), given(), 3)
    assert torch.equal(want[0], predict(model, given()[0]))
    with apply(model, of(unet, DeepCache(3, branch))) as cache:
        assert all(map(torch.equal, replay(model, cache, given()), want))


def test_an_adapter_that_adds_in_place_does_not_write_into_what_goes_on() -> None:
    model = unet_xl()  # whose first stage has no attention, so that the model adds to its output in place
    shapes = [torch.Size((BATCH, 8, SIZE // 2, SIZE // 2))]
    with apply(model, of(unet_xl, DeepCache(2, 0), 4)) as cache:
        given = calls(model, down_intrablock_additional_residuals=lambda step: residuals(step, shapes))[:4]
        adapted = replay(model, cache, given)
        plain = replay(model, cache, calls(model)[:1] * 4)
    assert torch.isfinite(torch.stack(adapted)).all()
    assert torch.equal(plain[0], plain[1])


@both_unets
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", [PNDMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_steps_are_counted_and_not_looked_up_by_their_timestep(
    build: Build, scheduler: type, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe: Any = pipeline_of(build)
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    pipe.scheduler = scheduler(steps_offset=1, **options) if options else scheduler()
    pipe.scheduler.set_timesteps(4)
    timesteps = pipe.scheduler.timesteps.tolist()
    steps = len(timesteps)
    assert scheduler is EulerDiscreteScheduler or len(set(timesteps)) < steps  # some timestep comes twice
    hand, step = ByHand(pipe.unet, 1), iter(range(steps))

    def forward(x: Tensor, t: Tensor, *, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        given: dict[str, Any] = {"sample": x, "timestep": t, "encoder_hidden_states": encoder_hidden_states}
        return (hand(full=next(step) % 3 == 0, added_cond_kwargs=kwargs.get("added_cond_kwargs"), **given),)

    with monkeypatch.context() as patch:
        patch.setattr(pipe.unet, "forward", forward)
        want = generate(pipe, guidance_scale=guidance)
    assert next(step, None) is None
    with apply(pipe, of(build, DeepCache(3, 1), steps)) as cache:
        assert torch.equal(generate(pipe, guidance_scale=guidance), want)
        assert cache.stats.steps == {"0": ("C.." * 3)[:steps]}
        assert torch.equal(generate(pipe, guidance_scale=guidance), want)
    assert not torch.equal(generate(pipe, guidance_scale=guidance), want)


@both_unets
def test_a_call_that_failed_keeps_nothing_and_the_next_generation_is_right(build: Build) -> None:
    model = build()
    given = calls(model)
    with apply(model, of(build, DeltaCache(2, branch=1), 4)) as cache:
        want = replay(model, cache, given[:4])
        cache.begin_generation()
        cache.begin_step()
        predict(model, given[0])
        cache.begin_step()
        wrong = {**given[1], "encoder_hidden_states": given[1]["encoder_hidden_states"][..., :3]}
        with pytest.raises(RuntimeError):
            predict(model, wrong)
        assert torch.equal(predict(model, given[2]), predict(build(), given[2]))  # computed: nothing was kept
        assert all(map(torch.equal, replay(model, cache, given[:4]), want))
        cache.begin_generation()
        cache.begin_step()
        predict(model, given[0])
        assert cache.stats.bytes_held > 0
        cache.begin_step()
        smaller = {**given[1], "sample": given[1]["sample"][..., : SIZE // 2]}
        assert torch.equal(predict(model, smaller), predict(build(), smaller))  # another size: computed
    assert cache.stats.bytes_held == 0
    assert torch.equal(predict(model, given[1]), predict(build(), given[1]))


@both_unets
def test_branches_of_its_transformers_and_residual_blocks_are_reused(build: Build) -> None:
    model, anatomy = build(), anatomy_of(build)
    given = arguments(model)
    with apply(model, of(build, Fora(2, "start"), 3)) as cache:
        first, second, _ = replay(model, cache, [given] * 3)
        assert torch.equal(first, second)
        sites = sum(site.macs for block in anatomy.blocks for site in block.sites)
        assert cache.stats.macs == pytest.approx(3 - sites / anatomy.macs)
    kinds = {key.partition(".")[2].partition(".")[0] for key in anatomy.sites}
    assert kinds == {"attn", "cross_attn", "mlp", "conv"}
    plan = Plan(2, (Rule("reuse", "C.", branch="cross_attn"),))  # as after T-GATE's gate
    with apply(model, Schedule("test", {}, anatomy, Target(), 2, plan)) as cache:
        cache.begin_generation()
        cache.begin_step()
        predict(model, given)
        cache.begin_step()
        crossing = sum(s.macs for block in anatomy.blocks for s in block.sites if s.branch.startswith("cross_attn"))
        assert macs(lambda: predict(model, given)) == anatomy.macs - crossing


@both_unets
def test_a_range_and_branches_outside_of_it_together(build: Build) -> None:
    model, anatomy = build(), anatomy_of(build)
    given = arguments(model)
    start, stop = anatomy.enclosed(1)
    rules = Rule("skip", "C.", blocks=f"{start}-{stop - 1}", predictor="feature"), Rule("reuse", "C.")
    with apply(model, scheduled(build, *rules)) as cache:
        first, second = replay(model, cache, [given] * 2)
    assert torch.equal(first, second)


def test_what_cannot_be_skipped_is_refused() -> None:
    anatomy = anatomy_of(unet)
    with pytest.raises(PlanError, match=r"blocks 0-5 .* what block 1 makes also enters block 28, through a skip conn"):
        Plan(2, (Rule("skip", "C.", blocks="0-5"),)).table(anatomy)
    with pytest.raises(PlanError, match=r"blocks 4-25 .* enters them is 8 x 8 x 8, what leaves them 16 x 8 x 8"):
        Plan(2, (Rule("skip", "C.", blocks="4-25"),)).table(anatomy)
    assert Plan(2, (Rule("skip", "C.", blocks="4-25", predictor="feature"),)).table(anatomy)


def test_a_schedule_for_another_u_net_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"made for a model with|blocks in"):
        apply(unet_xl(), of(unet, DeepCache()))
    with pytest.raises(ScheduleError, match=r"made for"):
        apply(unet(layers_per_block=1), of(unet, DeepCache()))


def test_latents_of_an_odd_size_are_brought_back_to_it() -> None:
    model = unet()
    odd = [{**one, "sample": one["sample"][..., :6, :6]} for one in calls(model)]
    with apply(model, of(unet, DeepCache(2, 0))) as cache:
        got = replay(model, cache, odd)
        assert [tuple(out.shape) for out in got] == [(BATCH, 4, 6, 6)] * STEPS
        assert torch.equal(got[2], predict(unet(), odd[2]))


def test_a_bare_u_net_is_sampled_like_any_model() -> None:
    model = unet()
    cache: Cache
    with apply(model, of(unet, DeepCache(2), 4)) as cache:
        assert torch.isfinite(sample(model, cache)).all()
