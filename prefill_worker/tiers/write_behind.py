"""Blocks on their way into one tier, behind the requests that made them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.tier import Tier
from shared import logs
from shared.runtime import cancelled


@dataclass(slots=True, eq=False)
class _Write:
    """One block that waits or is being written; `done` when it has been, or never will be."""

    block: StoredBlock
    begun: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)


class WriteBehind:
    """Writes blocks to a tier, a few at a time, first come first served. Used by one event loop.

    A pending block lives by this queue's reference alone once memory has evicted it; `max_bytes` bounds those. Each
    tier has a queue of its own, so that a slow one does not hold up another.

    Args:
        tier: Where they go.
        pinned: Whether a key is pinned.
        max_bytes: Most bytes of pending blocks; a block that is larger waits alone.
        writers: Writes at a time.
    """

    def __init__(self, tier: Tier, pinned: Callable[[bytes], bool], *, max_bytes: int, writers: int) -> None:
        self.tier = tier
        self.pending_bytes = 0
        self._pinned = pinned
        self._max_bytes = max_bytes
        self._pending: dict[bytes, _Write] = {}
        # Keys, not blocks: one that is forgotten is let go of at once, however long its turn is away.
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._writers = writers
        self._room = asyncio.Event()
        self._closed = False
        self.tasks: list[asyncio.Task[None]] = []
        self._log = logs.get("write_behind")

    def start(self) -> None:
        """Begins to write."""
        self.tasks = [asyncio.create_task(self._run(), name=f"write_{self.tier.name}") for _ in range(self._writers)]

    def offer(self, block: StoredBlock) -> None:
        """Queues a block, unless the tier has it by its books or it waits already; dropped and counted when full."""
        if self._knows(block.key):
            return
        if self._closed or self._full_for(block):
            self.tier.meter.writes_dropped += 1
            return
        self._pending[block.key] = _Write(block)
        self.pending_bytes += block.bytes
        self._queue.put_nowait(block.key)

    async def written(self, block: StoredBlock, wanted: Callable[[], bool]) -> None:
        """Returns when a block has been written, or cannot be: it waits for room. The caller brings the time limit.

        Args:
            block: The block.
            wanted: Asked after each wait; a block that nobody wants any more is not queued.
        """
        while not self._closed and wanted() and not self._knows(block.key) and self._full_for(block):
            self._room.clear()
            await self._room.wait()
        if wanted():
            self.offer(block)
        await self.settled(block.key)

    def peek(self, key: bytes) -> StoredBlock | None:
        """A pending block."""
        write = self._pending.get(key)
        return None if write is None else write.block

    async def settled(self, key: bytes) -> None:
        """Returns when the block is not pending any more. The caller brings the time limit."""
        write = self._pending.get(key)
        if write is not None:
            await write.done.wait()

    async def forget(self, key: bytes) -> None:
        """Takes a block out of the queue; when its write has begun, waits for the end of that."""
        write = self._pending.get(key)
        if write is not None and not write.begun:
            self._end(write)
        await self.settled(key)

    async def close(self, grace_seconds: float) -> None:
        """Takes nothing new, writes what is pending within the grace, and drops the rest."""
        self._closed = True
        try:
            async with asyncio.timeout(grace_seconds):
                for write in list(self._pending.values()):
                    await write.done.wait()
        except TimeoutError:
            self._log.warning("writes_dropped", tier=self.tier.name, blocks=len(self._pending))
        self.tier.meter.writes_dropped += len(self._pending)
        for task in self.tasks:
            await cancelled(task)
        for write in list(self._pending.values()):
            self._end(write)

    async def _run(self) -> None:
        while True:
            await self._take(await self._queue.get())

    async def _take(self, key: bytes) -> None:
        """A key may be in the queue twice, once for a write that was forgotten: then the second finds nothing to do."""
        write = self._pending.get(key)
        if write is None or write.begun:
            return
        write.begun = True
        try:
            await self._write(write.block)
        finally:
            self._end(write)

    async def _write(self, block: StoredBlock) -> None:
        """Asks first: another worker may have written it to a shared tier, and asking costs less than sending."""
        tier, key = self.tier, block.key
        try:
            if not await tier.holds(key):
                await tier.write(block, pinned=self._pinned(key))
        except Exception as error:  # noqa: BLE001 - whatever it was, only this block is not kept
            tier.meter.write_failures += 1
            self._log.error("write_failed", tier=tier.name, key=key.hex(), exc_info=error)
        tier.ledger.pin(key, pinned=self._pinned(key))

    def _knows(self, key: bytes) -> bool:
        return key in self._pending or key in self.tier.ledger

    def _full_for(self, block: StoredBlock) -> bool:
        return bool(self._pending) and self.pending_bytes + block.bytes > self._max_bytes

    def _end(self, write: _Write) -> None:
        del self._pending[write.block.key]
        self.pending_bytes -= write.block.bytes
        write.done.set()
        self._room.set()
