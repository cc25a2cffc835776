"""Short names for weights and for plain data, equal where these are equal; and what else tells models apart."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dicache.anatomy.spread import Sharded, is_sharded

SAMPLES = 8  # values of each tensor: enough that a fine-tuned model differs, few enough for thousands of tensors


def fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits made of the names, shapes and sampled values of all parameters and buffers.

    Values are rounded to bfloat16 first, so that the precision a checkpoint was loaded in rarely matters. Weights that
    accelerate has offloaded count as if they were in their places, and so do those that are in shards, about which all
    processes have to ask together. Adapters (LoRA) and quantisation change it.
    """
    digest = hashlib.sha256()
    sampled: list[Tensor] = []
    sharded, owed = Sharded(model), []
    for name, tensor in model.state_dict().items():
        own = name.replace(".base_layer.", ".")  # peft leaves its wrapper in place when the last adapter is deleted
        digest.update(f"{own}{tuple(tensor.shape)}".encode())
        value = _value(model, name, tensor)
        if value.is_meta or not value.numel():
            continue
        if is_sharded(value):
            count = value.numel()
            sharded.look_up(name, value, range(0, count, max(1, count // SAMPLES))[:SAMPLES])
            owed.append((len(sampled), value.dtype))
            sampled.append(torch.empty(0))
        else:
            flat = value.detach().reshape(-1)
            sampled.append(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].to(torch.bfloat16))
    for (place, dtype), values in zip(owed, sharded.values(), strict=True):
        sampled[place] = values.to(dtype).to(torch.bfloat16)
    if sampled:
        values = torch.cat([part.to(sampled[0].device) for part in sampled])
        digest.update(values.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def digest(content: Any) -> str:
    """Return 16 hexadecimal digits that are equal for equal content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def config_of(part: Any) -> dict[str, Any]:
    """Return the configuration of a scheduler or a model of diffusers, without what says where it was loaded from."""
    return {name: value for name, value in dict(part.config).items() if not name.startswith("_")}


def dtype_of(model: nn.Module) -> str:
    """Return the name of the dtype of a model's weights, such as `bfloat16`."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _value(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return the values of a parameter or buffer: of one that is offloaded those it is loaded from."""
    if tensor.is_meta:
        path, _, own = name.rpartition(".")
        hook = vars(model.get_submodule(path)).get("_hf_hook")
        for part in (hook, *getattr(hook, "hooks", ())):
            weights: Mapping[str, Tensor] = getattr(part, "weights_map", None) or {}
            if own in weights:
                return weights[own]
    if type(tensor).dequantize is not Tensor.dequantize:  # of a library for quantisation: knows few operators
        return tensor.dequantize()
    return tensor
