"""Tell from a module's class and contents what it may be: a list of blocks, an attention, a feed-forward, a norm."""

import re
import sys
from collections.abc import Collection, Iterator

from torch import nn

NOT_A_BRANCH = re.compile(r"norm|modulat|embed|adaln|rope|scale", re.IGNORECASE)
ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
FEED_FORWARD = re.compile(r"feedforward|mlp|swiglu|moe|ffn", re.IGNORECASE)
NORM = re.compile(r"norm", re.IGNORECASE)
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def containers(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost lists all of whose elements hold an attention and are not one themselves."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and not inside
            and all(
                not isinstance(element, nn.ModuleList)
                and not is_attention(element)
                and any(is_attention(part) for part in element.modules())
                for element in module
            )
        ):
            found[path] = module
    return found


def pieces(block: nn.Module, entered: Collection[str] = (), above: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules that a block works with, with their path inside it.

    Norms and modulations are not among them. Lists, wrappers round an attention and what is named are entered.
    """
    for name, child in block.named_children():
        path, attention = f"{above}{name}", is_attention(child)
        if path not in entered and attention:
            yield path, child
        elif NOT_A_BRANCH.search(type(child).__name__):
            continue
        elif (
            path in entered
            or isinstance(child, nn.ModuleList)
            or (not attention and any(is_attention(part) for part in child.modules()))
        ):
            yield from pieces(child, entered, f"{path}.")
        else:
            yield path, child


def norms(block: nn.Module) -> Iterator[str]:
    """Yield the paths inside a block of the modules that only normalise."""
    for path, part in block.named_modules():
        if path and NORM.search(type(part).__name__) and not any(True for _ in part.children()):
            yield path


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention: one of diffusers' own classes, or one named so that holds a matrix."""
    known = sys.modules.get("diffusers.hooks._common")
    if known is not None and isinstance(module, getattr(known, "_ATTENTION_CLASSES", ())):
        return True
    name = type(module).__name__
    return bool(ATTENTION.search(name)) and not NOT_A_BRANCH.search(name) and count_matrices(module) > 0


def is_called_attention(path: str, module: nn.Module) -> bool:
    """Whether a piece of a block is an attention, by itself or by what the block calls it."""
    name = path.rpartition(".")[2]
    called = ATTENTION.search(name) and not NOT_A_BRANCH.search(name) and count_matrices(module) >= 2
    return bool(called) or is_attention(module)


def is_branch(module: nn.Module) -> bool:
    """Whether a piece of a block may be a branch by itself: an attention, or a feed-forward by name or contents."""
    named = FEED_FORWARD.search(type(module).__name__) and any(True for _ in module.parameters())
    return bool(named) or is_attention(module) or count_matrices(module) >= 2


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution, or one with an adapter (LoRA) on it, as peft wraps it."""
    return isinstance(module, MATRICES) or isinstance(getattr(module, "base_layer", None), MATRICES)


def count_matrices(module: nn.Module) -> int:
    """Return the number of linear layers and convolutions in a module; those of adapters are not counted."""
    return 1 if is_matrix(module) else sum(map(count_matrices, module.children()))
