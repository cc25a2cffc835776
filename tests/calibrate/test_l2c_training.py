"""Training a router: what is mixed, what is learned of it, and that nothing else is touched."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dicache import apply
from dicache.anatomy import Anatomy, StepClock
from dicache.anatomy.nested import tensors_of
from dicache.anatomy.overrides import Overrides
from dicache.calibrate import CalibrationError
from dicache.calibrate.l2c import LearningToCache, Router, load_checkpoint, read_router
from dicache.calibrate.l2c_training import Follower, Training, draw, train
from dicache.models.loading import load
from dicache.models.sampling import UNCONDITIONAL, Sampling, default_conditions, sample
from dicache.models.schedulers import with_scheduler
from dicache.profiler.describing import survey_pipeline, target_of
from dicache.runtime.apply import denoiser
from dicache.schedules import Plan, Rule, Schedule, Target
from tests.calibrate.test_l2c import published
from tests.counting import attributes
from tests.models.folders import SIZE, folder
from tests.tiny import Build, anatomy_of, every_transformer, generate, pipeline_of

STEPS = 4


def calls_of(pipe: Any, run: Callable[[], Any]) -> tuple[list[tuple[Any, Any, Tensor]], list[Tensor]]:
    """Return what the model is called with and gives in a sampling, and the latents after each step."""
    model = denoiser(pipe)
    calls: list[tuple[Any, Any, Tensor]] = []
    latents: list[Tensor] = []
    forward = model.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        calls.append((args, kwargs, next(tensors_of(out))))
        return out

    clock = StepClock(pipe.scheduler, lambda scheduler: None, lambda: latents.append(clock.latents.clone()))
    with Overrides() as overrides:
        overrides.set(model, watch)
        run()
    clock.detach()
    return calls, latents


def followed(pipe: Any, anatomy: Anatomy, betas: Tensor) -> tuple[list[float], list[Tensor]]:
    """Return the error of each pair of a sampling, and its gradient with respect to the betas."""
    found: list[tuple[int, float, Tensor]] = []
    with Follower(
        pipe, denoiser(pipe), anatomy, lambda pair: betas, lambda pair, *told: found.append((pair, *told))
    ) as follower:
        follower.run(lambda: generate(pipe))
    assert [pair for pair, _, _ in found] == [0, 1]
    return [error for _, error, _ in found], [gradient for _, _, gradient in found]


@every_transformer
def test_with_beta_1_the_mixed_output_is_the_full_one(build: Build) -> None:
    pipe = pipeline_of(build)
    anatomy = anatomy_of(build)
    errors, _ = followed(pipe, anatomy, torch.ones(len(anatomy.sites)))
    assert errors == [0.0, 0.0]


@every_transformer
def test_with_beta_0_the_mixed_output_is_what_the_runtime_gives_when_all_is_reused(build: Build) -> None:
    pipe = pipeline_of(build)
    model = pipe.transformer
    anatomy = anatomy_of(build)
    errors, _ = followed(pipe, anatomy, torch.zeros(len(anatomy.sites)))
    calls, _ = calls_of(pipe, lambda: generate(pipe))
    plan = Plan(STEPS, (Rule("reuse", "C." * (STEPS // 2)),))
    want = []
    with apply(model, Schedule("test", {}, anatomy, Target(), STEPS, plan)) as cache, torch.no_grad():
        cache.begin_generation()
        for args, kwargs, full in calls:
            cache.begin_step()
            reused = next(tensors_of(model(*args, **kwargs)))
            want.append((reused - full).square().sum().item() / full.numel())
    assert want[0::2] == [0.0, 0.0]
    assert min(want[1::2]) > 0
    assert errors == want[1::2]


@every_transformer
def test_some_sites_held_and_others_computed_are_what_the_runtime_gives(build: Build) -> None:
    pipe = pipeline_of(build)
    model = pipe.transformer
    anatomy = anatomy_of(build)
    betas = torch.arange(len(anatomy.sites)) % 2.0  # every second site is computed
    errors, _ = followed(pipe, anatomy, betas)
    calls, _ = calls_of(pipe, lambda: generate(pipe))
    router = Router(np.tile(betas.numpy() * 10 - 5, (2, 1)), anatomy.sites, Target(), {})
    with apply(model, LearningToCache(0.5).schedule(router, anatomy, Target(), STEPS, "")) as cache, torch.no_grad():
        cache.begin_generation()
        for step, (args, kwargs, full) in enumerate(calls):
            cache.begin_step()
            reused = next(tensors_of(model(*args, **kwargs)))
            if step % 2:
                assert errors[step // 2] == pytest.approx((reused - full).square().mean().item(), rel=1e-5)


@every_transformer
def test_the_gradient_is_that_of_the_error(build: Build) -> None:
    pipe = pipeline_of(build)
    anatomy = anatomy_of(build)
    betas = torch.linspace(0.2, 0.8, len(anatomy.sites))
    _, gradients = followed(pipe, anatomy, betas)
    nudge = torch.zeros_like(betas)
    scale = max(gradient.abs().max().item() for gradient in gradients)
    for place in range(0, len(betas), 2):
        nudge.zero_()[place] = 0.02
        above, below = followed(pipe, anatomy, betas + nudge)[0], followed(pipe, anatomy, betas - nudge)[0]
        for one, two, gradient in zip(above, below, gradients, strict=True):
            assert (one - two) / 0.04 == pytest.approx(gradient[place].item(), rel=0.02, abs=0.003 * scale)


@every_transformer
def test_the_sampling_goes_on_as_if_nobody_followed_it(build: Build) -> None:
    pipe = pipeline_of(build)
    anatomy = anatomy_of(build)
    _, plain = calls_of(pipe, lambda: generate(pipe))
    betas = torch.full((len(anatomy.sites),), 0.3)
    _, seen = calls_of(pipe, lambda: followed(pipe, anatomy, betas))
    assert len(plain) == len(seen) == STEPS
    assert all(torch.equal(one, two) for one, two in zip(plain, seen, strict=True))


# Training, on pipelines that take prompts and classes


@cache
def ready(kind: str, guidance: float | None = None) -> dict[str, Any]:
    """Return what `train` takes."""
    pipe = load(str(folder(kind)))
    size = {} if kind == "dit" else {"height": SIZE, "width": SIZE}
    sampling = Sampling(STEPS, guidance, **size).resolved(pipe)
    anatomy, _, count = survey_pipeline(pipe, sampling)
    return {
        "pipeline": pipe,
        "anatomy": anatomy,
        "target": target_of(pipe, anatomy, sampling),
        "steps": count,
        "conditions": default_conditions(pipe, 4),
        "sampling": sampling,
        "progress": False,
    }


FEW = Training(penalty=1e-3, iterations=4, learning_rate=0.1, batch=2)
KINDS = pytest.mark.parametrize("kind", ["dit", "pixart", "pixart-lcm", "sd3", "flux"])


@KINDS
def test_only_the_routers_learn(kind: str, tmp_path: Path) -> None:
    given = ready(kind)
    model = given["pipeline"].transformer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hung, scheduler = attributes(model), dict(vars(given["pipeline"].scheduler))
    router = train(**given, training=FEW, file=tmp_path / "r.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert attributes(model) == hung
    assert {"step", "set_timesteps"}.isdisjoint(set(vars(given["pipeline"].scheduler)) - set(scheduler))
    assert router.logits.shape == (STEPS // 2, len(given["anatomy"].sites))
    assert router.sites == given["anatomy"].sites
    assert router.target == given["target"]
    # AdamW's first step is the learning rate, up or down, and the next ones are hardly more.
    assert (router.logits != 0).all()
    assert 0.1 < np.abs(router.logits).max() < 0.41
    schedule = LearningToCache().schedule(router, given["anatomy"], given["target"], STEPS, kind)
    assert schedule.measured["iterations"] == 4
    assert schedule.measured["last_tenth"]["error"] > 0
    with apply(given["pipeline"], schedule):
        images = sample(given["pipeline"], given["conditions"][:1], [0], given["sampling"])
    assert np.isfinite(images).all()


def test_a_large_penalty_holds_everything_and_none_keeps_what_matters(tmp_path: Path) -> None:
    given = ready("dit")
    shut = train(**given, training=Training(1e6, 16, 0.5, 1), file=tmp_path / "shut.pt")
    assert (shut.logits == -5).all()  # clamped
    open_ = train(**given, training=Training(0.0, 16, 0.5, 1), file=tmp_path / "open.pt")
    assert open_.logits.mean() > 1


def test_the_first_update_is_computed_by_hand(tmp_path: Path) -> None:
    """Of a router at beta 1/2: AdamW's first step is the learning rate against the sign of gradient + penalty."""
    given = ready("dit")
    gradients: list[Tensor] = []
    half = torch.full((len(given["anatomy"].sites),), 0.5)
    training = Training(penalty=1e-3, iterations=1, learning_rate=0.25, batch=2)
    asked, seeds = draw(given["conditions"], training, 0)
    plain = Sampling(STEPS, 1.0)
    with Follower(
        given["pipeline"],
        given["pipeline"].transformer,
        given["anatomy"],
        lambda pair: half,
        lambda pair, error, gradient: gradients.append(gradient),
    ) as follower:
        follower.run(lambda: sample(given["pipeline"], asked, seeds, plain))
    router = train(**given, training=training, file=tmp_path / "r.pt")
    want = -0.25 * torch.sign(torch.stack(gradients) + 1e-3)
    assert np.allclose(router.logits, want.numpy(), rtol=1e-3)


@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_there_is_no_guidance_and_some_samples_have_no_condition(kind: str, tmp_path: Path) -> None:
    given = ready(kind, guidance=4.0)
    batches: set[int] = set()
    given["pipeline"].transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batches.add(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    train(**given, training=FEW, file=tmp_path / "r.pt")
    assert batches == {2}  # as many as samples, and not twice as many
    drawn = [c for i in range(200) for c in draw(given["conditions"], Training(batch=10), i)[0]]
    assert drawn.count(UNCONDITIONAL) / len(drawn) == pytest.approx(0.1, abs=0.02)
    assert {*drawn} == {UNCONDITIONAL, *given["conditions"]}


@pytest.mark.parametrize("kind", ["dit", "sd3"])
def test_a_training_that_was_broken_off_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    given = ready(kind)
    train(**given, training=FEW, file=tmp_path / "whole.pt")

    steps = 0

    def interrupt(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 2 * STEPS + 3:  # in the third iteration, after its first update
            raise KeyboardInterrupt

    model = given["pipeline"].transformer
    hook = model.register_forward_pre_hook(interrupt)
    forward = dict(vars(model))
    with pytest.raises(CalibrationError, match=r"interrupted after 2 of 4 iterations, which are kept in .*parts\.pt"):
        train(**given, training=FEW, file=tmp_path / "parts.pt")
    hook.remove()
    assert forward.keys() == vars(model).keys()
    kept = load_checkpoint(tmp_path / "parts.pt")
    assert len(kept["args"]["course"]) == 2
    train(**given, training=FEW, file=tmp_path / "parts.pt")
    one, two = (load_checkpoint(tmp_path / name) for name in ("whole.pt", "parts.pt"))
    assert all(torch.equal(one["routers"][key], two["routers"][key]) for key in one["routers"])
    assert torch.equal(one["args"]["course"], two["args"]["course"])
    states = [content["opt"]["state"] for content in (one, two)]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])


def test_a_training_may_be_made_longer_and_a_finished_one_is_only_read(tmp_path: Path) -> None:
    given = ready("dit")
    longer = Training(**{**vars(FEW), "iterations": 6})
    whole = train(**given, training=longer, file=tmp_path / "whole.pt")
    train(**given, training=FEW, file=tmp_path / "r.pt")
    assert np.array_equal(train(**given, training=longer, file=tmp_path / "r.pt").logits, whole.logits)
    at = (tmp_path / "r.pt").stat().st_mtime_ns
    train(**given, training=longer, file=tmp_path / "r.pt")
    assert (tmp_path / "r.pt").stat().st_mtime_ns == at


def test_a_file_of_another_training_is_not_written_over(tmp_path: Path) -> None:
    given, file = ready("dit"), tmp_path / "r.pt"
    train(**given, training=FEW, file=file)
    for training, message in [
        (Training(**{**vars(FEW), "penalty": 0.5}), r"with other settings: penalty 0\.001, now 0\.5; choose another"),
        (Training(**{**vars(FEW), "seed": 3, "batch": 1}), "batch 2, now 1; seed 0, now 3"),
        (Training(**{**vars(FEW), "iterations": 3}), "holds 4 iterations, more than 3; ask for 4"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            train(**given, training=training, file=file)
    with pytest.raises(CalibrationError, match="other conditions"):
        train(**{**given, "conditions": ["1"]}, training=FEW, file=file)
    with pytest.raises(CalibrationError, match="was not trained here; choose another"):
        train(**given, training=FEW, file=published(tmp_path / "theirs.pt"))


def test_the_file_is_in_the_published_format(tmp_path: Path) -> None:
    given = ready("dit")
    trained = train(**given, training=FEW, file=tmp_path / "r.pt")
    content = torch.load(tmp_path / "r.pt", weights_only=True)
    assert content.keys() == {"routers", "opt", "args"}
    assert list(content["routers"]) == [f"{index}.prob" for index in range(STEPS)]
    for step in range(STEPS):
        row = content["routers"][f"{STEPS - 1 - step}.prob"].numpy()
        assert np.array_equal(row, trained.logits[step // 2] if step % 2 else np.full_like(row, 5))
    assert np.array_equal(read_router(tmp_path / "r.pt").logits, trained.logits)


def test_another_sampler_is_trained_with_its_own_steps(tmp_path: Path) -> None:
    given = dict(ready.__wrapped__("dit"))
    ddim = train(**given, training=FEW, file=tmp_path / "ddim.pt")
    pipe, sampling = with_scheduler(given["pipeline"], "dpm"), given["sampling"]
    anatomy, _, steps = survey_pipeline(pipe, sampling)
    target = target_of(pipe, anatomy, sampling)
    given = {**given, "target": target, "steps": steps}
    dpm = train(**given, training=FEW, file=tmp_path / "dpm.pt")
    assert dpm.target.scheduler == "DPMSolverMultistepScheduler"
    assert not np.array_equal(ddim.logits, dpm.logits)
    with pytest.raises(CalibrationError, match="trained for scheduler DDIMScheduler, found DPMSolverMultistep"):
        LearningToCache().schedule(ddim, anatomy, target, steps, "dit")


def test_a_value_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    given = ready.__wrapped__("dit")
    with torch.no_grad():
        given["pipeline"].transformer.transformer_blocks[1].ff.net[2].weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="step 1 met a value that is not finite"):
        train(**given, training=FEW, file=tmp_path / "r.pt")
    assert not (tmp_path / "r.pt").exists()


@pytest.mark.parametrize("steps", [1, 5])
def test_steps_go_in_pairs(steps: int, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=f"must be an even number of them, 2 or more, found {steps}"):
        train(**{**ready("dit"), "steps": steps}, training=FEW, file=tmp_path / "r.pt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": -1.0}, "the penalty must be 0 or more, found -1"),
        ({"penalty": float("nan")}, "the penalty must be 0 or more, found nan"),
        ({"learning_rate": 0.0}, "the learning rate must be more than 0, found 0"),
        ({"iterations": 0}, "iterations must be 1 or more, found 0"),
        ({"batch": 0}, "batch must be 1 or more, found 0"),
        ({"seed": -1}, "the seed must be 0 or more, found -1"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Training(**settings)
