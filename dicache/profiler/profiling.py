"""Run a pipeline uncached with recorders attached, and write down what they saw, run by run."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import dicache
from dicache.anatomy import Anatomy, survey
from dicache.anatomy.clock import noise_levels, timesteps
from dicache.anatomy.fingerprint import fingerprint
from dicache.anatomy.inputs import Inputs, capture_inputs, latents_of
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions, sample
from dicache.profiler import storage
from dicache.profiler.profiles import ProfileError, Provenance, Run
from dicache.profiler.recorder import Recorder
from dicache.runtime.apply import denoiser
from dicache.schedules import Target


def profile_model(
    model: str,
    output: Path,
    *,
    runs: int,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    lags: int = 3,
    progress: bool = True,
) -> Path:
    """Load a model by name and profile it over `runs` of its default conditions. See `profile_pipeline`."""
    pipeline = load(model)
    conditions = default_conditions(pipeline, runs)
    sampling = Sampling(steps=steps, guidance=guidance)
    return profile_pipeline(
        pipeline, model, output, conditions, sampling=sampling, seed=seed, lags=lags, progress=progress
    )


def profile_pipeline(
    pipeline: Any,
    name: str,
    output: Path,
    conditions: Sequence[str],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    lags: int = 3,
    resume: bool = False,
    progress: bool = True,
) -> Path:
    """Measure a pipeline and write its profile.

    Each run is written when it is done, so that a killed profile goes on at the next one. A run that meets a NaN or an
    infinity is kept as failed, and has no part in the measurements.

    Args:
        pipeline: A diffusers pipeline.
        name: Of the model, for titles.
        output: The HDF5 file.
        conditions: Prompts or classes, one a run.
        sampling: How to call the pipeline; its own defaults when left out.
        seed: Of the first run; each run has the next one.
        lags: How many steps back each branch's output is compared with.
        resume: Go on with the file if it is there and was begun with the same model and settings.
        progress: Whether to show a bar on standard error.

    Returns:
        The file.

    Raises:
        ProfileError: If the file exists and may not or cannot be gone on with, or every run failed.
    """
    if not conditions or lags < 1:
        raise ProfileError(f"a profile needs at least one run and one lag, found {len(conditions)} and {lags}")
    sampling = (sampling or Sampling()).resolved(pipeline)
    planned = [Run(condition, seed + i) for i, condition in enumerate(conditions)]
    done: tuple[Run, ...] = ()
    before: Provenance | None = None
    if output.exists():
        before, done = storage.header(output)
        if not resume:
            raise ProfileError(f"{output} exists, with {len(done)} runs; pass --resume to go on with it, or another -o")
    model = denoiser(pipeline)
    inputs = capture_inputs(model, lambda: sample(pipeline, conditions[:1], [seed], sampling))
    anatomy = survey(model, inputs)
    bar = tqdm(planned, initial=len(done), desc=f"profile {name}", unit="run", disable=not progress)
    provenance = None
    if before is not None:
        provenance = _provenance(pipeline, name, anatomy, inputs, sampling, lags, before.contexts)
        _check_resumable(output, before, provenance, done, planned)
    with bar, Recorder(pipeline, model, anatomy, lags) as recorder:
        for run in itertools.islice(planned, len(done), None):
            sample(pipeline, [run.prompt], [run.seed], sampling)
            if provenance is None:
                contexts = recorder.contexts
                provenance = _provenance(pipeline, name, anatomy, inputs, sampling, lags, contexts)
                storage.create(output, provenance)
            failure = recorder.failure()
            status = "ok" if failure is None else f"failed at {failure}"
            record = storage.RunRecord(Run(run.prompt, run.seed, status), recorder.arrays(provenance.contexts))
            storage.append(output, record)
            bar.update()
    _, finished = storage.header(output)
    if not any(run.ok for run in finished):
        raise ProfileError(f"every run {finished[0].status}: the model's outputs are not finite; try another --dtype")
    return output


def survey_pipeline(pipeline: Any, sampling: Sampling) -> tuple[Anatomy, Target, int]:
    """Return what is known of a pipeline without measuring it: anatomy, step counts, and the number of steps."""
    sampling = sampling.resolved(pipeline)
    model = denoiser(pipeline)
    condition = default_conditions(pipeline, 1)
    anatomy = survey(model, capture_inputs(model, lambda: sample(pipeline, condition, [0], sampling)))
    pipeline.scheduler.set_timesteps(sampling.steps)
    return anatomy, Target(num_inference_steps=sampling.steps), len(pipeline.scheduler.timesteps)


def _provenance(
    pipeline: Any,
    name: str,
    anatomy: Anatomy,
    inputs: Inputs,
    sampling: Sampling,
    lags: int,
    contexts: tuple[str, ...],
) -> Provenance:
    import diffusers

    model, scheduler = denoiser(pipeline), pipeline.scheduler
    if len(getattr(scheduler, "timesteps", ())) == 0 or scheduler.num_inference_steps != sampling.steps:
        scheduler.set_timesteps(sampling.steps)
    latents = latents_of(inputs.args, inputs.kwargs)
    return Provenance(
        model=name,
        anatomy=anatomy,
        target=Target(
            weights=fingerprint(model),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            latents=tuple(latents.shape[1:]),
            scheduler=type(scheduler).__name__,
            num_inference_steps=sampling.steps,
            timesteps=timesteps(scheduler),
            noise_levels=noise_levels(scheduler),
        ),
        settings={
            "pipeline": type(pipeline).__name__,
            "guidance": sampling.guidance,
            "height": sampling.height,
            "width": sampling.width,
            "frames": sampling.frames,
            "device": str(next(model.parameters()).device),
            "scheduler_config": {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")},
        },
        versions={"dicache": dicache.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        lags=lags,
        contexts=contexts,
        layout="batched" if _halves_equal(latents) else "separate",
    )


def _halves_equal(latents: Tensor) -> bool:
    half = len(latents) // 2
    return len(latents) % 2 == 0 and torch.equal(latents[:half], latents[half:])


def _check_resumable(
    output: Path, before: Provenance, now: Provenance, done: Sequence[Run], planned: Sequence[Run]
) -> None:
    old, new = (json.loads(json.dumps(provenance.to_json())) for provenance in (before, now))
    differing = [key for key in old if key != "versions" and old[key] != new[key]]
    if differing:
        raise ProfileError(
            f"{output} cannot be gone on with: it was begun with another {', '.join(differing)}; choose another -o"
        )
    same = [(run.prompt, run.seed) for run in done] == [(run.prompt, run.seed) for run in planned[: len(done)]]
    if not same or len(done) > len(planned):
        raise ProfileError(
            f"{output} cannot be gone on with: its {len(done)} runs are of other prompts or seeds; choose another -o"
        )
