"""Ranges of a U-Net's blocks, inside of which the stream changes its shape and skip connections begin and end."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor, nn

from dicache.anatomy import Anatomy
from dicache.anatomy.standins import view_of_zero
from dicache.runtime.executor import Forward, Installer, Program
from dicache.runtime.streams import Streams, Tensors, add, delta
from dicache.schedules import Range


class Nested:
    """Makes the forwards that keep, and that give, what leaves a range of a U-Net's blocks.

    What is made inside such a range leaves it only with its last block. Where the range is skipped, the modules inside
    give tensors of the right shapes with nothing in them, which the U-Net joins and hands on to one another, and the
    last block gives what stands in for its output. The U-Net may write into that (FreeU does), so it is a copy.

    Args:
        model: The U-Net.
        anatomy: Its own.
        installer: Knows the modules' own forwards.
        streams: Of each block.
        entries: Returns what the lane whose call is running keeps.
        push: Keeps an output, and so many of those before it.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        installer: Installer,
        streams: Mapping[int, Streams],
        entries: Callable[[], dict[Any, Any]],
        push: Callable[[Range, Tensors, int], None],
    ) -> None:
        self._model = model
        self._anatomy = anatomy
        self._installer = installer
        self._streams = streams
        self._entries = entries
        self._push = push
        self._entered: dict[Range, Tensor] = {}

    def clear(self) -> None:
        """Forget the call that ran, also when it failed."""
        self._entered.clear()

    def skip(self, part: Range, stand_in: Forward, *, feature: bool) -> Program:
        """Return the forwards of a step that skips a range.

        Args:
            part: The range.
            stand_in: Gives its output or its delta.
            feature: Whether that is its output.
        """
        first, last = (self._streams[index] for index in (part[0], part[1] - 1))
        program = {module: self._blank(key) for key, module in self._inside(part)}
        entering = self._blank((part, self._anatomy.blocks[part[0]].module))

        def enter(*args: Any, **kwargs: Any) -> Any:
            self._entered[part] = _only(first.read(args, kwargs))
            return entering()

        def leave(*args: Any, **kwargs: Any) -> Any:
            kept = stand_in()
            if feature:
                return last.pack({name: tensor.clone() for name, tensor in kept.items()})
            entered = _only(last.read(args, kwargs)) if first is last else self._entered.pop(part)
            return last.pack(add(dict.fromkeys(kept, entered), kept))

        if first is not last:
            program[first.module] = enter
        program[last.module] = leave
        return program

    def keep(self, part: Range, program: Program, older: int, *, feature: bool) -> Program:
        """Return the forwards of a step that computes a range whose output or delta a later one reads.

        Args:
            part: The range.
            program: What is put on the modules besides.
            older: How many outputs before this one are kept.
            feature: Whether the output is kept, and not the delta.
        """
        first, last = (self._streams[index] for index in (part[0], part[1] - 1))
        named = (part, self._anatomy.blocks[part[0]].module)
        inside = [(named, first.module)] if first is not last else []
        made: Program = {}
        for key, module in (*inside, *self._inside(part)):
            made[module] = self._keep_shape(key, program.get(module) or self._installer.original(module))
        entering, leaving = (
            made.get(s.module) or program.get(s.module) or self._installer.original(s.module) for s in (first, last)
        )

        def leave(*args: Any, **kwargs: Any) -> Any:
            returned = leaving(*args, **kwargs)
            left = last.unpack(returned)
            if feature:
                self._push(part, {name: tensor.clone() for name, tensor in left.items()}, older)
            else:
                self._push(part, delta(left, dict.fromkeys(left, self._entered.pop(part))), older)
            return returned

        made[last.module] = leave
        if feature:
            return made
        inner = leave if first is last else entering

        def enter(*args: Any, **kwargs: Any) -> Any:
            self._entered[part] = _only(first.read(args, kwargs))
            return inner(*args, **kwargs)

        made[first.module] = enter
        return made

    def _inside(self, part: Range) -> list[tuple[Hashable, nn.Module]]:
        return [((part, path), self._model.get_submodule(path)) for path in self._anatomy.inside(*part)]

    def _blank(self, key: Hashable) -> Forward:
        def blank(*_args: Any, **_kwargs: Any) -> Any:
            return _blank_like(self._entries()[key])

        return blank

    def _keep_shape(self, key: Hashable, forward: Forward) -> Forward:
        def keep_shape(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            self._entries()[key] = view_of_zero(out)
            return out

        return keep_shape


def shape_keys(anatomy: Anatomy, part: Range) -> tuple[Hashable, ...]:
    """Return the names of the shapes that are kept for a range besides its output; none but for a U-Net."""
    if not anatomy.links:
        return ()
    return tuple((part, path) for path in (anatomy.blocks[part[0]].module, *anatomy.inside(*part)))


def _only(streams: Tensors) -> Tensor:
    (tensor,) = streams.values()
    return tensor


def _blank_like(kept: Any) -> Any:
    """Return tensors of some shapes that may be written into, and that nothing reads."""
    if isinstance(kept, Tensor):
        return kept.new_empty(kept.shape)
    if isinstance(kept, (tuple, list)):
        return type(kept)(_blank_like(part) for part in kept)
    return kept
