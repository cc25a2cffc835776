"""The latest few outputs of a fixed set of tensors, and sums over them in few operations.

A profile compares each site's output with those of the steps before. One buffer for all sites makes the number of
operations a step independent of the number of sites: what counts on a small model, where each operation costs more to
start than to run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers in a row. Sums are taken in float32 within a row and in float64 over rows. It is also the number of buckets
# of the sketch: a prime, so that one channel of many tokens falls into many buckets, however wide the model is; and a
# little above a power of 2, so that little is lost to padding.
ROW = 1031
CHUNK = 4_000_000  # numbers that are looked at together
SIGNS = 20240611  # seed of the sketch's signs


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
        by_rows: dict[int, list[int]] = {}
        for place, sizes in enumerate(self.sizes):
            by_rows.setdefault(-(-sum(sizes) // (parts * ROW)), []).append(place)
        self._regions = [
            _Region(places, torch.zeros(depth, len(places), parts, rows, ROW, dtype=dtype, device=first.device))
            for rows, places in by_rows.items()
        ]
        self._views = [self._destinations(slot) for slot in range(depth)]
        largest = max(part.shape[1:].numel() for _, part in self._chunks())
        products = 2 * len(groups) * ROW  # room for `gram`
        rows = max(1, min(max(by_rows) * parts, CHUNK // products))
        self._scratch = torch.empty(max(largest, rows * products if depth == 2 else 0), device=first.device)
        order = torch.tensor([place for region in self._regions for place in region.places])
        self._order = order.argsort().to(first.device) if len(self._regions) > 1 else None
        self._signs: list[Tensor] = []

    @property
    def bytes(self) -> int:
        """Memory held."""
        held = [region.buffer for region in self._regions] + self._signs + [self._scratch]
        return sum(tensor.nbytes for tensor in held)

    def fits(self, groups: Sequence[Sequence[Tensor]], parts: int) -> bool:
        """Whether the ring was made for tensors of these sizes."""
        return parts == self.parts and self.sizes == [[tensor.numel() for tensor in group] for group in groups]

    def advance(self) -> None:
        """Begin a step: what is written now takes the place of the oldest."""
        self.slot = (self.slot + 1) % self.depth

    def restart(self) -> None:
        """Begin a run. The order in memory, and with it the rounding of sums, is then the same in every run."""
        self.slot = self.depth - 1

    def write(self, place: int, tensors: Sequence[Tensor]) -> None:
        """Write one group in the step that runs."""
        views = self._views[self.slot][place]
        if len(tensors) == 1:  # the usual case, many times a step
            views[0].copy_(tensors[0].reshape(self.parts, -1))
            return
        for view, tensor in zip(views, tensors, strict=True):
            view.copy_(tensor.reshape(self.parts, -1))

    def write_change(self, place: int, after: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Write the difference of two groups in the step that runs."""
        for view, one, two in zip(self._views[self.slot][place], after, before, strict=True):
            torch.sub(one.reshape(self.parts, -1), two.reshape(self.parts, -1), out=view)

    def sums(self) -> Tensor:
        """Return the sums of this step's groups and of what they have in common with the steps before.

        Returns:
            (groups, 2 depth) in float64: the sum of |x|, the products <x, x>, <x, x of 1 step before>, ..., and then
            the sums |x - x of 1 step before|, ... Of steps that were not written it says nothing.
        """
        slots = [(self.slot - lag) % self.depth for lag in range(self.depth)]
        found = []
        for _, part in self._chunks():
            depth, groups, parts, rows, _ = part.shape
            whole = part.float().view(depth, groups, parts * rows, ROW)
            now, scratch = whole[self.slot], self._scratch[: whole[0].numel()].view(whole.shape[1:])
            columns = [torch.abs(now, out=scratch).sum(-1)]
            products = torch.einsum("grx,dgrx->dgr", now, whole)
            columns += [products[slot] for slot in slots]
            columns += [torch.sub(now, whole[slot], out=scratch).abs_().sum(-1) for slot in slots[1:]]
            found.append(torch.stack(columns).to(wide(self._device)).sum(-1).T)  # (groups, 2 depth)
        return self._in_order(found)

    def sketch(self) -> Tensor:
        """Return a random projection of each part of this step's groups, (groups, parts, ROW).

        Its products estimate those of the outputs without bias, with a relative standard deviation of about
        sqrt(2 / ROW) for outputs without dominant elements. The signs are the same for every part and every ring whose
        groups have these sizes.

        References:
            Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", 2002, with consecutive buckets.
        """
        if not self._signs:
            generator = torch.Generator().manual_seed(SIGNS)
            for region in self._regions:
                shape = (len(region.places), 1, *region.buffer.shape[3:])
                signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1
                self._signs.append(signs.to(self._device))
        found = []
        for (index, groups), part in self._chunks():
            now = part[self.slot].float()
            scratch = self._scratch[: now.numel()].view(now.shape)
            found.append(torch.mul(now, self._signs[index][groups], out=scratch).sum(2))
        return self._in_order(found)

    def gram(self) -> Tensor:
        """Return the products of this step's groups and of the changes since the step before, each with each.

        Returns:
            (2 groups, 2 groups) in float64, this step's groups first. The changes are taken before they are multiplied:
            neighbouring steps are so alike that the difference of two products would have no digits left.
        """
        if len(self._regions) > 1:
            raise ValueError("groups of different sizes have no products with one another")
        buffer = self._regions[0].buffer.flatten(2)  # (depth, groups, parts * rows * ROW)
        groups, size = buffer.shape[1:]
        span = self._scratch.numel() // (2 * groups * ROW) * ROW
        wanted = wide(self._device)
        gram = torch.zeros(2 * groups, 2 * groups, dtype=wanted, device=self._device)
        for start in range(0, size, span):
            now, before = (buffer[(self.slot - lag) % self.depth, :, start : start + span] for lag in (0, 1))
            both = self._scratch[: 2 * now.numel()].view(2, *now.shape)
            both[0] = now
            torch.sub(both[0], before, out=both[1])
            rows = both.view(2 * groups, -1, ROW).transpose(0, 1)  # (rows, 2 groups, ROW)
            gram += torch.bmm(rows, rows.transpose(1, 2)).to(wanted).sum(0)
        return gram

    def _in_order(self, found: list[Tensor]) -> Tensor:
        """Put what was found chunk by chunk together, in the order of the groups."""
        whole = found[0] if len(found) == 1 else torch.cat(found)
        return whole if self._order is None else whole[self._order]

    def _destinations(self, slot: int) -> list[list[Tensor]]:
        views: list[list[Tensor]] = [[] for _ in self.sizes]
        for region in self._regions:
            for index, place in enumerate(region.places):
                flat = region.buffer[slot, index].flatten(1)  # (parts, rows * ROW)
                start = 0
                for size in self.sizes[place]:
                    length = size // self.parts
                    views[place].append(flat[:, start : start + length])
                    start += length
        return views

    def _chunks(self) -> Iterator[tuple[tuple[int, slice], Tensor]]:
        """Yield the buffers in slices of whole groups, with the number of the region and the slice."""
        for index, region in enumerate(self._regions):
            step = max(1, CHUNK // region.buffer[0, 0].numel())
            for start in range(0, len(region.places), step):
                groups = slice(start, start + step)
                yield (index, groups), region.buffer[:, groups]


def wide(device: torch.device) -> torch.dtype:
    """Return the widest float that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64
