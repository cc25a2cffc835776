"""Samplers, and how many rounds of the model each makes of the inference steps that all tests take."""

from typing import Any

import diffusers

from tests.pipelines.table import STEPS

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddim of CogVideoX": ("CogVideoXDDIMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm of CogVideoX": ("CogVideoXDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "flow-dpm": ("DPMSolverMultistepScheduler", FLOW),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow-unipc": ("UniPCMultistepScheduler", FLOW),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm with Runge-Kutta steps": ("PNDMScheduler", {"skip_prk_steps": False}),
}
TWO_A_STEP = ("flow-heun", "heun", "kdpm2", "kdpm2-ancestral")
NOISE = ("ddim", "deis", "dpm", "euler", "heun", "kdpm2", "kdpm2-ancestral", "lcm", "pndm")


def rounds(sampler: str) -> int:
    """Return how often a pipeline ends a step with a sampler."""
    if sampler in TWO_A_STEP:
        return 2 * STEPS - 1
    return STEPS + {"pndm": 1, "pndm with Runge-Kutta steps": 9}.get(sampler, 0)


def order(sampler: str) -> int:
    """Return how many rounds a pipeline leaves out for each inference step that it leaves out."""
    return 2 if sampler in TWO_A_STEP else 1


def put(pipe: Any, sampler: str) -> Any:
    """Give a pipeline a sampler; return the pipeline."""
    kind, settings = KINDS[sampler]
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **settings)
    return pipe
