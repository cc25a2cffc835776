"""Put another scheduler into a pipeline, where its model can be sampled with it."""

import inspect
from typing import Any

from dicache.models.names import ModelError

SHORT = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "dpm-single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
    "flow-heun": "FlowMatchHeunDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}

# Of those that a noise-predicting model can be sampled with: one for each algorithm, no variants for batched or
# inverted sampling, nor those that expect another scaling of the model's input.
NOISE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
# Of those that a flow-matching model can be sampled with.
FLOW = (
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "UniPCMultistepScheduler",
)


def with_scheduler(pipeline: Any, name: str) -> Any:
    """Replace a pipeline's scheduler by another, built from the configuration of its own; return the pipeline.

    Args:
        pipeline: A diffusers pipeline.
        name: A class of diffusers, with or without its ending, in any case; or a short name, such as `dpm`.

    Raises:
        ModelError: If there is no such scheduler, or this pipeline's model cannot be sampled with it.
    """
    import diffusers

    own = pipeline.scheduler
    known = compatible(pipeline)
    spelled = {"".join(c for c in kind.lower() if c.isalnum()): kind for kind in known}
    wanted = SHORT.get(name.lower(), name)
    found = "".join(c for c in wanted.lower() if c.isalnum())
    kind = spelled.get(found) or spelled.get(f"{found}scheduler")
    if kind is None and is_flow(own) and name.lower() in ("euler", "heun"):
        kind = spelled.get(f"flowmatch{name.lower()}discretescheduler")  # what the word means for such a model
    if kind is None:
        state = "cannot be used" if _exists(found) else "is unknown"
        raise ModelError(
            f"scheduler {name!r} {state} with {type(pipeline).__name__} of {type(own).__name__}; needed one of "
            f"{', '.join(known)}"
        )
    changes: dict[str, Any] = {}
    if is_flow(own) and not kind.startswith("FlowMatch"):
        shift = own.config.get("shift", own.config.get("flow_shift", 1.0))
        changes = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    elif is_flow(own) and "flow_shift" in own.config:
        changes = {"shift": own.config["flow_shift"]}
    new = getattr(diffusers, kind)
    if "clip_sample" in inspect.signature(new).parameters:
        # Some clip unless they are told not to, which was meant for pixels; latents go beyond -1 and 1.
        changes["clip_sample"] = own.config.get("clip_sample", False)
    pipeline.scheduler = new.from_config(own.config, **changes)
    return pipeline


def compatible(pipeline: Any) -> list[str]:
    """Return the classes of schedulers that a pipeline's model can be sampled with, its own among them."""
    import diffusers

    own, loop = pipeline.scheduler, _source(type(pipeline))
    kinds = {kind for kind in (FLOW if is_flow(own) else NOISE) if hasattr(diffusers, kind)}
    if is_flow(own):
        dynamic = own.config.get("use_dynamic_shifting")
        if dynamic or "np.linspace" in loop:
            # It neither shifts with the size of the image nor takes sigmas from the pipeline, as Flux gives them.
            kinds.discard("FlowMatchHeunDiscreteScheduler")
        if not dynamic and "mu=mu" in loop:
            kinds.discard("DPMSolverMultistepScheduler")  # refuses a shift that it is not configured to take
    elif "init_noise_sigma" not in loop:
        # The pipeline does not scale its first noise, which those that count in sigmas need.
        kinds = {kind for kind in kinds if _starts_at_unit_noise(own, kind)}
    return sorted({type(own).__name__, *kinds})


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler samples a flow-matching model."""
    config = scheduler.config
    flows = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return type(scheduler).__name__.startswith("FlowMatch") or bool(flows)


def _starts_at_unit_noise(own: Any, kind: str) -> bool:
    import diffusers

    scheduler = getattr(diffusers, kind).from_config(own.config)
    return abs(float(scheduler.init_noise_sigma) - 1) < 1e-3


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _exists(name: str) -> bool:
    import diffusers

    return any(kind.lower() in (name, f"{name}scheduler") for kind in dir(diffusers))
