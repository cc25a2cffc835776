"""Learns the names that pipelines and loops give to their guidance passes, through the model's `cache_context`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn


class PassNames:
    """Wraps `cache_context` on one instance of a model; where it has none, it has one for a while.

    Args:
        model: Whose passes may be named.
        named: Given a name, a context inside which calls of the model belong to that pass.
    """

    def __init__(self, model: nn.Module, named: Callable[[str], AbstractContextManager[None]]) -> None:
        self._model = model
        self._own: dict[str, Any] = {k: x for k, x in vars(model).items() if k == "cache_context"}
        inner: Any = getattr(model, "cache_context", None)

        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            with named(name), inner(name, *args, **kwargs) if inner is not None else nullcontext():
                yield

        vars(model)["cache_context"] = cache_context

    def detach(self) -> None:
        """Give the model its own method back."""
        vars(self._model).pop("cache_context", None)
        vars(self._model).update(self._own)
