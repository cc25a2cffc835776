"""Guidance that collapses: one pass is computed from some step on, and pipelines know nothing of it."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PixArtTransformer2DModel,
)
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.latte.pipeline_latte import LattePipeline
from torch import Tensor, nn

from dicache import Schedule, ScheduleError, apply
from dicache.anatomy import Anatomy, survey
from dicache.anatomy.inputs import Inputs
from dicache.calibrate.methods import planned_schedule
from dicache.calibrate.tgate import TGate
from dicache.schedules import Plan, Rule, Target
from tests.counting import broken, macs, operators
from tests.tiny import (
    CAPTION,
    CHANNELS,
    SIZE,
    TEXT_TOKENS,
    WIDTH,
    anatomy_of,
    arguments,
    dit,
    generate,
    latte,
    pipeline_of,
    pixart,
)

GUIDANCE = 4.5
STEPS = 8
FRAMES = 3
# T-GATE's tables for 8 steps with the gate at 5, self-attention every 3 steps before it and every 2 behind it, warm-up
# 1: C computed, S also stored, A also stored as the mean of both passes, r the stored one.
CROSS = "CCCCArrr"
SELF = "CSrSArSr"
STOCHASTIC = (EulerAncestralDiscreteScheduler, LCMScheduler)
SETTINGS = TGate(gate=5, sp_interval=3, fi_interval=2, warm_up=1)


def tgate(anatomy: Anatomy, settings: TGate = SETTINGS, steps: int = STEPS) -> Schedule:
    return planned_schedule(settings, anatomy, Target(), steps)


class Reference:
    """T-GATE around the attention modules of a model, by its table and without dicache.

    Args:
        model: Whose attention it replaces.
        cross: A letter a step for cross-attention.
        own: The same for self-attention.
        mean: Whether what is stored at A is the mean over the halves of the batch.
    """

    def __init__(self, model: nn.Module, cross: str = CROSS, own: str = SELF, *, mean: bool) -> None:
        self.step, self.mean = 0, mean
        for name, module in model.named_modules():
            if name.endswith((".attn1", ".attn2")):
                module.forward = self.gated(module.forward, cross if name.endswith("2") else own)

    def gated(self, forward: Callable[..., Tensor], letters: str) -> Callable[..., Tensor]:
        stored: list[Tensor] = []

        def run(*args: Any, **kwargs: Any) -> Tensor:
            letter = letters[self.step]
            if letter == "r":
                return stored[-1]
            out = forward(*args, **kwargs)
            if letter == "A" and self.mean:
                first, second = out.chunk(2)
                stored.append((first + second) / 2)
            elif letter in "AS":
                stored.append(out)
            return out

        return run


def text_of(batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return the text that `tests.tiny.generate` gives: of the prompts, and of no prompt."""
    text = torch.randn(2, batch, TEXT_TOKENS, CAPTION, generator=torch.Generator().manual_seed(seed))
    return text[0], text[1]


def reference(
    pipe: Any,
    *,
    batch: int = 1,
    guidance: float = GUIDANCE,
    cross: str = CROSS,
    own: str = SELF,
    collapses: bool = True,
    per_prompt: int = 1,
    seed: int = 0,
    latents: Tensor | None = None,
) -> Tensor:
    """Sample from a PixArt or a Latte in a loop written out here: both passes up to the gate, then the unguided one."""
    guided = guidance > 1
    gated = Reference(pipe.transformer, cross, own, mean=guided and collapses)
    scheduler, latte = pipe.scheduler, isinstance(pipe, LattePipeline)
    scheduler.set_timesteps(len(cross))
    generator = torch.Generator().manual_seed(seed)
    shape = (CHANNELS, FRAMES, SIZE, SIZE) if latte else (CHANNELS, SIZE, SIZE)
    latents = torch.randn(batch * per_prompt, *shape, generator=generator) if latents is None else latents
    latents = latents * scheduler.init_noise_sigma
    prompts, nothing = (part.repeat_interleave(per_prompt, dim=0) for part in text_of(batch))
    more: dict[str, Any] = {} if latte else {"encoder_attention_mask": torch.ones(batch * per_prompt, TEXT_TOKENS)}
    if not latte:
        more["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    for step, t in enumerate(scheduler.timesteps):
        gated.step = step
        both = guided and (cross[step] != "r" or not collapses)
        text = torch.cat([nothing, prompts]) if both else nothing if guided else prompts
        x = scheduler.scale_model_input(torch.cat([latents] * 2) if both else latents, t)
        if not latte:
            more["encoder_attention_mask"] = torch.ones(len(x), TEXT_TOKENS)
        with torch.no_grad():
            out = pipe.transformer(x, encoder_hidden_states=text, timestep=t.expand(len(x)), **more).sample
        if both:
            uncond, cond = out.chunk(2)
            out = uncond + guidance * (cond - uncond)
        extra = {"generator": generator} if isinstance(scheduler, STOCHASTIC) else {}
        latents = scheduler.step(out.chunk(2, dim=1)[0], t, latents, return_dict=False, **extra)[0]
    return latents


def latte_pipeline() -> Any:
    vae = pipeline_of(pixart).vae
    pipe = LattePipeline(None, None, vae, latte(FRAMES), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def replayed(
    pipe: Any,
    schedule: Schedule | None,
    *,
    batch: int = 1,
    guidance: float = GUIDANCE,
    per_prompt: int = 1,
    seed: int = 0,
    steps: int = STEPS,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Return what an unmodified pipeline makes with a schedule, and the stats."""
    given: dict[str, Any] = {"num_images_per_prompt": per_prompt, "guidance_scale": guidance, **options}
    with apply(pipe, schedule) if schedule else nullcontext() as cache:
        if not isinstance(pipe, LattePipeline):
            return generate(pipe, steps=steps, batch=batch, seed=seed, **given), cache and cache.stats
        prompts, nothing = text_of(batch)
        video = pipe(
            prompt_embeds=prompts,
            negative_prompt=None,
            negative_prompt_embeds=nothing,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            height=SIZE,
            width=SIZE,
            video_length=FRAMES,
            output_type="latent",
            clean_caption=False,
            mask_feature=False,
            **given,
        )
        return video.frames, cache and cache.stats


def with_scheduler(kind: type, **config: Any) -> Any:
    pipe = pipeline_of(pixart)
    pipe.scheduler = kind(**config)
    return pipe


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
def test_a_pipeline_that_knows_nothing_of_it_makes_what_the_methods_own_loop_makes(batch: int, guidance: float) -> None:
    want = reference(pipeline_of(pixart), batch=batch, guidance=guidance)
    schedule = tgate(anatomy_of(pixart))
    got, stats = replayed(pipeline_of(pixart), schedule, batch=batch, guidance=guidance)
    assert torch.equal(got, want)
    uncached, _ = replayed(pipeline_of(pixart), None, batch=batch, guidance=guidance)
    assert not torch.allclose(got, uncached, atol=1e-3)
    assert stats.collapsed_passes == (3 if guidance > 1 else 0)
    assert stats.macs_fraction == pytest.approx(schedule.macs_fraction(guided=guidance > 1))
    assert stats.steps == {"0": "CC.CC..."}


@pytest.mark.parametrize("per_prompt", [2, 3])
def test_several_images_of_each_prompt(per_prompt: int) -> None:
    want = reference(pipeline_of(pixart), batch=2, per_prompt=per_prompt)
    got, _ = replayed(pipeline_of(pixart), tgate(anatomy_of(pixart)), batch=2, per_prompt=per_prompt)
    assert torch.equal(got, want)


@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_other_samplers_also_those_that_add_noise(kind: type, guidance: float) -> None:
    want = reference(with_scheduler(kind), batch=2, guidance=guidance)
    got, _ = replayed(with_scheduler(kind), tgate(anatomy_of(pixart)), batch=2, guidance=guidance)
    assert torch.equal(got, want)


def test_steps_are_rounds_of_a_solver_that_takes_two_of_them() -> None:
    cross, own = "CCCArrrrr", "CSrASrSrS"
    settings = TGate(gate=4, sp_interval=9, fi_interval=2, warm_up=1)
    schedule = tgate(anatomy_of(pixart), settings, steps=9)
    want = heun_reference(cross, own)
    got, stats = replayed(with_scheduler(HeunDiscreteScheduler), schedule, steps=5)
    assert torch.equal(got, want)
    assert stats.calls == 9


def heun_reference(cross: str, own: str) -> Tensor:
    pipe = with_scheduler(HeunDiscreteScheduler)
    set_timesteps = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda rounds: set_timesteps((rounds + 1) // 2)
    return reference(pipe, cross=cross, own=own)


@pytest.mark.parametrize("gate", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_consistency_model_has_no_guidance_and_nothing_is_averaged(gate: int, batch: int) -> None:
    cross, own = {1: ("Arrr", "ASSS"), 2: ("CArr", "SASS")}[gate]
    want = reference(with_scheduler(LCMScheduler), batch=batch, guidance=0, cross=cross, own=own)
    schedule = tgate(anatomy_of(pixart), TGate(gate, 1, 1, 0), steps=4)
    got, stats = replayed(with_scheduler(LCMScheduler), schedule, batch=batch, guidance=0, steps=4)
    assert torch.equal(got, want)
    assert stats.collapsed_passes == 0


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
def test_a_video_model_has_cross_attention_in_its_spatial_blocks_only(batch: int, guidance: float) -> None:
    pipe = latte_pipeline()
    anatomy = survey(pipe.transformer, latte_inputs())
    assert [site for site in anatomy.sites if "cross" in site] == ["0.cross_attn", "2.cross_attn"]
    want = reference(latte_pipeline(), batch=batch, guidance=guidance)
    got, stats = replayed(pipe, tgate(anatomy), batch=batch, guidance=guidance)
    assert torch.equal(got, want)
    assert stats.collapsed_passes == (3 if guidance > 1 else 0)


def latte_inputs() -> Inputs:
    text, _ = text_of(2)
    noise = torch.randn(2, CHANNELS, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return Inputs((), {"hidden_states": noise, "timestep": torch.full((2,), 500), "encoder_hidden_states": text})


def test_generations_of_other_batches_and_without_guidance_follow_on_one_another() -> None:
    pipe, schedule = pipeline_of(pixart), tgate(anatomy_of(pixart))
    turns = [(1, GUIDANCE), (2, 1.0), (1, GUIDANCE), (2, GUIDANCE), (1, 1.0), (4, 1.0), (2, GUIDANCE)]
    with apply(pipe, schedule) as cache:  # two samples unguided are called as one sample guided is
        got = [generate(pipe, steps=STEPS, batch=batch, guidance_scale=guidance) for batch, guidance in turns]
        assert cache.stats.bytes_held == 0
    for made, (batch, guidance) in zip(got, turns, strict=True):
        assert torch.equal(made, reference(pipeline_of(pixart), batch=batch, guidance=guidance))


@pytest.mark.parametrize(("cross", "own", "settings"), [(CROSS, SELF, SETTINGS), ("Arrr", "ASSS", TGate(1, 1, 1, 0))])
def test_samples_of_equal_seeds_are_not_taken_for_the_passes_of_guidance(cross: str, own: str, settings: TGate) -> None:
    noise = torch.randn(1, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(3)).expand(2, -1, -1, -1)
    schedule = tgate(anatomy_of(pixart), settings, steps=len(cross))
    for guidance, collapsed in ((1.0, 0), (GUIDANCE, cross.count("r"))):
        options: dict[str, Any] = {"batch": 2, "guidance": guidance, "latents": noise}
        got, stats = replayed(pipeline_of(pixart), schedule, steps=len(cross), **options)
        assert torch.equal(got, reference(pipeline_of(pixart), cross=cross, own=own, **options))
        assert stats.collapsed_passes == collapsed


def test_halves_that_are_equal_in_everything_are_as_good_as_one() -> None:
    """The prompt may be the negative one, or a batch hold one sample twice: either way both halves are what one is."""
    outputs: list[list[Tensor]] = []
    for batch in (2, 1):
        model = pixart()
        with apply(model, tgate(anatomy_of(pixart))) as cache:
            cache.begin_generation()
            outputs.append([])
            for step in range(STEPS):
                cache.begin_step()
                given = arguments(model, batch=1, seed=step, timestep=900 - 100 * step)
                given = {k: torch.cat([v] * batch) if isinstance(v, Tensor) else v for k, v in given.items()}
                outputs[-1].append(step_of(model, given).sample)
    for two, one in zip(*outputs, strict=True):
        torch.testing.assert_close(two, torch.cat([one, one]))


def test_both_passes_may_go_on_behind_the_gate() -> None:
    want = reference(pipeline_of(pixart), batch=2, collapses=False)
    settings = replace(SETTINGS, after_gate="guided")
    got, stats = replayed(pipeline_of(pixart), tgate(anatomy_of(pixart), settings), batch=2)
    assert torch.equal(got, want)
    assert stats.collapsed_passes == 0


def test_a_collapsed_step_does_half_the_work_and_holds_half_the_memory() -> None:
    anatomy = anatomy_of(pixart)
    schedule = tgate(anatomy)
    uncached = macs(lambda: replayed(pipeline_of(pixart), None))
    done = macs(lambda: replayed(pipeline_of(pixart), schedule))
    assert done / uncached == pytest.approx(schedule.macs_fraction(), rel=1e-6)
    held = []
    pipe = pipeline_of(pixart)
    with apply(pipe, schedule) as cache:
        generate(pipe, steps=STEPS, callback=lambda *_: held.append(cache.stats.bytes_held), callback_steps=1)
    output = 3 * (SIZE // 2) ** 2 * WIDTH * 4  # bytes of a branch in three blocks, for one pass
    # Step 1 keeps self-attention of both passes for step 2; 4 keeps both kinds of attention, of which 5 takes the mean.
    assert held == [0, 2 * output, 0, 0, 4 * output, output, 2 * output, 0]


def test_a_collapsed_step_adds_one_operator_to_the_models_own() -> None:
    model, schedule = pixart(), planned(Plan(4, (), 1))
    text = guided_call(model, 0)["encoder_hidden_states"]  # one tensor for all steps, as pipelines have it
    given = [{**guided_call(model, step), "encoder_hidden_states": text} for step in range(4)]
    with apply(model, schedule) as cache:
        cache.begin_generation()
        for step in range(2):
            cache.begin_step()
            step_of(model, given[step])
        cache.begin_step()
        counts = operators(lambda: step_of(model, given[2]))
    half = {name: first_half(value) for name, value in given[2].items()}
    alone = operators(lambda: step_of(model, half))
    views = ("slice",)
    assert {name: n for name, n in (counts - alone).items() if name not in views} == {"cat": 1}


def guided_call(model: nn.Module, step: int, batch: int = 1) -> dict[str, Any]:
    """Return the arguments of a call of a model for both passes; the latents change at each step."""
    given = arguments(model, batch=2 * batch, seed=step, timestep=900 - 100 * step)
    given["hidden_states"] = given["hidden_states"][:batch].repeat(2, 1, 1, 1)
    given["encoder_hidden_states"] = torch.cat(text_of(batch)[::-1])
    return given


def first_half(value: Any) -> Any:
    return value[: len(value) // 2] if isinstance(value, Tensor) else value


def step_of(model: nn.Module, given: dict[str, Any], **options: Any) -> Any:
    with torch.no_grad():
        return model(**given, **options)


@pytest.mark.parametrize("return_dict", [True, False])
def test_an_output_keeps_its_kind_and_has_both_halves(return_dict: bool) -> None:
    model = pixart()
    with apply(model, tgate(anatomy_of(pixart), TGate(1, 1, 1, 0), 3)) as cache:
        cache.begin_generation()
        for step in range(3):
            cache.begin_step()
            out = step_of(model, guided_call(model, step, batch=3), return_dict=return_dict)
    assert type(out) is (Transformer2DModelOutput if return_dict else tuple)
    first, second = out[0].chunk(2)
    assert first.shape == (3, 2 * CHANNELS, SIZE, SIZE)
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


class NamedPixArt(PixArtTransformer2DModel, CacheMixin):  # type: ignore[misc]
    """A PixArt whose pipeline may name its guidance passes."""


NamedPixArt.__name__ = PixArtTransformer2DModel.__name__  # which schedules are bound to


def named() -> nn.Module:
    model = pixart()
    model.__class__ = NamedPixArt
    return model


Turn = list[str]  # the passes of a step in their order


def in_turns(
    model: nn.Module, schedule: Schedule | None, turns: list[Turn], *, names: bool = False, batch: int = 1
) -> list[dict[str, Tensor]]:
    """Call a bare model pass by pass with guidance; return what each pass of each step gives.

    Its latents move on by what guidance makes of the passes that are called.
    """
    prompts, nothing = text_of(batch)
    text = {"cond": prompts, "uncond": nothing}
    latents = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    made = []
    with apply(model, schedule) if schedule else nullcontext() as cache:
        if cache:
            cache.begin_generation()
        for step, turn in enumerate(turns):
            if cache:
                cache.begin_step()
            outputs = {}
            for name in turn:
                given = arguments(model, batch=batch, timestep=900 - 100 * step)
                given |= {"hidden_states": latents.clone(), "encoder_hidden_states": text[name]}
                with model.cache_context(name) if names else nullcontext():  # type: ignore[operator]
                    outputs[name] = step_of(model, given).sample
            made.append(outputs)
            cond = outputs.get("cond", next(iter(outputs.values())))
            guided = outputs.get("uncond", cond) + GUIDANCE * (cond - outputs.get("uncond", cond))
            latents = latents - guided[:, :CHANNELS] / len(turns)
    if cache:
        made[-1]["collapsed"] = torch.tensor(cache.stats.collapsed_passes)
    return made


def by_hand(turn: Turn, batch: int) -> list[dict[str, Tensor]]:
    """The same by the method's table: both passes up to the gate, then the first of them with the mean of both."""
    model, step, name = pixart(), 0, ""

    def gated(forward: Callable[..., Tensor], letters: str) -> Callable[..., Tensor]:
        stored: dict[str, Tensor] = {}

        def run(*args: Any, **kwargs: Any) -> Tensor:
            mine = name if step < CROSS.index("r") else "mean"
            if letters[step] != "r":
                stored[mine] = forward(*args, **kwargs)
                if letters[step] == "A" and name == turn[1]:
                    stored["mean"] = (stored[turn[0]] + stored[turn[1]]) / 2
            return stored[mine]

        return run

    for path, module in model.named_modules():
        if path.endswith((".attn1", ".attn2")):
            module.forward = gated(module.forward, CROSS if path.endswith("2") else SELF)
    prompts, nothing = text_of(batch)
    text = {"cond": prompts, "uncond": nothing}
    latents = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    made = []
    for step, letter in enumerate(CROSS):
        outputs: dict[str, Tensor] = {}
        for name in turn:
            given = arguments(model, batch=batch, timestep=900 - 100 * step)
            given |= {"hidden_states": latents, "encoder_hidden_states": text[name]}
            outputs[name] = outputs[turn[0]] if letter == "r" and outputs else step_of(model, given).sample
        made.append(outputs)
        guided = outputs["uncond"] + GUIDANCE * (outputs["cond"] - outputs["uncond"])
        latents = latents - guided[:, :CHANNELS] / STEPS
    return made


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("turn", [["cond", "uncond"], ["uncond", "cond"]])
@pytest.mark.parametrize("batch", [1, 2])
def test_passes_that_are_called_one_after_the_other(turn: Turn, names: bool, batch: int) -> None:
    want = by_hand(turn, batch)
    got = in_turns(named(), tgate(anatomy_of(pixart)), [turn] * STEPS, names=names, batch=batch)
    assert got[-1].pop("collapsed") == 3
    for mine, other in zip(got, want, strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_the_second_pass_costs_nothing_and_may_not_be_spoilt_by_the_first() -> None:
    turns = [["cond", "uncond"]] * STEPS
    schedule = tgate(anatomy_of(pixart))
    uncached = macs(lambda: in_turns(pixart(), None, turns))
    assert macs(lambda: in_turns(pixart(), schedule, turns)) / uncached == pytest.approx(schedule.macs_fraction())
    last = in_turns(pixart(), schedule, turns)[-1]
    assert last["cond"].data_ptr() != last["uncond"].data_ptr()


def test_passes_that_change_their_order_after_the_collapse_go_on_from_the_same() -> None:
    one, other = ["cond", "uncond"], ["uncond", "cond"]
    want = in_turns(named(), tgate(anatomy_of(pixart)), [one] * STEPS, names=True)
    got = in_turns(named(), tgate(anatomy_of(pixart)), [one] * 6 + [other] * 2, names=True)
    for mine, theirs in zip(got, want, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("names", [False, True])
def test_a_pass_that_is_left_out_after_the_collapse_and_comes_back_is_still_not_computed(names: bool) -> None:
    schedule = tgate(anatomy_of(pixart))
    turns = [["cond", "uncond"]] * 6 + [["cond"]] + [["cond", "uncond"]]
    got = in_turns(named(), schedule, turns, names=names)
    assert got[-1]["collapsed"] == 2
    assert torch.equal(got[-1]["cond"], got[-1]["uncond"])
    want = in_turns(named(), schedule, [["cond", "uncond"]] * STEPS, names=names)
    assert all(torch.equal(mine["cond"], theirs["cond"]) for mine, theirs in zip(got, want, strict=True))


def test_guidance_that_has_ended_before_the_gate_leaves_nothing_to_collapse() -> None:
    turns = [["cond", "uncond"]] * 3 + [["cond"]] * 5
    got = in_turns(pixart(), tgate(anatomy_of(pixart)), turns)
    want = in_turns(pixart(), tgate(anatomy_of(pixart), replace(SETTINGS, after_gate="guided")), turns)
    assert got[-1]["collapsed"] == 0
    assert all(torch.equal(mine["cond"], theirs["cond"]) for mine, theirs in zip(got, want, strict=True))


def test_guidance_that_begins_behind_the_gate_is_computed_once_and_then_collapses() -> None:
    model, schedule = pixart(), tgate(anatomy_of(pixart))
    with apply(model, schedule) as cache:
        cache.begin_generation()
        outputs = []
        for step in range(STEPS):
            cache.begin_step()
            given = guided_call(model, step)
            if step < 6:
                given = {name: first_half(value) for name, value in given.items()}
            outputs.append(step_of(model, given).sample)
    assert torch.equal(outputs[6], step_of(pixart(), guided_call(model, 6)).sample)
    assert not torch.equal(*outputs[6].chunk(2))
    assert torch.equal(*outputs[7].chunk(2))
    assert cache.stats.collapsed_passes == 1


def test_separate_calls_for_samples_of_their_own_are_left_alone() -> None:
    schedule = tgate(anatomy_of(pixart))
    outputs: dict[bool, list[Tensor]] = {}
    for collapses in (True, False):
        model = pixart()
        plan = schedule.plan if collapses else replace(schedule.plan, collapse_guidance_from=None)  # type: ignore[type-var]
        with apply(model, replace(schedule, plan=plan)) as cache:
            cache.begin_generation()
            outputs[collapses] = []
            for step in range(STEPS):
                cache.begin_step()
                for sample in range(3):
                    given = arguments(model, batch=2, seed=10 * step + sample, timestep=900 - 100 * step)
                    outputs[collapses].append(step_of(model, given).sample)
            assert cache.stats.collapsed_passes == 0
    assert all(map(torch.equal, outputs[True], outputs[False]))


def test_equal_latents_that_drift_apart_at_the_gate_are_refused_where_it_is_too_late() -> None:
    model = pixart()
    with apply(model, tgate(anatomy_of(pixart), TGate(1, 1, 1, 0), 3)) as cache:
        cache.begin_generation()
        for step in range(2):
            cache.begin_step()
            for sample in range(2):
                given = arguments(model, seed=sample * step, timestep=900)
                given["encoder_hidden_states"] = text_of(2)[sample]
                if (step, sample) == (1, 1):
                    with pytest.raises(ScheduleError, match=r"step 0 had the same latents .* at step 1 .* differ"):
                        step_of(model, given)
                else:
                    step_of(model, given)


def test_more_than_two_passes_are_refused() -> None:
    model = pixart()
    with apply(model, tgate(anatomy_of(pixart), TGate(1, 1, 1, 0), 3)) as cache:
        cache.begin_generation()
        cache.begin_step()
        text = [*text_of(2), text_of(2, seed=7)[0]]
        for part in text:
            step_of(model, {**arguments(model), "encoder_hidden_states": part})
        cache.begin_step()
        with pytest.raises(ScheduleError, match="for the same latents more than twice a step"):
            step_of(model, {**arguments(model, seed=1), "encoder_hidden_states": text[0]})


def test_an_extra_pass_beside_a_batch_of_two_is_refused() -> None:
    model = pixart()
    with apply(model, tgate(anatomy_of(pixart), TGate(1, 1, 1, 0), 3)) as cache:
        cache.begin_generation()
        cache.begin_step()
        given = guided_call(model, 0)
        step_of(model, given)
        step_of(model, {name: first_half(value) for name, value in given.items()})
        cache.begin_step()
        with pytest.raises(ScheduleError, match="for the same latents more than twice a step"):
            step_of(model, guided_call(model, 1))


def test_two_passes_of_three_equal_samples_may_be_three_of_two_and_are_refused() -> None:
    model = pixart()
    with apply(model, tgate(anatomy_of(pixart), TGate(1, 1, 1, 0), 3)) as cache:
        cache.begin_generation()
        for step in range(2):
            cache.begin_step()
            given = guided_call(model, step, batch=3)
            given["hidden_states"] = given["hidden_states"][:1].repeat(6, 1, 1, 1)
            if step:
                with pytest.raises(ScheduleError, match="whether a batch of 6 equal latents holds two passes or three"):
                    step_of(model, given)
            else:
                step_of(model, given)


def test_requests_that_take_turns_collapse_each_for_itself() -> None:
    model, schedule = pixart(), tgate(anatomy_of(pixart))

    def run(cache: Any, guided: bool) -> Iterator[Tensor]:
        with cache.request():
            cache.begin_generation()
            for step in range(STEPS):
                cache.begin_step()
                given = guided_call(model, step) if guided else arguments(model, seed=step, timestep=900 - 100 * step)
                yield step_of(model, given).sample

    with apply(model, schedule) as cache:
        alone = {guided: list(run(cache, guided)) for guided in (True, False)}
        both = zip(run(cache, True), run(cache, False), strict=True)
        for (one, other), mine, theirs in zip(both, alone[True], alone[False], strict=True):
            assert torch.equal(one, mine)
            assert torch.equal(other, theirs)


def test_a_generation_that_was_broken_off_behind_the_gate_leaves_nothing_behind() -> None:
    pipe = pipeline_of(pixart)
    with apply(pipe, tgate(anatomy_of(pixart))) as cache:
        with broken(pipe.transformer.transformer_blocks[1].ff, call=6):
            generate(pipe, steps=STEPS, guidance_scale=GUIDANCE)
        assert cache.stats.collapsed_passes == 1
        got = generate(pipe, steps=STEPS, batch=2, guidance_scale=GUIDANCE)
    assert torch.equal(got, reference(pipeline_of(pixart), batch=2))


def test_kept_outputs_that_have_no_mean_are_refused_and_forgotten() -> None:
    model = pixart()
    with apply(model, tgate(anatomy_of(pixart), TGate(2, 1, 1, 0), 3)) as cache:
        cache.begin_generation()
        for step in range(3):
            cache.begin_step()
            given = guided_call(model, step)
            lane = next(iter(cache._requests.current().generation.lanes.values()), None)  # type: ignore[union-attr]
            if step == 2:
                assert lane is not None
                lane.entries["1.cross_attn"] = torch.zeros(3, 1, 1)
                with pytest.raises(ScheduleError, match=r"shape \(3, 1, 1\) was kept of a batch of 2"):
                    step_of(model, given)
                assert lane.entries == {}
            else:
                step_of(model, given)


def test_deltas_of_blocks_are_averaged_too() -> None:
    plan = Plan(4, (Rule("skip", "CC..", "1-2"),), 2)
    model = pixart()
    with apply(model, planned(plan)) as cache:
        cache.begin_generation()
        outputs = []
        for _ in range(4):
            cache.begin_step()
            given = guided_call(model, 0)  # equal inputs: the delta is that of the same call
            outputs.append(step_of(model, given).sample)
    seen: list[Tensor] = []
    model = pixart()
    blocks = [model.get_submodule(f"transformer_blocks.{index}") for index in range(3)]
    into: list[Tensor] = []
    blocks[1].register_forward_pre_hook(lambda _, args, kwargs: into.append(args[0]), with_kwargs=True)
    blocks[2].register_forward_hook(lambda _m, _a, out: seen.append(out))
    step_of(model, guided_call(model, 0))
    mean = (seen[0] - into[0]).view(2, 1, *seen[0].shape[1:]).mean(0)
    blocks[2].register_forward_hook(lambda _m, _a, out: into[-1] + mean)
    half = {name: first_half(value) for name, value in guided_call(model, 0).items()}
    torch.testing.assert_close(outputs[2][:1], step_of(model, half).sample)
    assert torch.equal(*outputs[3].chunk(2))


def test_a_model_conditioned_on_classes_collapses_as_well() -> None:
    pipe = pipeline_of(dit)
    schedule = Schedule("test", {}, anatomy_of(dit), Target(), 4, Plan(4, (), 2))
    with apply(pipe, schedule) as cache:
        generate(pipe, batch=2, guidance_scale=GUIDANCE)
    assert cache.stats.collapsed_passes == 2
    assert cache.stats.macs_fraction == 0.75


def planned(plan: Plan) -> Schedule:
    return Schedule("test", {}, anatomy_of(pixart), Target(), plan.steps, plan)
