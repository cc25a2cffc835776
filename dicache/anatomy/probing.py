"""Find out what a module of a block feeds: replace its output by NaN and see whether that arrives."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dicache.anatomy.overrides import TURN, Overrides, forward_of, without_turn
from dicache.anatomy.parts import MADE, AnatomyError, Block
from dicache.anatomy.recognising import norms
from dicache.anatomy.standins import one_token, pass_on, view_of_zero
from dicache.anatomy.watching import BlockCall, Returns

Forward = Callable[..., Any]
FAR = 1e4  # beyond what a norm gives, and a number in half precision


class Probe:
    """Runs a block again as it was called, with some of its pieces replaced.

    Args:
        call: The call of the block, with those of its pieces.
    """

    def __init__(self, call: BlockCall) -> None:
        self._call = call
        self._kept = {piece.path: piece.returned for piece in call.pieces}

    def run(
        self,
        given: Collection[str],
        replaced: Mapping[str, Callable[[Forward], Forward]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the block's output.

        Args:
            given: Paths of pieces that give what they returned when they were watched, without running.
            replaced: Path of a module -> what makes its forward from its own.
            arguments: What is passed instead of the arguments of these names.
        """
        module = self._call.module
        with Overrides() as overrides, torch.no_grad():
            for path in given:
                overrides.set(overrides.part(module, path), partial(_give, self._kept[path]))
            for path, make in (replaced or {}).items():
                part = overrides.part(module, path)
                overrides.set(part, make(forward_of(part)))
            return self._call.again(arguments or {})

    def reaches(self, source: str, piece: str, branches: list[str]) -> bool:
        """Whether NaN from a module arrives in what a branch returns, when the other branches do not run."""
        seen: list[Any] = []

        def look(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                seen.append(forward(*args, **kwargs))
                return seen[-1]

            return run

        self.run([path for path in branches if path != piece], {source: poisoned, piece: look})
        return not all(same(self._kept[piece], out) for out in seen)

    def nothing(self, path: str) -> Callable[[Forward], Forward]:
        """Return what makes a piece give zeros of the shape of its output, without running."""
        return lambda _: partial(_give, view_of_zero(self._kept[path]))


def poisoned(forward: Forward) -> Forward:
    """Return a forward that gives NaN wherever the module's own gives a number."""

    def poison(*args: Any, **kwargs: Any) -> Any:
        return nan_like(forward(*args, **kwargs))

    return poison


def nan_like(value: Any) -> Any:
    """Return a value with all its tensors of numbers full of NaN."""
    if isinstance(value, Tensor):
        return torch.full_like(value, torch.nan) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(nan_like(part) for part in value)
    return value


def same(a: Any, b: Any) -> bool:
    """Whether two outputs are equal bit for bit; NaN equals nothing."""
    one, two = (x if isinstance(x, (tuple, list)) else (x,) for x in (a, b))
    return len(one) == len(two) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y
        for x, y in zip(one, two, strict=True)
    )


def feeding_only(probe: Probe, output: str, candidates: list[str]) -> tuple[str, ...]:
    """Return which pieces of a block feed one of them, `output`, and nothing else.

    With that piece's output given, NaN from such a piece arrives nowhere; when it runs, it does.
    """
    want = probe.run([output])
    return tuple(
        path
        for path in candidates
        if same(want, probe.run([output], {path: poisoned})) and not same(want, probe.run([], {path: poisoned}))
    )


def carries(probe: Probe, output: str, streams: Mapping[str, Tensor]) -> bool:
    """Whether a stream passes the block only through the piece `output`, which then is no branch beside it."""
    want = probe.run([output])
    return any(same(want, probe.run([output], arguments={name: nan_like(value)})) for name, value in streams.items())


def depending(probe: Probe, call: BlockCall, streams: Mapping[str, Tensor]) -> set[str]:
    """Return the pieces of a block that give something else where its streams are other ones."""
    changed: set[str] = set()

    def compared(path: str, before: Any) -> Callable[[Forward], Forward]:
        def make(forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                out = forward(*args, **kwargs)
                if not same(before, out):
                    changed.add(path)
                return out

            return run

        return make

    others = {name: value * 0.5 + 0.25 for name, value in streams.items()}
    probe.run([], {piece.path: compared(piece.path, piece.returned) for piece in call.pieces}, others)
    return changed


def continued(block: Block, call: BlockCall) -> Returns:
    """Return a block's outputs as they are named, but for one that does not continue the argument it is named for.

    With all branches giving zeros, what enters as a stream arrives in what leaves as one. An output that it does not
    arrive in only has the same shape: it is made anew, like a hint for other blocks.
    """
    probe = Probe(call)
    silent = {path: probe.nothing(path) for site in block.sites for path in site.modules}
    want = _outputs(probe.run([], silent))
    names = [block.returns] if isinstance(block.returns, str) else list(block.returns)
    for name, value in call.streams(block.returns).items():
        place = names.index(name)
        got = _outputs(probe.run([], silent, {name: value * 0.5 + 0.25}))
        if same(want[place], got[place]):
            names[place] = f"{MADE}{place}"
    return names[0] or "" if isinstance(block.returns, str) else tuple(names)


def _outputs(returned: Any) -> Any:
    return returned if isinstance(returned, (tuple, list)) else (returned,)


def norms_of(block: Block, call: BlockCall) -> dict[str, tuple[str, ...]]:
    """Return the norms of a block that feed nothing but its branches, and which branches each of them feeds.

    With all branches reused a norm's output is replaced by NaN: if the block's output is the same bit for bit, the
    norm feeds nothing else. A branch that is then computed again, and returns NaN, is one that it feeds.

    Raises:
        AnatomyError: If the block's output is another when the branches' inner modules give zeros.
    """
    probe = Probe(call)
    streams = list(call.streams(block.returns).values())
    every = [site.module for site in block.sites]
    inside = [without_turn(path) for site in block.sites for path in site.modules]
    found: dict[str, tuple[str, ...]] = {}
    want = probe.run(every)
    for name in norms(call.module):
        if any(name == path or name.startswith(f"{path}.") for path in inside):
            continue
        fits: list[bool] = []
        # Large numbers besides NaN, which every comparison with a limit calls False.
        got = [probe.run(every, {name: partial(_poisoned_norm, fits, poison)}) for poison in (nan_like, _far_off)]
        if not fits or not all(fits) or not all(same(want, out) for out in got):
            continue
        feeds = tuple(site.branch for site in block.sites if probe.reaches(name, site.module, every))
        if feeds:
            found[name] = feeds

    # What the runtime will do. It must change neither the output nor the input itself.
    inner = {path: probe.nothing(path) for site in block.sites for path in site.inner}
    before = [stream.clone() for stream in streams]
    if inner and not (same(want, probe.run(every, inner)) and same(before, streams)):
        raise AnatomyError(
            f"{call.path}: {', '.join(inner)} feed only a branch, and yet the block's output is another when they "
            "give zeros; its branches cannot be reused"
        )
    got = probe.run(every, {**inner, **{name: lambda _: pass_on for name in found}})
    return found if same(want, got) and same(before, streams) else {}


def does_with_one_token(block: Block, call: BlockCall) -> bool:
    """Whether the norms of a block may give one token while all its branches are reused: its output is then the same.

    Nothing looks at the values that a norm gives; a block that looks at how many there are, refuses or differs.
    """
    probe, replaced = Probe(call), {path: (lambda _: one_token) for path in block.norms}
    inner = {path: probe.nothing(path) for site in block.sites for path in site.inner}
    every = [site.module for site in block.sites]
    if not replaced or any(TURN in path for path in (*every, *inner, *replaced)):
        return False
    try:
        return same(probe.run([*every], inner), probe.run([*every], {**inner, **replaced}))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return False


def _far_off(value: Any) -> Any:
    return FAR - value if isinstance(value, Tensor) else value


def _poisoned_norm(fits: list[bool], poisoned: Callable[[Any], Any], forward: Forward) -> Forward:
    """Poison a norm, and note at each of its calls whether it takes tokens and keeps their shape and type."""

    def poison(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        passed = args[0] if args else next(iter(kwargs.values()), None)
        fits.append(
            isinstance(out, Tensor)
            and isinstance(passed, Tensor)
            and out.ndim >= 2
            and passed.shape == out.shape
            and passed.dtype == out.dtype
        )
        return poisoned(out)

    return poison


def _give(value: Any, *_args: Any, **_kwargs: Any) -> Any:
    return value
