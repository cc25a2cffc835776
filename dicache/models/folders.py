"""Look over a folder in diffusers' format before anything of it is loaded."""

import importlib
import json
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from dicache.models.names import ModelError

LIBRARIES = ("diffusers", "transformers")  # whose classes a folder may name; the pipelines' own packages come on top
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")  # weights in formats that are not read


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be loaded, or only by running code or unpickling files that it brings.

    Args:
        folder: Where `model_index.json` lies.
        name: How the user calls the model, for messages.

    Raises:
        ModelError: If the index names no pipeline of diffusers, a component is missing or has a class of its own, or
            weights are not in safetensors files.
    """
    index = _index(folder, name)
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise _own_code(name, "pipeline", pipeline)
    if not _is_pipeline(pipeline):
        raise ModelError(
            f"{name}: model_index.json names {pipeline!r}, which is no pipeline of the diffusers that is installed; "
            "needed one that it has, or a newer diffusers (`pip install -U diffusers`)"
        )
    for part, (library, kind) in _components(index).items():
        if library not in LIBRARIES and not _has_pipeline_package(library):
            raise _own_code(name, part, [library, kind])
        if not (folder / part).is_dir():
            raise ModelError(
                f"{name}: {part} ({kind}) is missing; needed the folder {folder / part}, which model_index.json names"
            )
        if _holds_weights(library, kind):
            _check_weights(folder / part, name)
        if "Tokenizer" in kind:
            _check_tokenizer(folder / part, name)


def parameters(folder: Path) -> int:
    """Return how many parameters the safetensors files of a folder hold, read from their headers."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in folder.glob("*/*.safetensors"):
        if any(part.startswith(("fp16", "bf16", "ema", "non_ema")) for part in file.name.split(".")[1:-1]):
            continue  # another copy of the same weights
        try:
            with safe_open(file, "np") as weights:
                total += sum(prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        except SafetensorError:
            continue  # broken: told where it is loaded
    return total


def _index(folder: Path, name: str) -> dict[str, Any]:
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except FileNotFoundError:
        raise ModelError(f"{name} has no model_index.json; needed a pipeline in diffusers' format") from None
    except ValueError as error:
        raise ModelError(f"{name}: model_index.json is not JSON ({error}); get the folder again") from None
    if not isinstance(index, dict) or "_class_name" not in index:
        raise ModelError(f"{name}: model_index.json names no pipeline; needed one that `save_pretrained` wrote")
    return index


def _components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return library and class of each part that is to be loaded; optional parts that are left out say null."""
    pairs = {k: v for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and len(v) == 2}
    return {k: (v[0], v[1]) for k, v in pairs.items() if isinstance(v[0], str) and isinstance(v[1], str)}


def _own_code(name: str, part: str, found: Any) -> ModelError:
    return ModelError(
        f"{name}: its {part} is {found!r}, code that it brings along, which is never run here; needed a model whose "
        f"classes are in {' or '.join(LIBRARIES)}"
    )


def _is_pipeline(kind: str) -> bool:
    import diffusers

    found = getattr(diffusers, kind, None)
    return isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)


def _has_pipeline_package(library: str) -> bool:
    from diffusers import pipelines

    return hasattr(pipelines, library)


def _holds_weights(library: str, kind: str) -> bool:
    import torch

    found = getattr(importlib.import_module(library), kind, None) if library in LIBRARIES else None
    return isinstance(found, type) and issubclass(found, torch.nn.Module)


def _check_weights(part: Path, name: str) -> None:
    if any(part.glob("*.safetensors")):
        return
    pickled = sorted(file for pattern in PICKLED for file in part.glob(pattern))
    if not pickled:
        raise ModelError(f"{name}: {part} holds no weights; needed safetensors files")
    raise ModelError(
        f"{name}: {pickled[0].relative_to(part.parent)} is no safetensors file, and others are not read, because they "
        f"can run code. {convert(str(part.parent))}"
    )


def convert(location: str) -> str:
    """Return what to do with a model, trusted, that has no safetensors files."""
    target = f"{Path(location).name}-safetensors"
    return (
        f"""If you trust it, convert it once: python -c "from diffusers import DiffusionPipeline as P; """
        f"""P.from_pretrained('{location}').save_pretrained('{target}')", then --model ./{target}"""
    )


def _check_tokenizer(part: Path, name: str) -> None:
    if (part / "tokenizer.json").is_file() or any(part.glob("vocab.*")):
        return
    if not any(part.glob("*.model")):  # loaded all the same, it would know no word
        raise ModelError(f"{name}: {part} holds no vocabulary; needed tokenizer.json, vocab.json or spiece.model")
    if missing := [module for module in ("sentencepiece", "google.protobuf") if not _importable(module)]:
        packages = " ".join(module.removeprefix("google.") for module in missing)
        raise ModelError(f"{name}: its {part.name} is a SentencePiece model; to read it, `pip install {packages}`")


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False
