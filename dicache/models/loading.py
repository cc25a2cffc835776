"""Load a pipeline by name."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dicache.models.devices import check_memory, device_of, dtype_of, placed
from dicache.models.folders import check_folder, parameters
from dicache.models.hub import fetch, first_line
from dicache.models.names import ModelError, find
from dicache.models.schedulers import with_scheduler


def load(name: str, *, device: str | None = None, dtype: str | None = None, scheduler: str | None = None) -> Any:
    """Return the diffusers pipeline of a name, silent and in evaluation mode.

    Weights are read from safetensors files only, and no code that a repository brings is run. Where the memory of a GPU
    does not suffice, its parts are kept on the host and moved there one at a time.

    Args:
        name: As `--model` takes it.
        device: Where to put it; a GPU if there is one when left out.
        dtype: `float32`, `float16` or `bfloat16`; float32 on a CPU and what the model is usual in elsewhere.
        scheduler: Another scheduler than the model's own, as `with_scheduler` takes it: `DPMSolverMultistep`, `dpm`.

    Raises:
        ModelError: If the model is unknown, is not where it should be, is not safe to load or too large; or if the
            device or the scheduler is not there for it.
    """
    import diffusers

    source = find(name)
    to = device_of(device)
    precision = dtype_of(dtype, to, source.usual.dtype if source.usual else "bfloat16")
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    argument = "dtype" if version >= (0, 42) else "torch_dtype"  # renamed there
    with _quiet() as said:
        folder = Path(source.location)
        if not folder.is_dir():
            folder = fetch(source.location, name)
        if not source.bundled:
            check_folder(folder, name)
        if to.type == "cpu":
            check_memory(name, parameters(folder), precision)
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                **{argument: precision},
            )
        except Exception as error:
            raise ModelError(f"{name}: cannot load {folder}: {first_line(error)}") from error
    if missing := _made_up("\n".join(said)):
        raise ModelError(
            f"{name}: the weights in {folder} are not complete, {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} missing; get the folder again"
        )
    if scheduler is not None:
        with_scheduler(pipeline, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return placed(pipeline, to)


# Tied to another parameter, or computed: these are not missing where a checkpoint leaves them out.
DERIVED = ("embed_tokens.weight", "shared.weight", "lm_head.weight", "position_ids")


def _made_up(said: str) -> list[str]:
    """Return the parameters that, by what was logged, were not in the files and were given random values."""
    lists = re.findall(r"newly initialized: \[(.*?)\]", said, re.DOTALL)
    keys = [key for each in lists for key in re.findall(r"'([^']+)'", each)]
    keys += re.findall(r"^(\S+)\s*\|\s*MISSING", said, re.MULTILINE)  # as transformers lists them since its version 5
    return [key for key in keys if not key.endswith(DERIVED)]


class _Listener(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Collect what diffusers and transformers log, and keep from the terminal what is handled here."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # A bundled folder holds the class names in its index, of which this logger says that it did not expect them.
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    said: list[str] = []
    listener = _Listener(said)
    libraries = [logging.getLogger(library) for library in ("diffusers", "transformers")]
    for library in libraries:
        library.addHandler(listener)
    bars = [each for each in (diffusers_logging, transformers_logging) if each.is_progress_bar_enabled()]
    for each in bars:
        each.disable_progress_bar()
    handlers = list(libraries[1].handlers)
    transformers_logging.disable_default_handler()
    try:
        yield said
    finally:
        for library in libraries:
            library.removeHandler(listener)
        logger.setLevel(level)
        if libraries[1].handlers != handlers:  # where it was there
            transformers_logging.enable_default_handler()
        for each in bars:
            each.enable_progress_bar()
