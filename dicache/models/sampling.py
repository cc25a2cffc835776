"""Call any pipeline the same way: conditions and seeds in, images out."""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicache.models.names import ModelError, find
from dicache.runtime.callers import guidance_name

# What pictures are asked for when nobody says: plain things, many kinds of texture, layout and light.
PROMPTS = (
    "a red fox in fresh snow, morning light",
    "a bowl of lemons on a blue wooden table",
    "an old lighthouse on a cliff during a storm",
    "a portrait of an elderly fisherman, black and white photograph",
    "a crowded street market at night with paper lanterns",
    "a glass teapot with green tea, macro photograph",
    "a small robot watering sunflowers, watercolor",
    "a mountain lake with the reflection of pine trees",
    "a stack of hardcover books beside a brass lamp",
    "an astronaut riding a bicycle on the moon",
    "a city skyline made of circuit boards",
    "two sparrows on a telephone wire, minimalist drawing",
    "a steam locomotive crossing a stone viaduct",
    "a bakery window full of bread and pastries",
    "an underwater photograph of a sea turtle above a reef",
    "a desert road under a sky full of stars",
)
PROMPTS_FILE = "prompts.txt"
UNCONDITIONAL = ""  # a condition that asks for nothing
NULL_CLASS = 1000  # what DiTPipeline itself takes for it, whatever the number of classes


@dataclass(frozen=True)
class Sampling:
    """How a pipeline is called.

    Attributes:
        steps: Inference steps; None takes the pipeline's own default.
        guidance: Guidance scale; None likewise.
        height: In pixels; None likewise.
        width: In pixels; None likewise.
        frames: Of a video; None likewise.
        text_tokens: Longest prompt, in tokens; None likewise.
    """

    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    text_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and (not np.isfinite(value) or value < (0 if name == "guidance" else 1)):
                raise ModelError(f"{name} cannot be {value}")

    def usual_for(self, model: str) -> "Sampling":
        """Return the same with what is usual for a model of this name filled in."""
        usual = find(model).usual
        if usual is None:
            return self
        known = Sampling(usual.steps, usual.guidance, usual.size, usual.size, usual.frames, usual.text_tokens)
        return Sampling(**{k: v if v is not None else getattr(known, k) for k, v in vars(self).items()})

    def resolved(self, pipeline: Any) -> "Sampling":
        """Return the same with the pipeline's own defaults filled in."""
        parameters = inspect.signature(type(pipeline).__call__).parameters

        def default(name: str) -> Any:
            value = parameters[name].default if name in parameters else None
            return None if value is inspect.Parameter.empty else value

        known = replace(
            self,
            steps=self.steps or default("num_inference_steps"),
            guidance=default(guidance_argument(pipeline)) if self.guidance is None else self.guidance,
        )
        # Where a transformer knows no size, or a pipeline's defaults are those of one published model, the parts tell.
        if "video_length" in parameters:
            size = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
            frames = self.frames or pipeline.transformer.config.video_length
            return replace(known, height=self.height or size, width=self.width or size, frames=frames)
        if type(pipeline).__name__ == "FluxPipeline":
            if pipeline.vae is not None:
                size = pipeline.vae.config.sample_size
                known = replace(known, height=self.height or size, width=self.width or size)
            if pipeline.tokenizer_2 is not None:
                longest = min(default("max_sequence_length"), pipeline.tokenizer_2.model_max_length)
                known = replace(known, text_tokens=self.text_tokens or longest)
        return known


def guidance_argument(pipeline: Any) -> str:
    """Return what a pipeline calls the scale of guidance that takes a second pass a step, if the model has it."""
    return guidance_name(inspect.signature(type(pipeline).__call__).parameters, pipeline)


def takes_classes(pipeline: Any) -> bool:
    """Whether the pipeline is conditioned on a class, and not on a text."""
    return "class_labels" in inspect.signature(type(pipeline).__call__).parameters


def default_conditions(pipeline: Any, count: int) -> list[str]:
    """Return `count` conditions: classes spread over all there are, or prompts in turn.

    The prompts are those of `prompts.txt` in the model's folder, which the bundled models bring because they know only
    the words of their own captions, or else the built-in ones.
    """
    if not takes_classes(pipeline):
        own = Path(str(pipeline.name_or_path)) / PROMPTS_FILE
        prompts = read_conditions(own) if own.is_file() else PROMPTS
        return [prompts[i % len(prompts)] for i in range(count)]
    classes = sorted({int(label) for label in pipeline.labels.values()}) or list(range(1000))
    stride = max(1, len(classes) // count)
    return [str(classes[i * stride % len(classes)]) for i in range(count)]


def read_conditions(path: str | os.PathLike[str]) -> list[str]:
    """Read prompts or classes from a text file, one a line; empty lines are left out.

    Raises:
        ModelError: If the file is missing, is not text, or has no line.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except (FileNotFoundError, IsADirectoryError):
        raise ModelError(f"{path} does not exist; needed a text file with a prompt or a class a line") from None
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not text ({error}); needed a prompt or a class a line") from None
    conditions = [line for line in lines if line]
    if not conditions:
        raise ModelError(f"{path} is empty; needed a prompt or a class a line")
    return conditions


def sample(
    pipeline: Any, conditions: Sequence[str], seeds: Sequence[int], sampling: Sampling, *, output_type: str = "np"
) -> Any:
    """Return what the pipeline makes of conditions and seeds, in one batch.

    Each image has a generator of its own, so that it does not depend on the batch it is in.

    Args:
        pipeline: A diffusers pipeline.
        conditions: Prompts, or classes as numbers or names; an empty one asks for nothing.
        seeds: One for each condition.
        sampling: How to call it.
        output_type: `np` for images in [0, 1], shape (n, h, w, 3), or (n, frames, h, w, 3) of a video.

    Raises:
        ModelError: If a class is not known, or the pipeline does not take an option that is set.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    sampling = sampling.resolved(pipeline)
    arguments: dict[str, Any] = {
        "num_inference_steps": sampling.steps,
        guidance_argument(pipeline): sampling.guidance,
        "height": sampling.height,
        "width": sampling.width,
        "video_length" if "video_length" in parameters else "num_frames": sampling.frames,
        "max_sequence_length": sampling.text_tokens,
    }
    for name, value in list(arguments.items()):
        if name in parameters and value is not None:
            continue
        if name not in parameters and value is not None:
            raise ModelError(f"{type(pipeline).__name__} does not take {name}; found {value}")
        del arguments[name]
    arguments |= _switched_off(pipeline, parameters)
    if takes_classes(pipeline):
        arguments["class_labels"] = [
            NULL_CLASS if condition == UNCONDITIONAL else class_id(pipeline, condition) for condition in conditions
        ]
    else:
        arguments["prompt"] = list(conditions)
        if "true_cfg_scale" in arguments:
            arguments["negative_prompt"] = [""] * len(conditions)  # without one there is no second pass
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad(), _noise_of(pipeline, seeds):
        out = pipeline(**arguments, generator=generators, output_type=output_type)
    return np.asarray(out[0])


# Sizes of the latents, in pixels, for which these pipelines have a list of aspect ratios; for others they break off.
BINNED = {
    "PixArtAlphaPipeline": (32, 64, 128),
    "PixArtSigmaPipeline": (32, 64, 128, 256),
    "SanaPipeline": (16, 32, 64, 128),
}


def _switched_off(pipeline: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a pipeline does unless it is told not to, and cannot do with this model or on this machine."""
    off = {}
    if "use_resolution_binning" in parameters:
        size = pipeline.transformer.config.sample_size
        if size not in BINNED.get(type(pipeline).__name__, (size,)):
            off["use_resolution_binning"] = False
    if "clean_caption" in parameters and not all(find_spec(module) for module in ("bs4", "ftfy")):
        off["clean_caption"] = False  # as it does itself, with a warning for each prompt
    return off


@contextmanager
def _noise_of(pipeline: Any, seeds: Sequence[int]) -> Iterator[None]:
    """Make the noise that a pipeline draws without a generator, in a stochastic sampler's steps, follow the seeds."""
    device = pipeline._execution_device
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.manual_seed(seeds[0])
        yield


def class_id(pipeline: Any, condition: str) -> int:
    """Return the number of a class given by its number or its name."""
    labels = {str(name).lower(): int(label) for name, label in pipeline.labels.items()}
    if condition.lower() in labels:
        return labels[condition.lower()]
    try:
        label = int(condition)
    except ValueError:
        label = -1
    if (labels and label not in labels.values()) or label < 0:
        some = ", ".join(sorted(labels, key=lambda name: labels[name])[:10]) or "numbers from 0"
        raise ModelError(f"unknown class {condition!r}; needed one of {some}") from None
    return label
