"""The latest few outputs of a fixed set of tensors, and sums over them in few operations.

A profile compares each site's output with those of the steps before. One buffer holds all sites, and is summed as soon
as a good piece of it is written: in small models many sites together, since each operation costs more to start than to
run, and in large ones each site while it is still in the processor's cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Numbers in a row. Sums are taken in float32 within a row and in float64 over rows. It is also the number of buckets
# of the sketch: a prime, so that one channel of many tokens falls into many buckets, however wide the model is; and a
# little above a power of 2, so that little is lost to padding.
ROW = 1031
CHUNK = 4_000_000  # numbers that are looked at together on a device that starts its operations ahead
CACHED = 1 << 20  # on a CPU: four megabytes of float32, which stay in its cache from one operation to the next
SIGNS = 20240611  # seed of the sketch's signs


def together(device: torch.device) -> int:
    """Return how many numbers are best looked at together."""
    return CACHED if device.type == "cpu" else CHUNK


@dataclass
class _Region:
    """Groups of tensors that fill equally many rows: `buffer` is (depth, groups, parts, rows, ROW)."""

    places: list[int]
    buffer: Tensor


class Ring:
    """Keeps groups of tensors over the latest steps.

    A group is what one site gives, or all streams of one block. Its tensors have the batch first; the batch is cut
    into `parts` of equal size, such as the guided and the unguided half.

    Args:
        groups: The tensors of each group, as they were in the first step: later ones have the same numbers of elements.
        parts: Of the batch.
        depth: How many steps are kept, that which runs included.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], parts: int, depth: int) -> None:
        self.parts, self.depth, self.slot = parts, depth, 0
        self.sizes = [[tensor.numel() for tensor in group] for group in groups]
        first = groups[0][0]
        dtype = first.dtype
        for tensor in (tensor for group in groups for tensor in group):
            dtype = torch.promote_types(dtype, tensor.dtype)
        self._device = first.device
        self._together = together(self._device)
        by_rows: dict[int, list[int]] = {}
        for place, sizes in enumerate(self.sizes):
            by_rows.setdefault(-(-sum(sizes) // (parts * ROW)), []).append(place)
        self._regions = [
            _Region(places, torch.zeros(depth, len(places), parts, rows, ROW, dtype=dtype, device=first.device))
            for rows, places in by_rows.items()
        ]
        self._views = [self._destinations([region.buffer[slot] for region in self._regions]) for slot in range(depth)]

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(tensor.nbytes for tensor in self._held())

    def fits(self, groups: Sequence[Sequence[Tensor]], parts: int) -> bool:
        """Whether the ring was made for tensors of these sizes."""
        return parts == self.parts and self.sizes == [[tensor.numel() for tensor in group] for group in groups]

    def advance(self) -> None:
        """Begin a step: what is written now takes the place of the oldest."""
        self.slot = (self.slot + 1) % self.depth

    def restart(self) -> None:
        """Begin a run. The order in memory, and with it the rounding of sums, is then the same in every run."""
        self.slot = self.depth - 1

    def _held(self) -> list[Tensor]:
        return [region.buffer for region in self._regions]

    def _slot_before(self, lag: int) -> int:
        return (self.slot - lag) % self.depth

    def _destinations(self, buffers: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return where the tensors of each group go, (parts, elements of a part), in buffers like those of a step."""
        views: list[list[Tensor]] = [[] for _ in self.sizes]
        for region, buffer in zip(self._regions, buffers, strict=True):
            for place, group in zip(region.places, buffer, strict=True):
                flat = group.flatten(1)  # (parts, rows * ROW)
                start = 0
                for size in self.sizes[place]:
                    length = size // self.parts
                    views[place].append(flat[:, start : start + length])
                    start += length
        return views


class _Piece:
    """Rows of neighbouring groups in one step, and where their sums go.

    Args:
        steps: (depth, rows, ROW), in the order of memory.
        slot: Of the step.
        absolute: Sums of |x|, then of |x - x of 1 step before|, ...: (depth, rows).
        products: (rows, 1, depth), in the order of memory.
    """

    def __init__(self, steps: Tensor, slot: int, absolute: Tensor, products: Tensor) -> None:
        self._steps, self._slot, self._sums = steps, slot, (absolute, products)
        # Views are made once: in small models one takes as long as the sum that it is for.
        depth = len(steps)
        self._now = steps[slot]
        self._before = [steps[(slot - lag) % depth] for lag in range(1, depth)]
        self._row, self._columns = self._now[:, None], steps.permute(1, 2, 0)
        self._size, *self._apart = absolute
        self._products = products

    def take(self, scratch: Tensor) -> None:
        """Take the sums.

        Args:
            scratch: At least as many rows, in float32.
        """
        now, room = self._now, scratch[: len(self._now)]
        if now.dtype != room.dtype:
            _Piece(self._steps.float(), self._slot, *self._sums).take(scratch)
            return
        torch.sum(torch.abs(now, out=room), -1, out=self._size)
        for before, apart in zip(self._before, self._apart, strict=True):
            torch.sum(torch.sub(now, before, out=room).abs_(), -1, out=apart)
        torch.bmm(self._row, self._columns, out=self._products)


@dataclass
class _Unit:
    """Neighbouring groups whose sums are taken together, when all of them are written.

    Attributes:
        groups: How many.
        missing: Those that are not written yet in the step that runs.
        pieces: By slot.
        whole: Their numbers by slot, (groups, parts, rows, ROW).
        sketch: (groups, parts, ROW).
    """

    groups: int
    missing: int
    pieces: list[list[_Piece]]
    whole: list[Tensor]
    sketch: Tensor


class SiteRing(Ring):
    """Keeps what the sites give, and takes sums as it is written.

    The numbers are kept with the signs of the sketch, which are the same in all steps: no other sum depends on them.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], parts: int, depth: int) -> None:
        super().__init__(groups, parts, depth)
        generator = torch.Generator().manual_seed(SIGNS)
        shapes = [(len(region.places), 1, *region.buffer.shape[3:]) for region in self._regions]
        bits = [torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) for shape in shapes]
        self._signs = [(2 * each - 1).to(region.buffer) for each, region in zip(bits, self._regions, strict=True)]
        self._sign_views = self._destinations([signs.expand(-1, parts, -1, -1) for signs in self._signs])
        order = torch.tensor([place for region in self._regions for place in region.places])
        self._order = order.argsort().to(self._device) if len(self._regions) > 1 else None
        rows = [region.buffer[0].numel() // ROW for region in self._regions]
        self._absolute = [torch.zeros(depth, each, device=self._device) for each in rows]
        self._products = [torch.zeros(each, 1, depth, device=self._device) for each in rows]
        self._sketches = [torch.zeros(*region.buffer.shape[1:3], ROW, device=self._device) for region in self._regions]
        together = max(1, self._together // ROW)  # rows
        self._scratch = torch.empty(min(max(rows), together), ROW, device=self._device)
        self._unit_of: dict[int, _Unit] = {}
        self._units: list[_Unit] = []
        for number, region in enumerate(self._regions):
            step = max(1, together * ROW // region.buffer[0, 0].numel())
            for start in range(0, len(region.places), step):
                unit = self._unit(number, start, min(start + step, len(region.places)), together)
                self._units.append(unit)
                self._unit_of |= dict.fromkeys(region.places[start : start + step], unit)

    def write(self, place: int, tensors: Sequence[Tensor]) -> None:
        """Write one group in the step that runs."""
        for view, sign, tensor in zip(self._views[self.slot][place], self._sign_views[place], tensors, strict=True):
            torch.mul(tensor.reshape(self.parts, -1), sign, out=view)
        unit = self._unit_of[place]
        unit.missing -= 1
        if not unit.missing:
            self._take(unit)

    def sums(self) -> Tensor:
        """Return the sums of this step's groups and of what they have in common with the steps before.

        Returns:
            (groups, 2 depth) in float64: the sum of |x|, the products <x, x>, <x, x of 1 step before>, ..., and then
            the sums |x - x of 1 step before|, ... Of steps that were not written it says nothing.
        """
        self._finish()
        slots = [self._slot_before(lag) for lag in range(self.depth)]
        found = []
        for region, absolute, products in zip(self._regions, self._absolute, self._products, strict=True):
            groups = len(region.places)
            size, *apart = absolute.to(wide(self._device)).view(self.depth, groups, -1).sum(-1)
            by_slot = products.to(wide(self._device)).view(groups, -1, self.depth).sum(1)
            found.append(torch.stack([size, *(by_slot[:, slot] for slot in slots), *apart], dim=1))
        return self._in_order(found)

    def sketch(self) -> Tensor:
        """Return a random projection of each part of this step's groups, (groups, parts, ROW).

        Its products estimate those of the outputs without bias, with a relative standard deviation of about
        sqrt(2 / ROW) for outputs without dominant elements. The signs are the same for every part and every ring whose
        groups have these sizes.

        References:
            Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", 2002, with consecutive buckets.
        """
        self._finish()
        return self._in_order([sketch.clone() for sketch in self._sketches])

    def _finish(self) -> None:
        """Take the sums of what was not written once in this step: not at all, or again after its sums were taken."""
        for unit in self._units:
            if unit.missing not in (0, unit.groups):
                self._take(unit)
            unit.missing = unit.groups

    def _take(self, unit: _Unit) -> None:
        """Take the sums of neighbouring groups."""
        for piece in unit.pieces[self.slot]:
            piece.take(self._scratch)
        torch.sum(unit.whole[self.slot], 2, dtype=torch.float32, out=unit.sketch)

    def _unit(self, number: int, start: int, stop: int, together: int) -> _Unit:
        buffer = self._regions[number].buffer
        rows = buffer.shape[2] * buffer.shape[3]
        steps, absolute, products = buffer.view(self.depth, -1, ROW), self._absolute[number], self._products[number]
        spans = [slice(a, min(a + together, stop * rows)) for a in range(start * rows, stop * rows, together)]
        return _Unit(
            stop - start,
            stop - start,
            [
                [_Piece(steps[:, span], slot, absolute[:, span], products[span]) for span in spans]
                for slot in range(self.depth)
            ],
            [buffer[slot, start:stop] for slot in range(self.depth)],
            self._sketches[number][start:stop],
        )

    def _held(self) -> list[Tensor]:
        own = [*self._signs, *self._absolute, *self._products, *self._sketches, self._scratch]
        return [*super()._held(), *own]

    def _in_order(self, found: list[Tensor]) -> Tensor:
        """Put what was found region by region together, in the order of the groups."""
        whole = found[0] if len(found) == 1 else torch.cat(found)
        return whole if self._order is None else whole[self._order]


class DeltaRing(Ring):
    """Keeps what blocks of one size add to their streams, in this step and the one before.

    Raises:
        ValueError: If the groups are of different sizes: they have no products with one another.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        super().__init__(groups, 1, 2)
        if len(self._regions) > 1:
            raise ValueError("groups of different sizes have no products with one another")
        products = 2 * len(groups) * ROW
        rows = max(1, min(self._regions[0].buffer.shape[3], self._together // products))
        self._scratch = torch.empty(rows * products, device=self._device)

    def write(self, place: int, tensors: Sequence[Tensor]) -> None:
        """Write one group in the step that runs."""
        for view, tensor in zip(self._views[self.slot][place], tensors, strict=True):
            view.copy_(tensor.reshape(1, -1))

    def write_change(self, place: int, after: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Write the difference of two groups in the step that runs."""
        for view, one, two in zip(self._views[self.slot][place], after, before, strict=True):
            torch.sub(one.reshape(1, -1), two.reshape(1, -1), out=view)

    def gram(self) -> Tensor:
        """Return the products of this step's groups and of the changes since the step before, each with each.

        Returns:
            (2 groups, 2 groups) in float64, this step's groups first. The changes are taken before they are multiplied:
            neighbouring steps are so alike that the difference of two products would have no digits left.
        """
        buffer = self._regions[0].buffer.flatten(2)  # (2, groups, rows * ROW)
        groups, size = buffer.shape[1:]
        span = self._scratch.numel() // (2 * groups)
        wanted = wide(self._device)
        gram = torch.zeros(2 * groups, 2 * groups, dtype=wanted, device=self._device)
        for start in range(0, size, span):
            now, before = (buffer[self._slot_before(lag), :, start : start + span] for lag in (0, 1))
            both = self._scratch[: 2 * now.numel()].view(2, *now.shape)
            both[0] = now
            torch.sub(both[0], before, out=both[1])
            rows = both.view(2 * groups, -1, ROW).transpose(0, 1)  # (rows, 2 groups, ROW)
            gram += torch.bmm(rows, rows.transpose(1, 2)).to(wanted).sum(0)
        return gram

    def _held(self) -> list[Tensor]:
        return [*super()._held(), self._scratch]


def fetched(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Return tensors of one device as arrays in float64, waiting for the device once."""
    if not tensors:
        return []
    whole = torch.cat([tensor.flatten().to(wide(tensor.device)) for tensor in tensors]).cpu().double().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])[:-1]
    return [part.reshape(tensor.shape) for part, tensor in zip(np.split(whole, ends), tensors, strict=True)]


def wide(device: torch.device) -> torch.dtype:
    """Return the widest float that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64
