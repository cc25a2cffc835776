"""Multiply-accumulates counted by operator, as they happen: hooks cannot claim work that was not done."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from dicache.anatomy.overrides import Overrides, forward_of

TOTAL = ""


class MacCounter(TorchDispatchMode):
    """Counts the multiply-accumulates of matrix products, convolutions and attention inside it.

    Attributes:
        macs: Path of a marked module -> the multiply-accumulates while it ran, those of marked modules in it
            included; `TOTAL` holds all of them.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: Counter[str] = Counter()
        self._open = [TOTAL]
        self._whole: set[Any] = set()  # operators that do not consist of others

    @contextmanager
    def mark(self, model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
        """Attribute work to these modules of a model as well."""

        def watched(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                self._open.append(path)
                try:
                    return forward(*args, **kwargs)
                finally:
                    self._open.pop()

            return run

        with Overrides() as overrides:
            for path in paths:
                module = overrides.part(model, path)
                overrides.set(module, watched(path, forward_of(module)))
            yield

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):  # flex attention: as if no block of its mask were empty
            if func.name() == "flex_attention":
                self._add(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape) // 2)
            return func(*args, **kwargs)
        packet = func._overloadpacket
        if packet is torch.ops.aten._int_mm:  # of 8-bit weights and activations; not in torch's registry
            self._add(args[0].shape[0] * args[0].shape[1] * args[1].shape[1])
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # not in torch's registry
            self._add(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape) // 2)
        elif packet in flop_registry:
            out = func(*args, **kwargs)
            self._add(flop_registry[packet](*args, **kwargs, out_val=out) // 2)
            return out
        elif func not in self._whole:
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
            self._whole.add(func)
        return func(*args, **kwargs)

    def _add(self, macs: int) -> None:
        for path in self._open:
            self.macs[path] += macs


def count_macs(run: Callable[[], Any], model: nn.Module | None = None, paths: Iterable[str] = ()) -> Counter[str]:
    """Return the multiply-accumulates of `run()`: in all (`TOTAL`) and while each of these modules of a model ran."""
    counter = MacCounter()
    with counter.mark(model, paths) if model is not None else nullcontext(), torch.no_grad(), _plain_flex(), counter:
        run()
    return counter.macs


@contextmanager
def _plain_flex() -> Iterator[None]:
    """Let flex attention run as it is, where it is called uncompiled: it traces itself, which cannot be watched."""
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    name = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    before = getattr(flex, name, None)
    if before is None:
        yield
        return
    setattr(flex, name, True)
    try:
        yield
    finally:
        setattr(flex, name, before)
