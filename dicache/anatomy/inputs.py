"""What a model is called with: captured from its pipeline, or made up from its configuration."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dicache.anatomy.overrides import Overrides
from dicache.anatomy.parts import AnatomyError

TEXT_TOKENS = 8  # of made-up text; enough to tell it from one token


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Captured(BaseException):  # past the pipeline's own `except Exception`
    pass


def capture_inputs(model: nn.Module, run: Callable[[], Any]) -> Inputs:
    """Return the arguments of the first call of `model` that `run()` makes; the run is broken off there.

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
    """Return the latents among a call's arguments: `hidden_states` or `sample`, else the first tensor.

    Raises:
        AnatomyError: If there is no tensor.
    """
    for name in ("hidden_states", "sample", "x"):
        if isinstance(kwargs.get(name), Tensor) and not args:
            latents: Tensor = kwargs[name]
            return latents
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise AnatomyError("the call has no tensor among its arguments, so its latents cannot be found")
