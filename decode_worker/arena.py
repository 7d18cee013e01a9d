"""The worker's KV memory: one tensor, handed out in contiguous extents.

    records [capacity, 2 * kv_heads * head_dim]            one record = one token of one layer
    ┌──────────────┬─────┬───────────────────┬───────────┬──────────┐
    │ block extent │free │ block extent      │ tail seg. │ free     │
    │ L x n        │     │ L x m             │ L x S     │          │
    └──────────────┴─────┴───────────────────┴───────────┴──────────┘

An extent of n tokens is `layers * n` adjacent records and is viewed as
`[layers, n, 2, kv_heads, head_dim]` without a copy. The arena knows nothing of keys or users:
whoever holds an `Extent` owns it and frees it once.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch

from shared.kv.layout import KvShape


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of records: `[start, start + records)`."""

    start: int
    records: int
    tokens: int


class Arena:
    """First-fit allocator over one tensor.

    Args:
        shape: Shape of one token's KV.
        capacity_bytes: Budget; rounded down to whole records.
        device: torch device of the tensor.
    """

    def __init__(self, shape: KvShape, capacity_bytes: int, device: torch.device) -> None:
        self.shape = shape
        self.capacity_records = capacity_bytes // shape.record_bytes
        # Not zeroed: pages that are never written cost nothing, and nothing reads a record before it is written.
        self.records = torch.empty(
            self.capacity_records, shape.record_elements, dtype=getattr(torch, shape.dtype), device=device
        )
        self.frees = 0
        # Free runs, sorted by start, never empty, never adjacent.
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

    def allocate(self, tokens: int) -> Extent | None:
        """An extent for `tokens` tokens, or None when no run is long enough."""
        records = self.shape.extent_records(tokens)
        for index, length in enumerate(self._lengths):
            if length < records:
                continue
            start = self._starts[index]
            if length == records:
                del self._starts[index], self._lengths[index]
            else:
                self._starts[index] += records
                self._lengths[index] -= records
            return Extent(start, records, tokens)
        return None

    def free(self, extent: Extent) -> None:
        """Takes an extent back and joins it with its free neighbours; a double free is a ValueError."""
        self.frees += 1
        index = bisect.bisect_left(self._starts, extent.start)
        end = extent.start + extent.records
        before = index > 0 and self._starts[index - 1] + self._lengths[index - 1]
        if (index > 0 and before > extent.start) or (index < len(self._starts) and self._starts[index] < end):
            raise ValueError(f"extent {extent} is already free")
        self._starts.insert(index, extent.start)
        self._lengths.insert(index, extent.records)
        if index + 1 < len(self._starts) and self._starts[index + 1] == end:
            self._lengths[index] += self._lengths.pop(index + 1)
            del self._starts[index + 1]
        if index > 0 and before == extent.start:
            self._lengths[index - 1] += self._lengths.pop(index)
            del self._starts[index]

    def view(self, extent: Extent) -> torch.Tensor:
        """The extent as [layers, tokens, 2, kv_heads, head_dim], sharing the arena's memory."""
        shape = self.shape
        rows = self.records[extent.start : extent.start + extent.records]
        return rows.view(shape.layers, extent.tokens, 2, shape.kv_heads, shape.head_dim)

    def bytes_of(self, extent: Extent) -> torch.Tensor:
        """The extent as uint8 [bytes], sharing the arena's memory."""
        return self.records[extent.start : extent.start + extent.records].view(torch.uint8).view(-1)

    def check_integrity(self, held: list[Extent]) -> None:
        """Raises AssertionError unless `held` and the free runs tile the arena exactly."""
        runs = sorted([(e.start, e.records) for e in held] + list(zip(self._starts, self._lengths, strict=True)))
        position = 0
        for start, length in runs:
            if start != position or length <= 0:
                raise AssertionError(f"arena does not tile: run at {start} where {position} was expected")
            position = start + length
        if position != self.capacity_records:
            raise AssertionError(f"arena does not tile: ends at {position} of {self.capacity_records}")
