"""The configurations of published models, from which their operations are counted without any weights."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicache.models.names import ModelError, find

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.json")))
CLIP_TOKENS = 77  # that Stable Diffusion 3 puts before those of the long prompt
DENOISERS = ("transformer", "unet")  # folders of a pipeline, of which it has one


@dataclass(frozen=True)
class ModelConfig:
    """What a denoiser is made of and how it is usually called.

    Attributes:
        name: As `--model` takes it.
        kind: Class of diffusers.
        config: What the class is built with.
        usual: Steps, guidance, height and width in pixels, and the number of text tokens; None where there are none,
            or it is not known.
        pixels_per_latent: Along one side.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    usual: Mapping[str, Any]
    pixels_per_latent: int = 8


def read_config(name: str) -> ModelConfig:
    """Return the configuration of a model: one that is in the package, or of a pipeline in a local folder.

    Raises:
        ModelError: If there is none of this name, or it has no denoiser.
    """
    if name in NAMES:
        content = json.loads((FOLDER / f"{name}.json").read_text())
        return ModelConfig(name, content["class"], content["config"], content["usual"], content["pixels_per_latent"])
    source = find(name)
    folder = Path(source.location)
    if not folder.is_dir():
        raise ModelError(
            f"the configuration of {name} is not in the package; needed one of {', '.join(NAMES)}, "
            "or the folder of a pipeline in diffusers' format"
        )
    parts = [folder / part / "config.json" for part in DENOISERS]
    file = next((file for file in parts if file.is_file()), None)
    if file is None:
        raise ModelError(f"{name} has neither transformer/config.json nor unet/config.json in {folder}")
    try:
        content = json.loads(file.read_text())
        kind = content.pop("_class_name")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{name}: {file} is no configuration of a model of diffusers") from None
    config = {key: value for key, value in content.items() if not key.startswith("_")}
    pixels = _pixels_per_latent(folder)
    size = config.get("sample_size")
    sides = size if isinstance(size, list) else (size, size)
    usual = _of_pipeline(folder, kind, config)
    if size is None and kind == "FluxTransformer2DModel":  # it knows none
        pixel_size = _read(folder / "vae" / "config.json").get("sample_size")
        usual |= {"height": pixel_size, "width": pixel_size}
    else:
        usual |= {"height": sides[0] and sides[0] * pixels, "width": sides[1] and sides[1] * pixels}
    if source.usual is not None:
        known = {"steps": source.usual.steps, "guidance": source.usual.guidance}
        usual |= {key: value for key, value in known.items() if value is not None}
    return ModelConfig(name, kind, config, usual, pixels)


def _of_pipeline(folder: Path, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a pipeline is called with by default: steps, guidance, and the longest prompt."""
    import diffusers

    pipeline = getattr(diffusers, _read(folder / "model_index.json").get("_class_name", ""), None)
    parameters = inspect.signature(pipeline.__call__).parameters if pipeline is not None else {}

    def default(name: str) -> Any:
        value = parameters[name].default if name in parameters else None
        return None if value is inspect.Parameter.empty else value

    limits = [
        _read(folder / part / "tokenizer_config.json").get("model_max_length") for part in ("tokenizer_2", "tokenizer")
    ]
    tokens = default("max_sequence_length") or limits[1]
    if kind == "FluxTransformer2DModel" and limits[0] is not None:
        tokens = min(tokens, limits[0])
    if tokens is not None and kind == "SD3Transformer2DModel":
        tokens += CLIP_TOKENS
    true = "true_cfg_scale" in parameters and not config.get("guidance_embeds")
    guidance = default("true_cfg_scale" if true else "guidance_scale")
    return {"steps": default("num_inference_steps"), "guidance": guidance, "text_tokens": tokens}


def _pixels_per_latent(folder: Path) -> int:
    channels = _read(folder / "vae" / "config.json").get("block_out_channels", ())
    return int(2 ** max(len(channels) - 1, 0))


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text()) if file.is_file() else {}
    return content if isinstance(content, dict) else {}
