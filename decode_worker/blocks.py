"""Resident blocks: found by key, pinned while used, evicted least recently used first."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass

from decode_worker.arena import Arena, Extent


@dataclass(slots=True, eq=False)
class Block:
    """A resident block. `pins` counts running requests that use it; only `Pin` changes it.

    Attributes:
        held: Kept from eviction by an operator.
        transient: Freed by its last pin: a FULL block that nobody asked to store.
    """

    key: bytes
    extent: Extent
    pins: int = 0
    held: bool = False
    hits: int = 0
    last_used: float = 0.0
    transient: bool = False
    dropped: bool = False


class Pin:
    """One request's hold on a block; closing it twice is harmless."""

    def __init__(self, table: BlockTable, block: Block) -> None:
        self._table: BlockTable | None = table
        self.block = block
        block.pins += 1
        block.hits += 1

    def close(self) -> None:
        """Ends the hold."""
        table, self._table = self._table, None
        if table is not None:
            table.unpinned(self.block)


class BlockTable:
    """Owns the extents of all resident blocks of an arena."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        # Least recently used first; a use moves a block to the end.
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        # Dropped while in use: not found by key any more, freed by their last pin.
        self._dropped: list[Block] = []
        self.evictions = 0
        self.changes = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def all(self) -> list[Block]:
        """Every block that can be found by key."""
        return list(self._blocks.values())

    def pin(self, key: bytes) -> Pin | None:
        """Holds a resident block; None when it is not resident."""
        block = self._blocks.get(key)
        if block is None:
            return None
        block.last_used = time.monotonic()
        self._blocks.move_to_end(key)
        return Pin(self, block)

    def add(self, key: bytes, extent: Extent, *, store: bool) -> Block:
        """Makes a filled extent resident; the table owns it from here. Without `store` its last pin frees it."""
        block = Block(key, extent, last_used=time.monotonic(), transient=not store)
        self._blocks[key] = block
        self.changes += 1
        return block

    def unpinned(self, block: Block) -> None:
        """A pin has ended."""
        block.pins -= 1
        self.changes += 1
        if block.pins:
            return
        if block.dropped:
            self._dropped.remove(block)
            self._arena.free(block.extent)
        elif block.transient and not block.held:
            del self._blocks[block.key]
            self._arena.free(block.extent)

    def evict_one(self) -> bool:
        """Frees the least recently used block that nobody uses or holds; False when there is none."""
        for key, block in self._blocks.items():
            if block.pins == 0 and not block.held:
                del self._blocks[key]
                self._arena.free(block.extent)
                self.evictions += 1
                return True
        return False

    def drop(self, key: bytes) -> int | None:
        """Removes a block by name; bytes freed at once, or None when it is not resident."""
        block = self._blocks.pop(key, None)
        if block is None:
            return None
        block.dropped = True
        if block.pins:
            self._dropped.append(block)
            return 0
        self._arena.free(block.extent)
        return block.extent.records * self._arena.shape.record_bytes

    @property
    def pinned_records(self) -> int:
        """Records of blocks in use."""
        return sum(block.extent.records for block in self._every() if block.pins)

    @property
    def pins(self) -> int:
        """Pins in all."""
        return sum(block.pins for block in self._every())

    def evictable_records(self, beside: Container[bytes] = ()) -> int:
        """Records that eviction could free now, those of the blocks `beside` left out."""
        idle = (block for block in self._blocks.values() if not block.pins and not block.held)
        return sum(block.extent.records for block in idle if block.key not in beside)

    def extents(self) -> list[Extent]:
        """Every extent the table owns."""
        return [block.extent for block in self._every()]

    def _every(self) -> list[Block]:
        return [*self._blocks.values(), *self._dropped]
