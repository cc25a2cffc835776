"""Replaces `forward` on instances of modules, and puts back exactly what was there."""

import re
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from torch import nn

TURN = "#"  # `ff#2/2`: the second of two calls of `ff` in one call of its block
SHARING = re.compile(r"cp_(in|out)put---.")  # diffusers' hooks of context parallelism, but those on the model itself


class Turn(nn.Module):
    """Stands for one of several calls of a module in one call of its block, so that each can be replaced alone."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self._run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


def home(module: nn.Module) -> dict[str, Any]:
    """Return where a replacement of `forward` stands: among a module's attributes, or inside of the hooks on it.

    diffusers' context parallelism puts hooks on the first block that share out the tokens among the ranks. They must
    run even where the block does not, and what replaces its forward must see what the block would.
    """
    registry = vars(module).get("_diffusers_hook")
    if registry is not None:
        for name, reference in zip(registry._hook_order, registry._fn_refs, strict=True):  # the innermost first
            if SHARING.match(name):
                found: dict[str, Any] = vars(reference)
                return found
    return vars(module)


def put(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Let a forward stand where a replacement stands; None for that of the module's class."""
    where = home(module)
    if forward is None and where is vars(module):
        where.pop("forward", None)
    else:
        where["forward"] = or_own(module, forward)


def or_own(module: nn.Module, found: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return what was found in place of a module's forward or, if nothing was, that of its class."""
    return found if found is not None else type(module).forward.__get__(module)


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """Return what a replacement of a module's forward takes the place of."""
    return or_own(module, home(module).get("forward"))


def inside(module: nn.Module) -> Callable[..., Any]:
    """Return what calls a module with what a replacement of its forward is given."""
    return module if home(module) is vars(module) else forward_of(module)


class Overrides:
    """Instance-level replacements of `forward`, undone in one go.

    A class is never touched, so two models of one class do not meet. A `forward` that was already on
    the instance (an offload hook's, for one) is called by whoever wraps it and comes back afterwards.
    """

    def __init__(self) -> None:
        self._before: dict[nn.Module, Callable[..., Any] | None] = {}
        self._set: dict[nn.Module, Callable[..., Any]] = {}
        self._turns: dict[nn.Module, list[Turn]] = {}
        self._next: dict[nn.Module, int] = {}

    def set(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Replace the forward of `module`."""
        if module not in self._before:
            self._before[module] = home(module).get("forward")
        self._set[module] = forward
        # Past nn.Module.__setattr__, which would look through its parameters and buffers first.
        home(module)["forward"] = forward

    def part(self, root: nn.Module, path: str) -> nn.Module:
        """Return a module by its path below another; for a path that names one of several calls, what stands for it."""
        path, _, turn = path.partition(TURN)
        module: nn.Module = root.get_submodule(path)
        if not turn:
            return module
        place, count = map(int, turn.split("/"))
        if module not in self._turns:
            turns = self._turns[module] = [Turn(forward_of(module)) for _ in range(count)]

            def in_turn(*args: Any, **kwargs: Any) -> Any:
                now = self._next.get(module, 0)
                self._next[module] = (now + 1) % count
                return turns[now].forward(*args, **kwargs)

            self.set(module, in_turn)
        return self._turns[module][place - 1]

    @property
    def between_turns(self) -> bool:
        """Whether a module was called less often than it was when it was looked at, in the call that has ended."""
        return bool(self._next) and any(self._next.values())

    def rewind(self) -> None:
        """Begin with the first call of every module again, in case the model's call before was interrupted."""
        self._next.clear()

    def original(self, module: nn.Module) -> Callable[..., Any]:
        """Return the forward that `module` had before any replacement."""
        if module not in self._before:
            return forward_of(module)
        return or_own(module, self._before[module])

    def untouched(self) -> dict[nn.Module, Callable[..., Any] | None]:
        """Return the modules on which nobody has put another forward since, with what they had before."""
        return {
            module: before
            for module, before in self._before.items()
            if home(module).get("forward") is self._set[module]
        }

    def clear(self, module: nn.Module) -> None:
        """Give `module` its own forward back, unless somebody has put another one on it since."""
        if module in self._before:
            before, own = self._before.pop(module), self._set.pop(module)
            if home(module).get("forward") is not own:
                return
            put(module, before)

    def restore(self) -> None:
        """Give every module its own forward back."""
        for module in list(self._before):
            self.clear(module)
        self._turns.clear()
        self._next.clear()

    def __iter__(self) -> Iterator[nn.Module]:
        """Go through the modules whose forward is replaced."""
        return iter(list(self._before))

    def __enter__(self) -> "Overrides":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()


def without_turn(path: str) -> str:
    """Return the path of a module, whichever of its calls is meant."""
    return path.partition(TURN)[0]


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, itself first: as its `modules()`, which takes several times as long."""
    found, seen = [model], {model}
    for part in found:  # grows on the way
        if children := part._modules:  # most have none
            for child in children.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    found.append(child)
    return found
