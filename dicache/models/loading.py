"""Load a pipeline by name."""

import logging
from typing import Any

import torch

from dicache.models.names import ModelError, find

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(name: str, *, device: str = "cpu", dtype: str | None = None, scheduler: str | None = None) -> Any:
    """Return the diffusers pipeline of a name, silent and in evaluation mode.

    Args:
        name: As `--model` takes it.
        device: Where to put it.
        dtype: `float32`, `float16` or `bfloat16`; float32 on a CPU and bfloat16 elsewhere when left out.
        scheduler: Class name of another scheduler, with or without its ending: `DPMSolverMultistep`.

    Raises:
        ModelError: If the model is unknown, is not where it should be, or the scheduler does not exist.
    """
    import diffusers

    source = find(name)
    dtype = dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    # A bundled folder holds the class names in its index, of which diffusers says that it did not expect them.
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    level, shows_progress = logger.level, diffusers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    if source.bundled:
        diffusers.utils.logging.disable_progress_bar()
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    precision = {"dtype" if version >= (0, 42) else "torch_dtype": DTYPES[dtype]}  # renamed there
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            source.location, local_files_only=source.bundled, **precision
        )
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{name}: cannot load {source.location}: {said[0]}") from error
    finally:
        logger.setLevel(level)
        if shows_progress:
            diffusers.utils.logging.enable_progress_bar()
    if scheduler is not None:
        pipeline.scheduler = _scheduler(scheduler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _scheduler(name: str) -> Any:
    import diffusers

    kinds = [kind for kind in dir(diffusers) if kind.endswith("Scheduler") and kind != "DiffusersScheduler"]
    for kind in kinds:
        if kind.lower() in (name.lower(), f"{name.lower()}scheduler"):
            return getattr(diffusers, kind)
    raise ModelError(
        f"unknown scheduler {name!r}; needed one of diffusers' classes, such as DDIMScheduler or "
        "DPMSolverMultistepScheduler"
    )


def default_device() -> str:
    """Return `cuda` if there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"
