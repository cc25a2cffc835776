"""What really ran, counted below the modules, where nothing can claim work that was not done."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dicache.anatomy.macs import TOTAL, count_macs
from dicache.conformance import subject


class Operators(TorchDispatchMode):
    """Counts the operators that reach the device, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operators(run: Callable[[], Any]) -> Counter[str]:
    """Return how often each operator runs in `run()`."""
    counter = Operators()
    with counter:
        run()
    return counter.counts


def macs(run: Callable[[], Any]) -> int:
    """Return the multiply-accumulates of `run()`."""
    return count_macs(run)[TOTAL]


class BrokenError(Exception):
    """Raised on purpose."""


@contextmanager
def broken(module: nn.Module, call: int) -> Iterator[None]:
    """Let a module fail at one of its calls, counted from 0, and expect that failure."""
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise BrokenError

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
        raise AssertionError("nothing failed")
    except BrokenError:
        pass
    finally:
        hook.remove()


def interrupted(run: Callable[[], Any], folder: str, line: int) -> int:
    """Run, with an interrupt before a line, counted from 0, of those that are executed in a folder's files.

    Returns how many lines were executed.
    """
    lines = 0

    def follow(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == line + 1:
                raise KeyboardInterrupt
        return follow

    before = sys.gettrace()
    # An interrupt never comes between the body of a `with` of a lock and its end, but a line does.
    sys.settrace(
        lambda frame, *_: (
            follow
            if frame.f_code.co_filename.startswith(folder) and not frame.f_code.co_filename.endswith("requests.py")
            else None
        )
    )
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return lines


def attributes(model: nn.Module) -> dict[tuple[str, str], int]:
    """Return which objects hang on each module of a model, by its path and the attribute's name."""
    return {place: id(value) for place, value in subject.attributes(model).items()}


def alike(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two tensors differ by no more than a millionth, as rounding does."""
    return bool((got - want).norm() <= 1e-6 * want.norm())
