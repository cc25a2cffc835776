"""What a profile says of the pipeline and the runs that it is of, and how the pipeline is had again from that."""

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dicache
from dicache.anatomy import Anatomy, survey
from dicache.anatomy.clock import noise_levels, timesteps
from dicache.anatomy.fingerprint import config_of, digest, dtype_of, fingerprint
from dicache.anatomy.inputs import capture_inputs
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions, sample
from dicache.profiler.profiles import ProfileError, Provenance, Run
from dicache.profiler.recorder import Recorder
from dicache.runtime.apply import denoiser
from dicache.schedules import Schedule, Target


def sampling_of(provenance: Provenance) -> Sampling:
    """Return how the pipeline of a profile was called."""
    settings = provenance.settings
    size = {name: settings.get(name) for name in ("guidance", "height", "width", "frames")}
    return Sampling(provenance.target.num_inference_steps, **size)


def pipeline_of(provenance: Provenance, device: str | None = None) -> Any:
    """Load the pipeline that a profile is of, with its sampler and in its precision.

    Raises:
        ModelError: If the model is not where it was.
    """
    target = provenance.target
    return load(provenance.model, device=device, dtype=target.dtype, scheduler=target.scheduler)


def survey_pipeline(pipeline: Any, sampling: Sampling) -> tuple[Anatomy, Target, int]:
    """Return what is known of a pipeline without measuring it: anatomy, step counts, and the number of steps."""
    sampling = sampling.resolved(pipeline)
    model = denoiser(pipeline)
    condition = default_conditions(pipeline, 1)
    # The pipeline itself sets the timesteps on the way: some hand their own sigmas or a shift to the scheduler.
    anatomy = survey(model, capture_inputs(model, lambda: sample(pipeline, condition, [0], sampling)))
    return anatomy, Target(num_inference_steps=sampling.steps), len(pipeline.scheduler.timesteps)


def target_of(pipeline: Any, anatomy: Anatomy, sampling: Sampling, component: str | None = None) -> Target:
    """Return all that a schedule can be bound to, of a pipeline whose sampling has begun at least once."""
    model, scheduler = denoiser(pipeline, component), pipeline.scheduler
    return Target(
        weights=fingerprint(model),
        dtype=dtype_of(model),
        latents=anatomy.latents,
        scheduler=type(scheduler).__name__,
        num_inference_steps=sampling.steps,
        timesteps=timesteps(scheduler),
        noise_levels=noise_levels(scheduler),
        guidance=sampling.resolved(pipeline).guidance,
    )


def planned_runs(conditions: Sequence[str], seed: int, keep_prompts: bool) -> list[Run]:
    """Return the runs of these conditions; each has the next seed."""
    return [Run(condition if keep_prompts else hashed(condition), seed + i) for i, condition in enumerate(conditions)]


def hashed(prompt: str) -> str:
    """Return what stands for a prompt that is not to be written down."""
    return f"sha256:{hashlib.sha256(prompt.encode()).hexdigest()[:16]}"


def provenance_of(
    pipeline: Any,
    component: str | None,
    name: str,
    anatomy: Anatomy,
    sampling: Sampling,
    recorder: Recorder,
    priors: bool | Schedule,
) -> Provenance:
    import diffusers

    configured = config_of(pipeline.scheduler)
    device = next(denoiser(pipeline, component).parameters()).device
    return Provenance(
        model=name,
        anatomy=anatomy,
        target=target_of(pipeline, anatomy, sampling, component),
        settings={
            "pipeline": type(pipeline).__name__,
            **({"component": component} if component else {}),
            "guidance": sampling.guidance,
            "height": sampling.height,
            "width": sampling.width,
            "frames": sampling.frames,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "scheduler_config": configured,
            "scheduler_config_hash": digest(configured),
            "priors": priors if isinstance(priors, bool) else digest(priors.to_json()),
        },
        versions={
            "dicache": dicache.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        lags=recorder.lags,
        contexts=recorder.contexts,
        parts=recorder.parts,
        time_signals=recorder.time_signals,
        decision_blocks=recorder.decision_blocks,
        first_blocks=recorder.first_blocks,
        first_block_lags=recorder.first_block_lags,
    )


def check_resumable(
    file: Path, before: Provenance, now: Provenance, done: Sequence[Run], planned: Sequence[Run]
) -> None:
    if differing := before.differences(now):
        raise ProfileError(
            f"{file} cannot be resumed: it was begun with another {', '.join(differing)}; choose another -o"
        )
    if not {run.key for run in done} <= {run.key for run in planned}:
        raise ProfileError(
            f"{file} cannot be resumed: its {len(done)} runs are of other prompts or seeds; choose another -o"
        )
