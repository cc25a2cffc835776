"""What a model is called with: captured from its pipeline, or made up from its configuration."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from dicache.anatomy.overrides import Overrides
from dicache.anatomy.parts import AnatomyError

LATENTS = (
    "hidden_states",
    "sample",
    "x",
    "vision_tokens",
    "decoder_input_tokens",
)  # what the models of diffusers call them
TIME = re.compile(r"timestep|noise_time|^(t|sigma)$")
TEXT_TOKENS = 8  # of made-up text; enough to tell it from one token


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Captured(BaseException):  # past the pipeline's own `except Exception`
    pass


def capture_inputs(model: nn.Module, run: Callable[[], Any]) -> Inputs:
    """Return the arguments of the first call of `model` that `run()` makes; the run is interrupted there.

    Raises:
        AnatomyError: If the run ends without calling the model.
    """
    found: list[Inputs] = []

    def stop(*args: Any, **kwargs: Any) -> None:
        found.append(Inputs(args, kwargs))
        raise _Captured

    with Overrides() as overrides:
        overrides.set(model, stop)
        try:
            run()
        except _Captured:
            return found[0]
    raise AnatomyError(f"the run ended without a call of {type(model).__name__}; there is nothing to look at")


def example_inputs(model: nn.Module) -> Inputs:
    """Make up arguments, batch 2, from a diffusers model's configuration and the names of its parameters.

    Raises:
        AnatomyError: If a required parameter has a name that is not known here.
    """
    config: Mapping[str, Any] = getattr(model, "config", {})
    reference = next(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(reference)

    size = config.get("sample_size") or 16
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    rows, columns = height // 2, width // 2  # where patches of two by two pixels are packed before the model
    names = inspect.signature(model.forward).parameters
    packed = "img_ids" in names
    frames = (config["video_length"],) if config.get("video_length") else ()

    def image_ids() -> Tensor:
        """Return the place of each patch, row and column last, shape (patches, axes)."""
        axes = len(config["axes_dims_rope"])
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        return nn.functional.pad(grid, (axes - 2, 0)).to(reference)

    text = config.get("caption_channels") or config.get("joint_attention_dim") or config.get("cross_attention_dim")
    text = text[-1] if isinstance(text, (tuple, list)) else text  # one for each stage of a U-Net, all alike
    sized = config.get("addition_embed_type") == "text_time"  # SDXL

    def text_and_time() -> dict[str, Tensor]:
        """Return what SDXL is told: the whole text's embedding, and six numbers of sizes and crops."""
        channels = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        pixels = torch.tensor([[8.0 * height, 8.0 * width, 0, 0, 8.0 * height, 8.0 * width]] * 2)
        return {"text_embeds": noise(2, channels), "time_ids": pixels.to(reference)}

    known: dict[str, Callable[[], Any]] = {
        "sample": lambda: noise(2, config["in_channels"], height, width),
        "hidden_states": lambda: (
            noise(2, rows * columns, config["in_channels"])
            if packed
            else noise(2, config["in_channels"], *frames, height, width)
        ),
        "timestep": lambda: (
            torch.full((2,), 0.5).to(reference) if packed else torch.full((2,), 500, device=reference.device)
        ),
        "class_labels": lambda: torch.zeros(2, dtype=torch.long, device=reference.device),
        "encoder_hidden_states": lambda: noise(2, TEXT_TOKENS, int(text or 0)),
        "pooled_projections": lambda: noise(2, config["pooled_projection_dim"]),
        "added_cond_kwargs": lambda: text_and_time() if sized else {"resolution": None, "aspect_ratio": None},
        "img_ids": image_ids,
        "txt_ids": lambda: reference.new_zeros(TEXT_TOKENS, len(config["axes_dims_rope"])),
        "guidance": lambda: torch.full((2,), 3.5).to(reference),
    }
    needed = {
        "class_labels": config.get("norm_type") == "ada_norm_zero",
        "added_cond_kwargs": sized or "sample" not in names,
        "encoder_hidden_states": text is not None,
        "pooled_projections": config.get("pooled_projection_dim") is not None,
        "guidance": bool(config.get("guidance_embeds")),
    }
    kwargs = {}
    for name, parameter in names.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        if name in known and (required or needed.get(name, True)):
            try:
                kwargs[name] = known[name]()
            except (KeyError, TypeError):
                required = True
        if required and name not in kwargs:
            raise AnatomyError(
                f"{type(model).__name__} needs {name!r}, and what to give cannot be read from its configuration; "
                "call survey(model, inputs) with the arguments of a real call"
            )
    if config.get("use_additional_conditions") and "added_cond_kwargs" in kwargs:
        pixels = torch.tensor([[256.0, 256.0]] * 2, device=reference.device, dtype=reference.dtype)
        kwargs["added_cond_kwargs"] = {"resolution": pixels, "aspect_ratio": pixels[:, :1] / 256}
    return Inputs((), kwargs)


def latents_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the latents of a call, batch first: `hidden_states`, `sample` and the like, else the first with numbers.

    Those of a model that takes a list, a tensor for each sample, are put together where they are of one size; of
    several sizes it is the first.

    Raises:
        AnatomyError: If there is no tensor.
    """
    first = args[0] if args else next((kwargs[name] for name in LATENTS if name in kwargs), None)
    if isinstance(first, Tensor) and first.is_floating_point():
        return first
    value = _latents_among(Inputs(args, kwargs))
    if isinstance(value, Tensor):
        return value
    found = list(numbers_in(value))
    if found:
        return torch.stack(found) if len({tensor.shape for tensor in found}) == 1 else found[0][None]
    raise AnatomyError("the call has no tensor of numbers among its arguments, so its latents cannot be found")


def numbers_in(value: Any) -> Iterator[Tensor]:
    """Go through the tensors of floating-point numbers in a value or in nested lists of them."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from numbers_in(part)


def is_time(name: str) -> bool:
    """Whether an argument of this name says how noisy the latents are, as the models of diffusers call it."""
    return TIME.search(name) is not None


def moved_inputs(model: nn.Module, inputs: Inputs, *, time: bool = True) -> Inputs:
    """Return the same arguments with other latents and, unless told otherwise, at another timestep."""
    latents = _latents_among(inputs)
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def moved(name: str, value: Any) -> Any:
        if value is latents:
            return _changed(value)
        if time and is_time(name):
            return _earlier(value)
        return value

    args = tuple(
        moved(name, value) for name, value in zip_longest(names[: len(inputs.args)], inputs.args, fillvalue="")
    )
    return Inputs(args, {name: moved(name, value) for name, value in inputs.kwargs.items()})


def _latents_among(inputs: Inputs) -> Any:
    """Return the argument that holds the latents."""
    named = [inputs.kwargs[name] for name in LATENTS if name in inputs.kwargs and not inputs.args]
    given = (*named, *inputs.args, *inputs.kwargs.values())
    return next((value for value in given if next(numbers_in(value), None) is not None), None)


def _changed(value: Any) -> Any:
    if isinstance(value, Tensor):
        wave = torch.linspace(-1, 1, value.numel(), dtype=torch.float32, device=value.device).reshape(value.shape)
        return value * 0.5 + wave.to(value.dtype) if value.is_floating_point() else value
    return type(value)(_changed(part) for part in value) if isinstance(value, (list, tuple)) else value


def _earlier(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value * 0.5 if value.is_floating_point() else value // 2
    return type(value)(_earlier(part) for part in value) if isinstance(value, (list, tuple)) else value
