"""A short name for a model's weights, equal where they are equal."""

import hashlib

import torch
from torch import nn

SAMPLES = 8  # values of each tensor: enough that a fine-tuned model differs, few enough for thousands of tensors


def fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits made of the names, shapes and sampled values of all parameters and buffers.

    Values are rounded to bfloat16 first, so that the precision a checkpoint was loaded in rarely matters.
    """
    digest = hashlib.sha256()
    sampled = []
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().reshape(-1)
            sampled.append(flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].to(torch.bfloat16))
    if sampled:
        values = torch.cat([part.to(sampled[0].device) for part in sampled])
        digest.update(values.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
