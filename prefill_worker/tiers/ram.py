"""Blocks in memory. A block lives on while a transfer or a background write refers to it, whatever this tier drops."""

from __future__ import annotations

from collections.abc import Callable

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.block_file import BlockHead
from prefill_worker.tiers.ledger import Ledger
from prefill_worker.tiers.meter import TierMeter
from shared.internal.v1.common_pb2 import SHIP_SOURCE_RAM


def _let_go(block: StoredBlock) -> None:
    """Nobody wants what is evicted."""


class RamTier:
    """The tier of memory. What its coroutines do is done at once, and there under a name ending in `_now`.

    Args:
        ledger: Its books, in bytes of extents.
        on_evicted: Given each block that went to make room.
    """

    name = "ram"
    source = SHIP_SOURCE_RAM

    def __init__(self, ledger: Ledger, on_evicted: Callable[[StoredBlock], None] = _let_go) -> None:
        self.ledger = ledger
        self.meter = TierMeter()
        self.on_evicted = on_evicted
        self._blocks: dict[bytes, StoredBlock] = {}

    def get_now(self, key: bytes) -> StoredBlock | None:
        """A block, counted as used; a miss is counted too."""
        block = self._blocks.get(key)
        if block is None:
            self.meter.misses += 1
            return None
        self.ledger.used(key)
        self.meter.hits += 1
        self.meter.read_bytes += block.bytes
        return block

    def peek(self, key: bytes) -> StoredBlock | None:
        """A block; nothing is counted."""
        return self._blocks.get(key)

    def put_now(self, block: StoredBlock, *, pinned: bool) -> bool:
        """Keeps a block unless it cannot fit. Of two with one key the first stays: transfers of it may be under way."""
        if block.key in self._blocks:
            return True
        victims = self.ledger.admit(
            block.key, tokens=len(block.token_ids), bytes_=block.bytes, tenant=block.tenant, pinned=pinned
        )
        if victims is None:
            return False
        gone = [self._blocks.pop(victim.key) for victim in victims]
        self._blocks[block.key] = block
        self.meter.written_bytes += block.bytes
        self.meter.evictions += len(gone)
        for one in gone:
            self.on_evicted(one)
        return True

    def delete_now(self, key: bytes) -> int:
        """Drops a block; bytes freed."""
        self.ledger.remove(key)
        block = self._blocks.pop(key, None)
        return 0 if block is None else block.bytes

    async def open(self) -> None:
        """Memory is empty at first."""

    async def close(self) -> None:
        """Drops everything."""
        for key in list(self._blocks):
            self.delete_now(key)

    async def holds(self, key: bytes) -> bool:
        """Whether it is in memory."""
        return key in self._blocks

    def pays(self, tokens: int) -> bool:
        """Always: nothing is read."""
        del tokens
        return True

    async def read(self, key: bytes) -> StoredBlock | None:
        """As `get_now`."""
        return self.get_now(key)

    async def head(self, key: bytes) -> BlockHead | None:
        """A block's tokens and tenant."""
        block = self._blocks.get(key)
        return None if block is None else BlockHead(key, block.token_ids, block.tenant, block.birth)

    async def write(self, block: StoredBlock, *, pinned: bool) -> bool:
        """As `put_now`."""
        return self.put_now(block, pinned=pinned)

    async def delete(self, key: bytes) -> int:
        """As `delete_now`."""
        return self.delete_now(key)

    async def sweep(self) -> None:
        """Drops what has expired; lower tiers have it, or have dropped it by their own rules."""
        for entry in self.ledger.expired():
            del self._blocks[entry.key]
            self.meter.expirations += 1
