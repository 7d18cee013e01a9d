"""Resident blocks: found by key, pinned while used, evicted in the order of a policy."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from decode_worker.arena import Arena, Extent

if TYPE_CHECKING:
    from decode_worker.eviction import EvictionPolicy

# Entries of ended rests that may lie in the heap before it is made anew.
_STALE_ENTRIES = 64


@dataclass(slots=True, eq=False)
class Block:
    """A resident block, or a sealed segment of a tail. `pins` counts users; only `Pin` changes it.

    Attributes:
        held: Kept from eviction by an operator.
        transient: Freed by its last pin: a FULL block that nobody asked to store, a segment that samples share.
        segment: A segment of a tail.
        tenant: Whose request had it shipped first.
        rank: By which it would be evicted, set when it came to rest.
    """

    key: bytes
    extent: Extent
    pins: int = 0
    held: bool = False
    hits: int = 0
    last_used: float = 0.0
    transient: bool = False
    dropped: bool = False
    segment: bool = False
    tenant: str = ""
    rank: float = 0.0

    @property
    def idle(self) -> bool:
        """Nobody uses or holds it."""
        return not self.pins and not self.held


class Pin:
    """One user's hold on a block; closing it twice is harmless."""

    def __init__(self, table: BlockTable, block: Block) -> None:
        self._table: BlockTable | None = table
        self.block = block
        table.pinned(block)

    def close(self) -> None:
        """Ends the hold."""
        table, self._table = self._table, None
        if table is not None:
            table.unpinned(self.block)

    def again(self) -> Pin:
        """Another hold on the same block."""
        if self._table is None:
            raise ValueError("the pin is closed")
        return Pin(self._table, self.block)


class BlockTable:
    """Owns the extents of all resident blocks of an arena.

    Args:
        arena: Where their KV lies.
        policy: Order of eviction.

    Attributes:
        listeners: Called with each block that cannot be found by key any more.
    """

    def __init__(self, arena: Arena, policy: EvictionPolicy) -> None:
        self._arena = arena
        self._policy = policy
        self._blocks: dict[bytes, Block] = {}
        # Dropped while in use: not found by key any more, freed by their last pin.
        self._dropped: list[Block] = []
        # (rank, tie, block) of every rest; entries whose block has been used since are passed over.
        self._resting: list[tuple[float, int, Block]] = []
        self._rests = 0
        self._idle_records = 0
        self.listeners: list[Callable[[Block], None]] = []
        self.evictions = self.changes = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def all(self) -> list[Block]:
        """Every block and sealed segment that can be found by key."""
        return list(self._blocks.values())

    def find(self, key: bytes) -> Block | None:
        """A resident block, not held."""
        return self._blocks.get(key)

    def pin(self, key: bytes) -> Pin | None:
        """Holds a resident block; None when it is not resident."""
        block = self._blocks.get(key)
        return None if block is None else Pin(self, block)

    def add(self, key: bytes, extent: Extent, *, store: bool, segment: bool = False, tenant: str = "") -> Block:
        """Makes a filled extent resident; the table owns it from here. Without `store` its last pin frees it."""
        block = Block(key, extent, last_used=time.monotonic(), transient=not store, segment=segment, tenant=tenant)
        self._blocks[key] = block
        self._rest(block)
        return block

    def pinned(self, block: Block) -> None:
        """A pin begins."""
        if block.idle:
            self._idle_records -= block.extent.records
        block.pins += 1

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
            self._gone(block)
            self._arena.free(block.extent)
        elif not block.held:
            self._rest(block)

    def rest_again(self, block: Block) -> None:
        """An idle block counts as used just now."""
        self._idle_records -= block.extent.records
        self._rest(block)

    def used(self, block: Block) -> None:
        """An admitted request uses it."""
        block.hits += 1
        block.last_used = time.monotonic()

    def evict_one(self) -> bool:
        """Frees the idle block that the policy ranks lowest; False when there is none."""
        while self._resting:
            rank, _, block = heapq.heappop(self._resting)
            if not self._rests_with(block, rank):
                continue
            self.remove(block)
            self._policy.evicted(block)
            self.evictions += 1
            return True
        return False

    def remove(self, block: Block) -> None:
        """Frees an idle block that can be found by key."""
        del self._blocks[block.key]
        self._idle_records -= block.extent.records
        self._gone(block)
        self._arena.free(block.extent)

    def drop(self, key: bytes) -> int | None:
        """Removes a block by name; bytes freed at once, or None when it is not resident."""
        block = self._blocks.get(key)
        if block is None:
            return None
        self.hold(block, held=False)
        if block.idle:
            self.remove(block)
            return block.extent.records * self._arena.shape.record_bytes
        del self._blocks[key]
        block.dropped = True
        self._dropped.append(block)
        self._gone(block)
        return 0

    def hold(self, block: Block, *, held: bool) -> None:
        """Keeps a block from eviction for an operator, or lets it go again."""
        if block.held == held:
            return
        if block.idle:
            self._idle_records -= block.extent.records
        block.held = held
        if block.idle:
            self._rest(block)

    @property
    def pinned_records(self) -> int:
        """Records of blocks and segments in use."""
        return sum(block.extent.records for block in self._every() if block.pins)

    @property
    def pins(self) -> int:
        """Pins in all."""
        return sum(block.pins for block in self._every())

    def evictable_records(self, beside: Iterable[bytes] = ()) -> int:
        """Records that eviction could free now, those of the blocks `beside` (distinct keys) left out."""
        own = (self._blocks[key] for key in beside if key in self._blocks)
        return self._idle_records - sum(block.extent.records for block in own if block.idle)

    def extents(self) -> list[Extent]:
        """Every extent the table owns."""
        return [block.extent for block in self._every()]

    def check_integrity(self) -> None:
        """Raises AssertionError when the books of idle blocks are wrong."""
        idle = [block for block in self._blocks.values() if block.idle]
        if sum(block.extent.records for block in idle) != self._idle_records:
            raise AssertionError("records of idle blocks do not add up")
        resting = {id(block) for rank, _, block in self._resting if self._rests_with(block, rank)}
        if resting != {id(block) for block in idle}:
            raise AssertionError(f"{len(idle)} blocks are idle, and {len(resting)} could be evicted")

    def _rest(self, block: Block) -> None:
        """A block has come to rest: nobody uses it, and it may be evicted."""
        self.changes += 1
        self._idle_records += block.extent.records
        block.rank = self._policy.rank(block)
        if len(self._resting) > 2 * len(self._blocks) + _STALE_ENTRIES:
            self._resting = [entry for entry in self._resting if self._rests_with(entry[2], entry[0])]
            heapq.heapify(self._resting)
        self._rests += 1
        heapq.heappush(self._resting, (block.rank, self._rests, block))

    def _rests_with(self, block: Block, rank: float) -> bool:
        return block.idle and block.rank == rank and self._blocks.get(block.key) is block

    def _gone(self, block: Block) -> None:
        for listener in self.listeners:
            listener(block)

    def _every(self) -> list[Block]:
        return [*self._blocks.values(), *self._dropped]
