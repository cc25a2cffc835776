"""How rows are compiled, as `apply(..., compile=...)` is told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dicache.anatomy.nested import each
from dicache.runtime.errors import CacheError

SETTINGS = ("backend", "mode", "options", "dynamic")  # arguments of torch.compile
CUDA_GRAPHS = "cudagraphs"
CAPTURING = ("reduce-overhead", "max-autotune")  # modes that record CUDA graphs
OPTION = "triton.cudagraphs"  # and what turns them on among the options

Traced = Callable[..., Any]


@dataclass(frozen=True)
class Compiling:
    """Settings of `torch.compile`. A row is always one graph, so that nothing of it runs uncompiled.

    Attributes:
        settings: Of `backend`, `mode`, `options` and `dynamic`.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def asked(cls, compile: bool | str | Mapping[str, Any], model: nn.Module) -> "Compiling | None":  # noqa: A002
        """Return what the argument of `apply` says; None if it says no.

        Args:
            compile: True, `cudagraphs`, or settings of `torch.compile`.
            model: Whose rows are to be compiled.

        Raises:
            ValueError: If it is none of these.
            CacheError: If CUDA graphs are asked for, and the model is not on a CUDA device.
        """
        if compile is False:
            return None
        if compile is True:
            return cls()
        if isinstance(compile, Mapping):
            if unknown := [name for name in compile if name not in SETTINGS]:
                raise ValueError(
                    f"compile has no setting {unknown[0]!r}; it takes {', '.join(SETTINGS)} of torch.compile, and each "
                    "row is compiled with fullgraph=True"
                )
            return cls(dict(compile))
        if compile != CUDA_GRAPHS:
            raise ValueError(f"compile must be True, False, {CUDA_GRAPHS!r} or settings of torch.compile: {compile!r}")
        device = next(model.parameters()).device
        if device.type != "cuda":
            raise CacheError(
                f"CUDA graphs were asked for, and the {type(model).__name__} is on the device {device}; move it to a "
                "CUDA device before dicache.apply, or take compile=True"
            )
        return cls({"mode": CAPTURING[0]})

    @property
    def captures(self) -> bool:
        """Whether the compiler may record CUDA graphs, each of which writes its results to the same place each time."""
        options = self.settings.get("options") or {}
        backend = self.settings.get("backend")
        return backend == CUDA_GRAPHS or self.settings.get("mode") in CAPTURING or bool(options.get(OPTION))

    @property
    def sizes_are_fixed(self) -> bool:
        """Whether each size of the inputs has graphs of its own."""
        return self.settings.get("dynamic") is False

    def compile(self, run: Traced) -> Traced:
        """Return a function compiled; nothing is compiled before its first call."""
        compiled: Traced = torch.compile(run, fullgraph=True, **self.settings)
        if not self.captures:
            return compiled

        def captured(*args: Any) -> Any:
            # What a graph has made lies where its next run will write, and is kept, or held by a sampler, longer.
            torch.compiler.cudagraph_mark_step_begin()
            return each([compiled(*args)], lambda tensors: _copy(tensors[0]))

        return captured


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy; of one number shown many times, that number shown as often."""
    if tensor.ndim and tensor.numel() and not any(tensor.stride()):
        return tensor[(0,) * tensor.ndim].clone().expand(tensor.shape)
    return tensor.clone()
