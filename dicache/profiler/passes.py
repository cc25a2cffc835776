"""The measurements of one guidance pass: what is held of a few steps, and what is made of it."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dicache.anatomy import Anatomy
from dicache.profiler.guided import PassOutput
from dicache.profiler.latest import Latest
from dicache.profiler.profiles import RATES
from dicache.profiler.residuals import Residuals
from dicache.profiler.rings import DeltaRing, Ring, SiteRing, fetched, wide
from dicache.profiler.storage.layout import MAGNITUDES, SITE_STATISTICS, TEACACHE_SIGNALS
from dicache.profiler.together import ALONE, Together
from dicache.runtime.streams import Tensors

Tensorlist = list[Tensor]


class Pass:
    """The measurements of one guidance pass, on the model's device until they are asked for.

    The rings are made after the first step of a generation, which tells the sizes; that step's outputs are held whole.

    Args:
        anatomy: The model's.
        lags: How many steps back a site's output is compared with.
        time_signals: Names of what the model makes of its timestep alone, as far as it is measured.
        first_blocks: How many of the first blocks, rising, to compare the residual of.
        first_block_lags: How many steps back.
        decision_blocks: Blocks of which what they add to the stream is measured for AdaCache.
        frames: Of a video; 0 otherwise.
        together: The ranks that the model is spread over.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        lags: int,
        time_signals: Sequence[str] = (),
        first_blocks: Sequence[int] = (),
        first_block_lags: int = 0,
        decision_blocks: Sequence[int] = (),
        frames: int = 0,
        together: Together = ALONE,
    ) -> None:
        self._ranks = together
        self.anatomy, self.lags = anatomy, lags
        self.signals = (*TEACACHE_SIGNALS, *time_signals)
        self.time: dict[str, Tensor] = {}  # the time signals of the call that runs
        self._residuals = {block: Residuals(RATES, frames, together) for block in decision_blocks}
        self._middles: dict[int, Tensor] = {}
        self._histories = {count: Latest(first_block_lags) for count in first_blocks}
        self.parts = 1
        self.site_shapes: list[tuple[int, ...]] = []  # (tokens of all tensors, channels)
        self.modulated: Tensor | None = None
        self._entered: Tensors = {}
        self._residual: Tensorlist = []
        self._body: Tensorlist = []
        self._first_sites: dict[int, Tensorlist] = {}
        self._first_deltas: dict[int, Tensorlist] = {}
        self._surviving = [anatomy.blocks[anatomy.segment(b.index)[1] - 1].streams for b in anatomy.blocks]
        self._sites: SiteRing | None = None
        self._before: list[Tensorlist] = []  # the signals of the step before
        self._delta_of: dict[int, tuple[DeltaRing, int]] = {}
        self._deltas: list[tuple[list[int], DeltaRing]] = []
        self.restart()

    def restart(self) -> None:
        """Forget the generation before, but not the memory that was set up for it."""
        self.step, self._ready, self._compared = -1, False, False
        self._before = []
        for residuals in self._residuals.values():
            residuals.restart()
        self._tables: dict[str, dict[int, Tensor]] = {"sites": {}, "change": {}, "size": {}, "magnitude": {}}
        self._grams: dict[int, list[Tensor]] = {}
        self._first_blocks: dict[int, Tensorlist] = {}  # sizes and changes, by step
        for history in self._histories.values():
            history.clear()
        self._clear_step()

    @property
    def bytes(self) -> int:
        held = [tensor for signal in self._before for tensor in signal]
        held_by = [ring.bytes for ring in self._rings()]
        held_by += [residuals.bytes for residuals in self._residuals.values()]
        held_by += [history.bytes for history in self._histories.values()]
        return sum(held_by) + sum(tensor.nbytes for tensor in held)

    def begin(self, step: int, parts: int) -> None:
        """Begin a step. A pass that was left out for some steps is not compared across the gap."""
        self._compared = step == self.step + 1 and bool(self._before)
        if not self._compared:
            for history in self._histories.values():
                history.clear()
        self.step, self.parts = step, parts
        if self._ready:
            for ring in self._rings():
                ring.advance()
        self._clear_step()

    def site(self, place: int, out: Tensorlist) -> None:
        """Take what a site gave."""
        if self._ready and self._sites is not None:
            self._sites.write(place, out)
        else:
            self._first_sites[place] = out

    def together(self, out: Tensorlist) -> Tensor:
        """Return what a site gave as one tensor, (parts, tokens of all tensors, channels)."""
        rows = [tensor.reshape(self.parts, -1, tensor.shape[-1]) for tensor in out]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def middle(self, index: int, stream: Tensor) -> None:
        """Take the stream as a block's attention left it."""
        self._middles[index] = stream

    def block(self, index: int, into: Tensors, out: Tensors) -> None:
        """Take what entered and what left a block; of what left, what continues a stream."""
        out = {name: tensor for name, tensor in out.items() if name in into}
        if index in self._residuals:
            name = self.anatomy.blocks[index].main_stream
            middle = self._middles.pop(index, None)
            self._residuals[index].add(self.step, into[name], middle, out[name], self.parts)
        start, stop = self.anatomy.segment(index)
        if index == start:
            self._entered = into
        if history := self._histories.get(index + 1):
            name = self.anatomy.blocks[index].main_stream
            [sums] = history.compare([(out[name], self._entered[name])])
            self._first_blocks.setdefault(self.step, []).append(sums / history.size)
        names = self._surviving[index]
        after, before = [out[name] for name in names], [into[name] for name in names]
        if self._ready:
            ring, place = self._delta_of[index]
            ring.write_change(place, after, before)
        else:
            self._first_deltas[index] = [one - two for one, two in zip(after, before, strict=True)]
        if index == stop - 1:
            self._residual += [tensor - self._entered[name] for name, tensor in out.items()]
        if index == len(self.anatomy.blocks) - 1:
            self._body = list(out.values())

    def end(self, out: Tensorlist) -> None:
        """Measure the call that ends."""
        assert self.modulated is not None
        signals = [
            [self.modulated],
            self._residual,
            self._body,
            out,
            *([self.time[name]] for name in self.signals[len(TEACACHE_SIGNALS) :]),
        ]
        if not self._ready:
            self._set_up()
        assert self._sites is not None
        self._output = out[0]
        self._sketch = self._sites.sketch()
        self._tables["sites"][self.step] = self._sites.sums()
        if self._compared:
            pairs = zip(signals, self._before, strict=True)
            changes = [_mean([(x - y).abs_() for x, y in zip(now, before, strict=True)]) for now, before in pairs]
            self._tables["change"][self.step] = torch.stack(changes)
            self._tables["magnitude"][self.step] = _magnitude(signals[1], self._before[1])
        self._tables["size"][self.step] = torch.stack([_mean([x.abs() for x in signal]) for signal in signals])
        self._before = signals
        self._grams[self.step] = [ring.gram() for _, ring in self._deltas]
        self._entered, self._body, self.modulated, self.time = {}, [], None, {}

    def given(self) -> PassOutput:
        """Return what the step's guidance is made of."""
        residual = [tensor.reshape(self.parts, -1) for tensor in self._residual]
        return PassOutput(self._output, residual, self._sketch)

    def failure(self) -> tuple[int, int] | None:
        """Return the first step and site whose output is not finite."""
        table = self._tables["sites"]
        for step, sums in zip(table, self._ranks.sums(fetched(list(table.values()))), strict=True):
            bad = np.flatnonzero(~np.isfinite(sums[:, 0]))
            if len(bad):
                return step, int(bad[0])
        return None

    def arrays(self, steps: int) -> dict[str, np.ndarray]:
        """Return the measurements, step first; NaN where there is nothing to compare with."""
        sites, blocks, lags = len(self.anatomy.sites), len(self.anatomy.blocks), self.lags
        out = {f"sites/{name}": np.full((steps, sites, lags), np.nan) for name in SITE_STATISTICS}
        out |= {f"teacache/{name}": np.full((steps, 2), np.nan) for name in self.signals}
        out["delta/gram"] = np.full((steps, 2 * blocks, 2 * blocks), np.nan)
        out["magnitude"] = np.full((steps, len(MAGNITUDES)), np.nan)
        seen = dict(self._steps_compared())
        measured = [residuals.arrays(seen, steps) for residuals in self._residuals.values()]
        for name in measured[0] if measured else ():
            out[f"motion/{name}"] = np.stack([found[name] for found in measured], axis=1)  # (steps, blocks, ...)
        out |= self._first_block_arrays(steps)
        if self._sites is None:
            return out | {"delta/cosine": _cosine(out["delta/gram"])}
        found_by = [fetched(list(table.values())) for table in self._tables.values()]
        put_together = (self._ranks.sums, *[self._ranks.means] * 3)
        sums, changes, sizes, magnitudes = (
            dict(zip(table, put(found), strict=True))
            for table, found, put in zip(self._tables.values(), found_by, put_together, strict=True)
        )
        grams = iter(self._ranks.sums(fetched([gram for step in seen for gram in self._grams[step]])))
        counts = self._ranks.tokens * np.array([sum(sizes) for sizes in self._sites.sizes])[:, None]
        for step, since in seen.items():
            back, found = min(since, lags), sums[step]  # (sites, 2 lags + 2)
            out["sites/abs_l1"][step] = found[:, :1] / counts
            out["sites/norm2"][step] = found[:, 1:2]
            out["sites/dot"][step, :, :back] = found[:, 2 : 2 + back]
            out["sites/diff_l1"][step, :, :back] = found[:, 2 + lags : 2 + lags + back] / counts
            if since:
                for place, name in enumerate(self.signals):
                    out[f"teacache/{name}"][step] = changes[step][place], sizes[step - 1][place]
                ratio, square, cosine = magnitudes[step]
                out["magnitude"][step] = ratio, np.sqrt(max(square - ratio**2, 0)), 1 - cosine
            for places, _ in self._deltas:
                _place_gram(out["delta/gram"][step], places, next(grams), bool(since), self.anatomy)
        return out | {"delta/cosine": _cosine(out["delta/gram"])}

    def _first_block_arrays(self, steps: int) -> dict[str, np.ndarray]:
        if not self._histories:
            return {}
        depth = max(history.lags for history in self._histories.values())
        size = np.full((steps, len(self._histories)), np.nan)
        change = np.full((*size.shape, depth), np.nan)
        found_rows = iter(self._ranks.means(fetched([row for rows in self._first_blocks.values() for row in rows])))
        for step, rows in self._first_blocks.items():
            for place in range(len(rows)):
                found = next(found_rows)
                size[step, place], change[step, place, : len(found) - 1] = found[0], found[1:]
        return {"first_block/size": size, "first_block/change": change}

    def _steps_compared(self) -> Iterator[tuple[int, int]]:
        """Yield each step that was seen, and how many steps without a gap lie before it: none compares across one."""
        before, since = -2, 0
        for step in self._tables["sites"]:
            since = since + 1 if step == before + 1 else 0
            before = step
            yield step, since

    def _clear_step(self) -> None:
        self.modulated = None
        self.time = {}
        self._entered, self._residual, self._body = {}, [], []
        self._middles.clear()

    def _rings(self) -> Iterator[Ring]:
        if self._sites is not None:
            yield self._sites
        yield from (ring for _, ring in self._deltas)

    def _set_up(self) -> None:
        """Make the rings, or take those of the run before, and write the first step into them."""
        sites = [self._first_sites[place] for place in range(len(self.anatomy.sites))]
        deltas = [self._first_deltas[index] for index in range(len(self.anatomy.blocks))]
        self.site_shapes = [tuple(self.together(tensors).shape[1:]) for tensors in sites]
        if self._sites is None or not self._sites.fits(sites, self.parts):
            self._sites = SiteRing(sites, self.parts, self.lags + 1)
            by_size: dict[tuple[int, ...], list[int]] = {}
            for index, tensors in enumerate(deltas):
                by_size.setdefault(tuple(tensor.numel() for tensor in tensors), []).append(index)
            self._deltas = [(same, DeltaRing([deltas[i] for i in same])) for same in by_size.values()]
            self._delta_of = {i: (ring, k) for same, ring in self._deltas for k, i in enumerate(same)}
        for ring in self._rings():
            ring.restart()
        for place, tensors in enumerate(sites):
            self._sites.write(place, tensors)
        for index, tensors in enumerate(deltas):
            ring, place = self._delta_of[index]
            ring.write(place, tensors)
        self._first_sites, self._first_deltas = {}, {}
        self._ready = True


def _mean(tensors: Tensorlist) -> Tensor:
    """Return the mean over all elements of all tensors."""
    if len(tensors) == 1:
        return tensors[0].mean(dtype=torch.float32)
    return torch.stack([x.sum(dtype=torch.float32) for x in tensors]).sum() / sum(x.numel() for x in tensors)


def _magnitude(now: Tensorlist, before: Tensorlist) -> Tensor:
    """Return the mean and the mean square, over tokens, of the ratio of the norms of two steps, and the mean of their
    cosine, (3,)."""
    x, y = (
        torch.cat([t.flatten(0, -2).float() for t in tensors])
        if len(tensors) > 1
        else tensors[0].flatten(0, -2).float()
        for tensors in (now, before)
    )
    one, two, cross = (x * x).sum(-1), (y * y).sum(-1), (x * y).sum(-1)
    ratio2 = (one / two).to(wide(x.device))
    return torch.stack([ratio2.sqrt(), ratio2, cross / (one * two).sqrt()]).mean(dim=1)


def _place_gram(table: np.ndarray, places: list[int], gram: np.ndarray, compared: bool, anatomy: Anatomy) -> None:
    """Write the products of blocks of equal size where they belong, for blocks of one segment.

    Args:
        table: (2 blocks, 2 blocks), written to: this step's deltas first, then those of the step before.
        places: The blocks.
        gram: Products of their deltas and of the changes of their deltas, (2 places, 2 places).
        compared: Whether there was a step before.
        anatomy: The model's.
    """
    half, blocks = len(places), len(anatomy.blocks)
    now, change = slice(0, half), slice(half, 2 * half)
    cross = gram[now, now] - gram[now, change]  # <now, before>
    before = gram[now, now] - gram[now, change] - gram[change, now] + gram[change, change]
    segments = np.array([anatomy.segment(place)[0] for place in places])
    same = segments[:, None] == segments[None, :]
    rows = np.array(places)
    quarters = [(0, 0, gram[now, now])]
    if compared:
        quarters += [(0, blocks, cross), (blocks, 0, cross.T), (blocks, blocks, before)]
    for down, right, values in quarters:
        table[np.ix_(rows + down, rows + right)] = np.where(same, values, np.nan)


def _cosine(gram: np.ndarray) -> np.ndarray:
    """Return the cosine of each block's delta with that of the step before, (steps, blocks), from the products."""
    blocks = gram.shape[-1] // 2
    square = np.diagonal(gram, axis1=-2, axis2=-1)
    cross = np.diagonal(gram[:, :blocks, blocks:], axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(cross / np.sqrt(square[:, :blocks] * square[:, blocks:]))
