"""Blocks of a few bytes, and a lower tier that does what a test tells it to."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.block_file import BlockHead
from prefill_worker.tiers.ledger import Ledger
from prefill_worker.tiers.meter import TierMeter
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import SHIP_SOURCE_DISK, ShipSource
from shared.kv.birth import make_birth
from shared.kv.layout import KvShape

SHAPE = KvShape(layers=2, kv_heads=1, head_dim=2, dtype="float32")
TOKENS = 2
SIZE = SHAPE.extent_bytes(TOKENS)


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def tiny_block(number: int, tokens: int = TOKENS, shape: KvShape = SHAPE, tenant: str = "") -> StoredBlock:
    """A block of random bytes, born now: another call with the same number is another birth."""
    data = memoryview(random.Random(number).randbytes(shape.extent_bytes(tokens)))
    key = key_of(number)
    return StoredBlock(key, tuple(range(tokens)), data, make_birth(key, shape, tokens, data), tenant)


def cost(tokens: int) -> float:
    """Cost of encoding so many tokens again."""
    return tokens * (3.0 + tokens)


class StrictLedger(Ledger):
    """Books that never let a pinned entry go to make room."""

    def admit(self, key: bytes, **how: object) -> list | None:  # type: ignore[type-arg,override] # passes all on
        victims = super().admit(key, **how)  # type: ignore[arg-type] # likewise
        assert not any(victim.pinned for victim in victims or ())
        return victims


class FakeTier:
    """Keeps blocks in a dict behind real books. Slow while `gate` is closed, failing while `broken`.

    A read has its answer before the gate and gives it after: it may be overtaken by anything. A write and a delete
    of one key at a time would leave either: the store must not begin one before the other has ended.
    """

    def __init__(self, budget_bytes: int | None, source: ShipSource.ValueType = SHIP_SOURCE_DISK) -> None:
        self.name = "fake"
        self.source = source
        self.ledger: Ledger = StrictLedger(budget_bytes, cost)
        self.meter = TierMeter()
        self.blocks: dict[bytes, StoredBlock] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.broken = self.raises = False
        self.paying = True
        self.reads = self.writes = self.overlaps = 0
        self._writing: set[bytes] = set()
        self._deleting: Counter[bytes] = Counter()
        self.opened = self.closed = self.sweeps = 0

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1

    async def holds(self, key: bytes) -> bool:
        return key in self.blocks

    def pays(self, tokens: int) -> bool:
        del tokens
        return self.paying

    async def read(self, key: bytes) -> StoredBlock | None:
        self.reads += 1
        block = self.blocks.get(key)
        await self._turn()
        if self.broken:
            self.meter.failures += 1
            return None
        if block is None:
            self.meter.misses += 1
            self.ledger.remove(key)
            return None
        self.ledger.used(key)
        return block

    async def head(self, key: bytes) -> BlockHead | None:
        await self._turn()
        if self.broken:
            raise DrystoneError(Reason.BLOCK_UNAVAILABLE, "it is broken")
        block = self.blocks.get(key)
        if block is None:
            return None
        self.ledger.belongs(key, block.tenant)
        return BlockHead(key, block.token_ids, block.tenant, block.birth)

    async def write(self, block: StoredBlock, *, pinned: bool) -> bool:
        self.writes += 1
        self.overlaps += block.key in self._writing or self._deleting[block.key] > 0
        self._writing.add(block.key)
        try:
            await self._turn()
        finally:
            self._writing.discard(block.key)
        if self.broken:
            self.meter.write_failures += 1
            return False
        tokens = len(block.token_ids)
        victims = self.ledger.admit(block.key, tokens=tokens, bytes_=block.bytes, tenant=block.tenant, pinned=pinned)
        if victims is None:
            return False
        for victim in victims:
            self.blocks.pop(victim.key, None)
        self.blocks[block.key] = block
        return True

    async def delete(self, key: bytes) -> int:
        self.overlaps += key in self._writing
        self._deleting[key] += 1
        try:
            await self._turn()
        finally:
            self._deleting[key] -= 1
        if self.broken:
            raise DrystoneError(Reason.BLOCK_UNAVAILABLE, "it is broken")
        self.ledger.remove(key)
        block = self.blocks.pop(key, None)
        return 0 if block is None else block.bytes

    async def sweep(self) -> None:
        self.sweeps += 1
        await self._turn()

    async def _turn(self) -> None:
        await self.gate.wait()
        if self.raises:
            raise OSError("out of nowhere")
