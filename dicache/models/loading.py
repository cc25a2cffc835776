"""Load a pipeline by name."""

import logging
from pathlib import Path
from typing import Any

import torch

from dicache.models.names import ModelError, Source, find

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARE_OF_MEMORY = 0.8  # that weights may take of a GPU; the rest is for activations


def load(name: str, *, device: str | None = None, dtype: str | None = None, scheduler: str | None = None) -> Any:
    """Return the diffusers pipeline of a name, silent and in evaluation mode.

    Weights are read from safetensors files only, and no code that a repository brings is run. Where the memory of a GPU
    does not suffice, its parts are kept on the host and moved there one at a time.

    Args:
        name: As `--model` takes it.
        device: Where to put it; a GPU if there is one when left out.
        dtype: `float32`, `float16` or `bfloat16`; float32 on a CPU and what the model is usual in elsewhere.
        scheduler: Class name of another scheduler, with or without its ending: `DPMSolverMultistep`.

    Raises:
        ModelError: If the model is unknown, is not where it should be, or the scheduler does not exist.
    """
    import diffusers

    source = find(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    usual = source.usual.dtype if source.usual else "bfloat16"
    dtype = dtype or ("float32" if torch.device(device).type == "cpu" else usual)
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
            source.location, local_files_only=source.bundled, use_safetensors=True, **precision
        )
    except Exception as error:
        raise ModelError(_cannot_load(name, source, error)) from error
    finally:
        logger.setLevel(level)
        if shows_progress:
            diffusers.utils.logging.enable_progress_bar()
    if scheduler is not None:
        pipeline.scheduler = _scheduler(scheduler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return _placed(pipeline, device)


def _cannot_load(name: str, source: Source, error: Exception) -> str:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(source.location).is_dir():
        return f"{name}: cannot load {source.location}: {said}"
    return (
        f"{name}: cannot get {source.location} from the hub ({type(error).__name__}). Check the id, and the login "
        f"if it is gated (`hf auth login`); without a network, bring what `hf download {source.location}` fetches "
        "elsewhere and pass that folder as --model"
    )


def _placed(pipeline: Any, device: str) -> Any:
    if torch.device(device).type == "cuda":
        modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        needed = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
        free, _ = torch.cuda.mem_get_info(device)
        if needed > SHARE_OF_MEMORY * free:
            pipeline.enable_model_cpu_offload(device=device)
            return pipeline
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
