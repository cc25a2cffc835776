"""Where the stream can be seen inside a block: between what its attention adds to it and what the rest adds."""

from typing import Any

import torch
from torch import Tensor

from dicache.anatomy.overrides import without_turn
from dicache.anatomy.parts import Block
from dicache.anatomy.probing import Forward, Probe
from dicache.anatomy.recognising import norms
from dicache.anatomy.watching import BlockCall


def middle_of(block: Block, call: BlockCall) -> str:
    """Return the path of the first module that is given the stream as the block's first branches left it, or "".

    A norm of the next branch, or that branch itself, usually is. That what it is given is the stream is probed: with
    the branches before it giving zeros it is what entered the block, and with those behind it giving zeros it is what
    leaves. Then the first branches add the one minus what entered, behind whatever gate, and the rest adds what leaves
    minus the one. Where nothing is given the stream, as in blocks whose branches lie side by side, there is no middle.

    Args:
        block: Its sites and streams.
        call: A call of it, with those of its pieces.
    """
    stream = block.main_stream
    if not stream:
        return ""
    probe = Probe(call)
    entered: Tensor = call.arguments[stream]
    silent = {site.module: probe.nothing(site.module) for site in block.sites}
    inside = [without_turn(path) for site in block.sites for path in site.modules]
    places = [site.entrance for site in block.sites]
    places += [path for path in norms(call.module) if not f"{path}.".startswith(tuple(f"{p}." for p in inside))]
    watch = _Watch(places, list(silent))
    probe.run([], watch.looks)
    for place, given, before in watch.given:
        behind = silent.keys() - before
        if not before or not behind or given.shape != entered.shape or torch.equal(given.to(entered), entered):
            continue
        again = _Watch([place], [])
        probe.run([], {**{path: silent[path] for path in before}, **again.looks})
        left = _stream(block, stream, probe.run(before, {path: silent[path] for path in behind}))
        if torch.equal(again.given[0][1].to(entered), entered) and torch.equal(given.to(entered), left.to(entered)):
            return place
    return ""


class _Watch:
    """Looks at what modules of a block are given, and at which of its branches are done by then.

    Attributes:
        given: Path of the module, its first tensor, and the branches that were done, call by call.
        looks: For `Probe.run`.
    """

    def __init__(self, places: list[str], branches: list[str]) -> None:
        self.given: list[tuple[str, Tensor, tuple[str, ...]]] = []
        self._places, self._branches, self._done = places, branches, list[str]()
        self.looks = {path: self._look(path) for path in dict.fromkeys([*places, *branches])}

    def _look(self, path: str) -> Any:
        def make(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
                if path in self._places and first is not None:
                    self.given.append((path, first, tuple(self._done)))
                out = forward(*args, **kwargs)
                if path in self._branches:
                    self._done.append(path)
                return out

            return run

        return make


def _stream(block: Block, name: str, returned: Any) -> Tensor:
    """Return one stream of what a block returned."""
    if isinstance(block.returns, str):
        return returned  # type: ignore[no-any-return] # checked with the streams
    return returned[block.returns.index(name)]  # type: ignore[no-any-return]
