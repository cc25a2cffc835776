"""What a solver makes of an error in the model's output: its own coefficients, measured on the scheduler itself."""

import inspect
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dicache.calibrate.methods import CalibrationError
from dicache.models.schedulers import is_flow
from dicache.profiler import Profile

LINEAR = 1e-3  # of the size of what it gives, up to which a scheduler counts as linear; some compute in float32


@dataclass(frozen=True)
class Solver:
    """A scheduler that is linear in what it is given: the latents after step t are
    `sum over s <= t of outputs[t, s] * output s + latents[t, s] * latents before step s`, and noise.

    Attributes:
        outputs: (steps, steps), lower triangular; off the diagonal where a multistep solver keeps outputs.
        latents: The same of the latents that each step was given.
        response: d output / d latents at each step, (steps,), of an exact model of Gaussian data.
        sharpest: The same of data that do not vary at all, the most that an exact model responds.
    """

    outputs: np.ndarray
    latents: np.ndarray
    response: np.ndarray
    sharpest: np.ndarray

    def carried(self, reaction: float = 1.0) -> np.ndarray:
        """Return d latents behind step t / d error in the output of step s, (steps, steps), lower triangular.

        An error in the latents does not stay as it is: the model reacts to it in each later step, and takes most of an
        early one back. The response of a model of Gaussian data stands for its own. With no reaction the coefficients
        are those of the open loop, which overrate early steps by up to the noise-to-signal ratio.

        Args:
            reaction: Share of that response; 0 for the open loop.
        """
        into = self.latents + reaction * self.outputs * self.response
        total = np.zeros_like(self.outputs)
        for t in range(len(total)):
            # The latents before step s are those behind step s - 1.
            total[t] = self.outputs[t] + into[t, 1 : t + 1] @ total[:t]
        return total


def solver_of(profile: Profile, variance: float = 1.0) -> Solver:
    """Return the solver that a profile was made with.

    Args:
        profile: Of it the settings of the scheduler and the target are read.
        variance: Of the Gaussian data whose exact model stands for the model.

    Raises:
        CalibrationError: If the profile does not say how the scheduler was configured, the scheduler cannot be set to
            the profile's timesteps, or it is not linear.
    """
    import diffusers

    target, config = profile.provenance.target, profile.provenance.settings.get("scheduler_config")
    kind = getattr(diffusers, target.scheduler or "", None)
    if kind is None or config is None or target.timesteps is None or target.noise_levels is None:
        raise CalibrationError(
            f"the profile does not say how its scheduler {target.scheduler} was configured, or it is none of this "
            "diffusers; needed its configuration, timesteps and noise levels. Profile again, or weigh all steps alike"
        )
    scheduler = kind.from_config(dict(config))
    levels = np.asarray(target.noise_levels)
    _set_timesteps(scheduler, target.num_inference_steps or len(levels), np.asarray(target.timesteps), levels)
    return measured(scheduler, levels, variance)


def measured(scheduler: Any, levels: np.ndarray, variance: float = 1.0) -> Solver:
    """Return the coefficients of a scheduler, found by giving it unit outputs and unit latents, one at a time.

    No network is run: all probes are channels of one small tensor, as a scheduler treats all elements alike.

    Args:
        scheduler: A diffusers scheduler with its timesteps set; it is left as it is.
        levels: Logarithm of the noise-to-signal ratio at each step, (steps,).
        variance: Of the Gaussian data whose exact model stands for the model.

    Raises:
        CalibrationError: If what it gives is not linear in what it is given, as with thresholding or clipping.
    """
    steps = len(scheduler.timesteps)
    one, zero = torch.eye(steps, dtype=torch.float64), torch.zeros(steps, steps, dtype=torch.float64)
    mixed = torch.from_numpy(np.random.default_rng(0).standard_normal((2, steps, steps)))
    given = torch.stack((torch.cat([one, zero, mixed[0]], dim=1), torch.cat([zero, one, mixed[1]], dim=1)))
    # Less what zeros give: the noise that a stochastic solver adds, of the same seeds.
    found = _run(scheduler, *given) - _run(scheduler, *torch.zeros_like(given))  # (steps, probes)
    outputs, latents, check = (found[:, i * steps : (i + 1) * steps] for i in range(3))
    want = outputs @ mixed[0].numpy() + latents @ mixed[1].numpy()
    error = np.abs(check - want).max(axis=1) / np.maximum(np.abs(want).max(axis=1), 1e-12)
    if not np.isfinite(found).all() or (error > LINEAR).any():
        step = int(np.argmax(~(error <= LINEAR)))
        raise CalibrationError(
            f"{type(scheduler).__name__} is not linear in the model's output at step {step} (thresholding and clipping "
            "are not), so that errors cannot be added up. Switch that off and profile again, or weigh all steps alike"
        )
    return Solver(outputs, latents, *(_response(scheduler, levels, each) for each in (variance, 0.0)))


def _run(scheduler: Any, outputs: Tensor, latents: Tensor) -> np.ndarray:
    """Return what a scheduler makes of given outputs and latents, each (steps, probes), at each step."""
    scheduler, rows = deepcopy(scheduler), []
    seeded = "generator" in inspect.signature(scheduler.step).parameters
    for step, timestep in enumerate(scheduler.timesteps):
        noise = {"generator": torch.Generator().manual_seed(step)} if seeded else {}
        output, sample = (given[step].view(-1, 1, 1, 1) for given in (outputs, latents))
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, timestep)  # some want it to be called first
        rows.append(scheduler.step(output, timestep, sample, **noise, return_dict=False)[0])
    return torch.stack(rows).double().flatten(1).numpy()


def _set_timesteps(scheduler: Any, count: int, timesteps: np.ndarray, levels: np.ndarray) -> None:
    """Set a scheduler to a profile's timesteps."""
    flow = is_flow(scheduler) and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if flow and scheduler.config.get("use_dynamic_shifting"):
        # The pipeline has shifted them by the size of the image; they are taken as they were.
        scheduler.register_to_config(use_dynamic_shifting=False)
        scheduler.set_shift(1.0)
        scheduler.set_timesteps(sigmas=(1 / (1 + np.exp(-levels))).tolist())
    else:
        scheduler.set_timesteps(count)
    found = scheduler.timesteps.double().numpy()
    if found.shape != timesteps.shape or not np.allclose(found, timesteps, rtol=1e-3, atol=1e-3):
        raise CalibrationError(
            f"{type(scheduler).__name__} with {count} steps has the timesteps {_ends(found)}, but the profile's run "
            f"had {_ends(timesteps)}: its pipeline sets them itself. Weigh all steps alike"
        )


def _ends(timesteps: np.ndarray) -> str:
    return f"{timesteps[0]:g} to {timesteps[-1]:g} ({len(timesteps)})"


def _response(scheduler: Any, levels: np.ndarray, variance: float) -> np.ndarray:
    """Return how the expected output depends on the latents, for Gaussian data x of a variance v.

    The latents are alpha x + sigma e with noise e, so that they tell v alpha / (v alpha^2 + sigma^2) of x and
    sigma / (v alpha^2 + sigma^2) of e.
    """
    ratio = np.exp(levels)
    flow = is_flow(scheduler)
    exploding = not flow and float(scheduler.init_noise_sigma) > 1 + 1e-3
    signal = 1 / (1 + ratio) if flow else np.ones(len(ratio)) if exploding else 1 / np.sqrt(1 + ratio**2)
    noise = ratio * signal
    predicted = "flow" if flow else scheduler.config.get("prediction_type", "epsilon")
    parts = {  # of the noise and of the data in what is predicted
        "epsilon": (1.0, 0.0),
        "sample": (0.0, 1.0),
        "v_prediction": (1 / np.sqrt(1 + ratio**2), -ratio / np.sqrt(1 + ratio**2)),
        "flow": (1.0, -1.0),
    }
    if predicted not in parts:
        raise CalibrationError(f"what a model predicts must be {', '.join(parts)}, found {predicted}; weigh all alike")
    of_noise, of_data = parts[predicted]
    told = of_noise * noise + of_data * variance * signal
    return np.asarray(told / (variance * signal**2 + noise**2))
