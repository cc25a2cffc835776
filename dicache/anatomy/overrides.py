"""Replaces `forward` on instances of modules, and puts back exactly what was there."""

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from torch import nn


class Overrides:
    """Instance-level replacements of `forward`, undone in one go.

    A class is never touched, so two models of one class do not meet. A `forward` that was already on
    the instance (an offload hook's, for one) is called by whoever wraps it and comes back afterwards.
    """

    def __init__(self) -> None:
        self._before: dict[nn.Module, Callable[..., Any] | None] = {}

    def set(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Replace the forward of `module`."""
        if module not in self._before:
            self._before[module] = module.__dict__.get("forward")
        # Past nn.Module.__setattr__, which would look through its parameters and buffers first.
        module.__dict__["forward"] = forward

    def original(self, module: nn.Module) -> Callable[..., Any]:
        """Return the forward that `module` had before any replacement."""
        before = self._before.get(module, module.__dict__.get("forward"))
        return before if before is not None else type(module).forward.__get__(module)

    def clear(self, module: nn.Module) -> None:
        """Give `module` its own forward back."""
        if module in self._before:
            before = self._before.pop(module)
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before

    def restore(self) -> None:
        """Give every module its own forward back."""
        for module in list(self._before):
            self.clear(module)

    def __iter__(self) -> Iterator[nn.Module]:
        """Go through the modules whose forward is replaced."""
        return iter(list(self._before))

    def __enter__(self) -> "Overrides":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()
