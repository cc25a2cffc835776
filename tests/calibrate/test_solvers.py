"""What a scheduler makes of an error in the model's output."""

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from dicache.anatomy.clock import noise_levels, timesteps
from dicache.calibrate import CalibrationError
from dicache.calibrate.solvers import measured, solver_of
from dicache.models.schedulers import is_flow
from dicache.profiler import Profile
from dicache.schedules import Target
from tests.calibrate.profiled import profile
from tests.toys import written

STEPS = 6


def ready(scheduler: Any, steps: int = STEPS, **shifting: Any) -> Any:
    scheduler.set_timesteps(steps, **shifting)
    return scheduler


def found(scheduler: Any, variance: float = 1.0) -> Any:
    return measured(scheduler, np.array(noise_levels(scheduler)), variance)


def profiled(sampler: Any, steps: int = STEPS, **changes: Any) -> Profile:
    target = Target(
        scheduler=type(sampler).__name__,
        num_inference_steps=steps,
        timesteps=timesteps(sampler),
        noise_levels=noise_levels(sampler),
    )
    made = profile(
        written(1), {"body/gram": np.ones((1, steps, steps))}, steps=steps, target=replace(target, **changes)
    )
    settings = {**made.provenance.settings, "scheduler_config": dict(sampler.config)}
    return replace(made, provenance=replace(made.provenance, settings=settings))


def test_ddim_moves_the_latents_by_the_change_of_the_noise() -> None:
    scheduler = ready(DDIMScheduler(clip_sample=False))
    squared = np.append(scheduler.alphas_cumprod[scheduler.timesteps].double().numpy(), 1.0)
    alpha, sigma = np.sqrt(squared), np.sqrt(1 - squared)
    own = sigma[1:] - sigma[:-1] * alpha[1:] / alpha[:-1]
    solver = found(scheduler)
    np.testing.assert_allclose(solver.outputs, np.diag(own), atol=1e-6)
    np.testing.assert_allclose(solver.latents, np.diag(alpha[1:] / alpha[:-1]), rtol=1e-6)
    np.testing.assert_allclose(solver.carried(0)[-1], own * alpha[-1] / alpha[1:], rtol=1e-5)


def test_the_second_order_of_dpm_solver_goes_on_from_two_predictions_of_the_data() -> None:
    scheduler = ready(DPMSolverMultistepScheduler(lower_order_final=False))
    sigmas = scheduler.sigmas.double().numpy()
    alpha = 1 / np.sqrt(1 + sigmas**2)
    noise = sigmas * alpha
    # By hand: a step from s to t with h = log(sigma_s / sigma_t), data D = (x - noise_s e) / alpha_s, r = h_before / h.
    t = 3
    h, before = np.log(sigmas[t] / sigmas[t + 1]), np.log(sigmas[t - 1] / sigmas[t])
    factor = alpha[t + 1] * (1 - np.exp(-h))
    newest, older = 1 + 0.5 * h / before, -0.5 * h / before
    solver = found(scheduler)
    np.testing.assert_allclose(solver.outputs[t, t], -factor * newest * noise[t] / alpha[t], rtol=1e-5)
    np.testing.assert_allclose(solver.outputs[t, t - 1], -factor * older * noise[t - 1] / alpha[t - 1], rtol=1e-5)
    np.testing.assert_allclose(solver.latents[t, t], noise[t + 1] / noise[t] + factor * newest / alpha[t], rtol=1e-5)
    np.testing.assert_allclose(solver.outputs[t, : t - 1], 0, atol=1e-9)


def test_an_euler_step_of_a_flow_is_a_difference_of_sigmas() -> None:
    scheduler = ready(FlowMatchEulerDiscreteScheduler(shift=3.0))
    solver = found(scheduler)
    np.testing.assert_allclose(np.diagonal(solver.outputs), np.diff(scheduler.sigmas.numpy()), atol=1e-6)
    np.testing.assert_allclose(solver.carried(0), np.tril(solver.outputs.sum(axis=0) * np.ones((STEPS, 1))), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("DDIMScheduler", {"clip_sample": False}),
        ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
        ("DDIMScheduler", {"clip_sample": False, "prediction_type": "sample"}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("FlowMatchHeunDiscreteScheduler", {}),
    ],
)
@pytest.mark.parametrize("variance", [1.0, 0.1])
@pytest.mark.filterwarnings("ignore")
def test_errors_are_carried_as_a_model_of_gaussian_data_carries_them(
    kind: str, settings: dict[str, Any], variance: float
) -> None:
    """The exact model of Gaussian data is run, and one of its outputs is changed by one."""
    scheduler = ready(getattr(diffusers, kind)(**settings))
    solver, count = found(scheduler, variance), len(scheduler.timesteps)
    ratio = np.exp(noise_levels(scheduler))

    def run(changed: int | None) -> np.ndarray:
        sampler = ready(getattr(diffusers, kind)(**settings))
        x = torch.full((1, 1, 1, 1), float(getattr(sampler, "init_noise_sigma", 1)), dtype=torch.float64)
        kept = []
        for step, timestep in enumerate(sampler.timesteps):
            scaled = sampler.scale_model_input(x, timestep) if hasattr(sampler, "scale_model_input") else x
            n = ratio[step]
            if is_flow(sampler):
                signal, noise = 1 / (1 + n), n / (1 + n)
            else:
                signal, noise = 1 / np.sqrt(1 + n**2), n / np.sqrt(1 + n**2)
            data, e = (part * scaled / (variance * signal**2 + noise**2) for part in (variance * signal, noise))
            predicted = "flow" if is_flow(sampler) else sampler.config.prediction_type
            output = {"epsilon": e, "sample": data, "v_prediction": signal * e - noise * data, "flow": e - data}[
                predicted
            ]
            given = {"generator": torch.Generator().manual_seed(step)} if "Ancestral" in kind else {}
            x = sampler.step(output + (step == changed), timestep, x, **given, return_dict=False)[0].double()
            kept.append(float(x))
        return np.array(kept)

    plain, carried = run(None), solver.carried()
    for step in (0, count // 2, count - 1):
        np.testing.assert_allclose(run(step) - plain, carried[:, step], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("settings", [{"clip_sample": True}, {"clip_sample": False, "thresholding": True}])
def test_what_is_not_linear_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="DDIMScheduler is not linear in the model's output at step"):
        found(ready(DDIMScheduler(**settings)))


def test_the_solver_of_a_profile_is_set_to_its_timesteps() -> None:
    scheduler = ready(DDIMScheduler(clip_sample=False))
    np.testing.assert_array_equal(solver_of(profiled(scheduler)).outputs, found(scheduler).outputs)
    shifting = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ready(shifting, sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=0.7)  # as the pipeline of Flux does
    np.testing.assert_allclose(
        np.diagonal(solver_of(profiled(shifting)).outputs), np.diff(shifting.sigmas.numpy()), atol=1e-5
    )


def test_a_profile_that_does_not_tell_its_solver_is_refused() -> None:
    scheduler = ready(DDIMScheduler(clip_sample=False))
    with pytest.raises(CalibrationError, match="how its scheduler NoneScheduler was configured"):
        solver_of(profiled(scheduler, scheduler="NoneScheduler"))
    with pytest.raises(CalibrationError, match=r"but the profile's run had .*sets them itself"):
        solver_of(profiled(scheduler, timesteps=tuple(range(STEPS, 0, -1))))
