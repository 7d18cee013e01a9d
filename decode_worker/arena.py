"""The worker's KV memory: one tensor, handed out in contiguous extents that can be moved.

    records [capacity, 2 * kv_heads * head_dim]            one record = one token of one layer
    ┌──────────────┬─────┬───────────────────┬──────── free ────────┬──────────┬──────────┐
    │ block extent │free │ block extent      │                      │ tail seg.│ tail seg.│
    │ L x n        │     │ L x m             │                      │ L x S    │ L x S    │
    └──────────────┴─────┴───────────────────┴──────────────────────┴──────────┴──────────┘
      blocks from the low end                                  tails from the high end

An extent of n tokens is `layers * n` adjacent records and is viewed as
`[layers, n, 2, kv_heads, head_dim]` without a copy. The arena knows nothing of keys or users:
whoever holds an `Extent` owns it and frees it once. An `Extent` is a handle: `make_room` may move what it
stands for, so an address is read from it anew for each step and each chunk, and never kept.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch

from shared.kv.layout import KvShape

# Records copied at once when an extent slides over itself: bounds the scratch copy.
_MOVE_RECORDS = 1 << 14


@dataclass(slots=True, eq=False)
class Extent:
    """A run of records: `[start, start + records)`. Only the arena changes `start`."""

    start: int
    records: int
    tokens: int

    @property
    def end(self) -> int:
        """First record behind it."""
        return self.start + self.records


class Arena:
    """First-fit allocator over one tensor.

    Args:
        shape: Shape of one token's KV.
        capacity_bytes: Budget; rounded down to whole records.
        device: torch device of the tensor.

    Attributes:
        frees: Extents given back since the start.
        moved_bytes: Bytes moved by `make_room` since the start.
    """

    def __init__(self, shape: KvShape, capacity_bytes: int, device: torch.device) -> None:
        self.shape = shape
        self.capacity_records = capacity_bytes // shape.record_bytes
        # Not zeroed: pages that are never written cost nothing, and nothing reads a record before it is written.
        self.records = torch.empty(
            self.capacity_records, shape.record_elements, dtype=getattr(torch, shape.dtype), device=device
        )
        self.frees = self.moved_bytes = 0
        # Extents handed out, by rising address.
        self._extents: list[Extent] = []
        # What lies between them: free runs, by rising address, never empty, never adjacent.
        self._starts: list[int] = [0] if self.capacity_records else []
        self._lengths: list[int] = [self.capacity_records] if self.capacity_records else []

    @property
    def free_records(self) -> int:
        """Records that no extent holds."""
        return sum(self._lengths)

    @property
    def used_bytes(self) -> int:
        """Bytes that extents hold."""
        return (self.capacity_records - self.free_records) * self.shape.record_bytes

    @property
    def capacity_bytes(self) -> int:
        """Bytes in all."""
        return self.capacity_records * self.shape.record_bytes

    @property
    def longest_free_records(self) -> int:
        """Records of the longest free run: what can be allocated without moving anything."""
        return max(self._lengths, default=0)

    def allocate(self, tokens: int, *, high: bool = False) -> Extent | None:
        """An extent for `tokens` tokens, from the low end or the high one; None when no run is long enough."""
        records = self.shape.extent_records(tokens)
        order = range(len(self._lengths) - 1, -1, -1) if high else range(len(self._lengths))
        index = next((i for i in order if self._lengths[i] >= records), None)
        if index is None:
            return None
        start, length = self._starts[index], self._lengths[index]
        extent = Extent(start + length - records if high else start, records, tokens)
        if length == records:
            del self._starts[index], self._lengths[index]
        else:
            self._starts[index] += 0 if high else records
            self._lengths[index] -= records
        bisect.insort(self._extents, extent, key=_start)
        return extent

    def free(self, extent: Extent) -> None:
        """Takes an extent back and joins it with its free neighbours; one that is not handed out is a ValueError."""
        at = bisect.bisect_left(self._extents, extent.start, key=_start)
        if at == len(self._extents) or self._extents[at] is not extent:
            raise ValueError(f"extent {extent} is not handed out")
        del self._extents[at]
        self.frees += 1
        index = bisect.bisect_left(self._starts, extent.start)
        self._starts.insert(index, extent.start)
        self._lengths.insert(index, extent.records)
        for left in (index, index - 1):
            if 0 <= left < len(self._starts) - 1 and self._starts[left] + self._lengths[left] == self._starts[left + 1]:
                self._lengths[left] += self._lengths.pop(left + 1)
                del self._starts[left + 1]

    def make_room(self, tokens: int) -> bool:
        """Moves extents together until a run for `tokens` tokens is free; False when bytes do not suffice.

        Of all stretches whose free runs add up, the one with the fewest records to move is closed up. Nothing may
        read or write KV meanwhile: addresses change.
        """
        wanted = self.shape.extent_records(tokens)
        best: tuple[int, int, int] | None = None  # records to move, first gap, last gap
        first = total = 0
        for last, length in enumerate(self._lengths):
            total += length
            while total - self._lengths[first] >= wanted:
                total -= self._lengths[first]
                first += 1
            if total >= wanted:
                cost = self._starts[last] + length - self._starts[first] - total
                best = min(best or (cost, first, last), (cost, first, last))
        if best is None:
            return False
        _, first, last = best
        target, limit = self._starts[first], self._starts[last]
        for extent in self._extents[bisect.bisect_left(self._extents, target, key=_start) :]:
            if extent.start > limit:
                break
            self._move(extent, target)
            target = extent.end
        end = limit + self._lengths[last]
        self._starts[first : last + 1] = [target]
        self._lengths[first : last + 1] = [end - target]
        return True

    def view(self, extent: Extent) -> torch.Tensor:
        """The extent as [layers, tokens, 2, kv_heads, head_dim], sharing the arena's memory."""
        shape = self.shape
        rows = self.records[extent.start : extent.end]
        return rows.view(shape.layers, extent.tokens, 2, shape.kv_heads, shape.head_dim)

    def bytes_of(self, extent: Extent) -> torch.Tensor:
        """The extent as uint8 [bytes], sharing the arena's memory."""
        return self.records[extent.start : extent.end].view(torch.uint8).view(-1)

    def check_integrity(self, held: list[Extent]) -> None:
        """Raises AssertionError unless `held` is what was handed out, in place and without overlap."""
        if sorted(map(id, held)) != sorted(map(id, self._extents)):
            raise AssertionError(f"{len(self._extents)} extents are handed out, and {len(held)} are held")
        runs = sorted([(e.start, e.records) for e in held] + list(zip(self._starts, self._lengths, strict=True)))
        position = 0
        for start, length in runs:
            if start != position or length <= 0:
                raise AssertionError(f"arena does not tile: run at {start} where {position} was expected")
            position = start + length
        if position != self.capacity_records:
            raise AssertionError(f"arena does not tile: ends at {position} of {self.capacity_records}")

    def _move(self, extent: Extent, target: int) -> None:
        """Slides an extent down, by way of a scratch copy: source and target may overlap."""
        if extent.start == target:
            return
        for done in range(0, extent.records, _MOVE_RECORDS):
            count = min(_MOVE_RECORDS, extent.records - done)
            piece = self.records[extent.start + done : extent.start + done + count].clone()
            self.records[target + done : target + done + count] = piece
        self.moved_bytes += extent.records * self.shape.record_bytes
        extent.start = target


def _start(extent: Extent) -> int:
    return extent.start
