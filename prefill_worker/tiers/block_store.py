"""All places where a prefill worker keeps blocks, as one: memory, then each lower tier in order.

    put ──► RAM ──(behind)──► disk, object store          find ◄── RAM ◄── disk ◄── object store
             └─ evicted: offered again to the tiers that lack it        (what was found low is promoted)

A block is never written again, so tiers hold equal copies and need no agreement: the worst that a lost, late or
doubled write can do is one more encoding. The one promise across tiers is that of `delete`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.block_file import BlockHead
from prefill_worker.tiers.deletions import Deletions, Watch
from prefill_worker.tiers.ledger import Entry
from prefill_worker.tiers.ram import RamTier
from prefill_worker.tiers.tier import Tier
from prefill_worker.tiers.write_behind import WriteBehind
from shared import logs
from shared.errors import DrystoneError
from shared.internal.v1.common_pb2 import ShipSource

Found: TypeAlias = tuple[StoredBlock, ShipSource.ValueType]


class BlockStore:
    """Owns every tier, the writes behind requests, the reads under way and the pins. Used by one event loop.

    Args:
        ram: Memory; the store takes its evictions.
        lower: Further tiers, the nearest first.
        write_queue_bytes: Most bytes of blocks that wait to be written, shared out among the lower tiers.
        sweep_seconds: Between two sweeps of a tier.
        writers: Writes at a time to each lower tier.
    """

    def __init__(
        self,
        ram: RamTier,
        lower: Sequence[Tier],
        *,
        write_queue_bytes: int,
        sweep_seconds: float = 60,
        writers: int = 2,
    ) -> None:
        self.ram = ram
        self.lower = tuple(lower)
        self._sweep_seconds = sweep_seconds
        self._pinned: set[bytes] = set()
        # Reads of lower tiers to join; one that is no longer here has been overtaken by a delete, and gives nothing.
        self._reads: dict[bytes, asyncio.Task[Found | None]] = {}
        self._reading: set[asyncio.Task[Found | None]] = set()
        self._deleting = Deletions()
        # Blocks that are read for a lower tier that lacks them lie in nobody's budget: a few at a time.
        self._fills = asyncio.Semaphore(writers)
        share = write_queue_bytes // max(1, len(self.lower))
        self._behind = [
            WriteBehind(tier, self._pinned.__contains__, max_bytes=share, writers=writers) for tier in self.lower
        ]
        self._closed = False
        self._log = logs.get("block_store")
        ram.on_evicted = self._offer

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Every tier, the nearest first."""
        return (self.ram, *self.lower)

    @property
    def pending_bytes(self) -> int:
        """Bytes of blocks that wait to be written or are being written, once for each tier."""
        return sum(behind.pending_bytes for behind in self._behind)

    async def start(self) -> None:
        """Opens every tier; when one cannot be opened, closes those that were and raises."""
        opened: list[Tier] = []
        try:
            for tier in self.tiers:
                await tier.open()
                opened.append(tier)
        except BaseException:
            for tier in opened:
                await tier.close()
            raise
        self._apply_pins()
        for behind in self._behind:
            behind.start()

    async def run(self) -> None:
        """Sweeps each tier every so often, until cancelled; raises when a writer has broken."""
        async with asyncio.TaskGroup() as group:
            for tier in self.tiers:
                group.create_task(self._sweep(tier))
            for behind in self._behind:
                for task in behind.tasks:
                    group.create_task(_watch(task))

    async def close(self, grace_seconds: float) -> None:
        """Pending writes may end within the grace; then everything is let go of."""
        self._closed = True
        await asyncio.gather(*(behind.close(grace_seconds) for behind in self._behind))
        for task in self._reading:
            task.cancel()
        await asyncio.gather(*self._reading, return_exceptions=True)
        for tier in self.tiers:
            await tier.close()

    def in_memory(self, key: bytes) -> StoredBlock | None:
        """A block that needs no reading, counted as used; a miss is not counted."""
        if self.ram.peek(key) is None:
            waiting = self._pending(key)
            if waiting is None or key in self._deleting:
                return None
            if not self.ram.put_now(waiting, pinned=key in self._pinned):
                return waiting
        return self.ram.get_now(key)

    async def find(self, key: bytes, tokens: int | None) -> Found | None:
        """A block and the tier that had it, verified; promoted to the tiers above.

        Lower tiers are read only where that beats encoding, and once however many ask at a time.

        Args:
            key: The block.
            tokens: Its tokens, where the caller knows them.
        """
        block = self.in_memory(key)
        if block is not None:
            return block, self.ram.source
        self.ram.meter.misses += 1
        if key in self._deleting or self._closed:
            return None
        reading = self._reads.get(key)
        if reading is None:
            reading = self._reads[key] = asyncio.create_task(self._read(key, tokens), name="read_block")
            self._reading.add(reading)
            reading.add_done_callback(self._reading.discard)
        # Not awaited itself: an asker that is cancelled must not cancel the others'.
        await asyncio.wait([reading])
        # The read may have ended just before a delete began, and this asker goes on only now.
        return None if reading.cancelled() or key in self._deleting else reading.result()

    def put(self, block: StoredBlock) -> None:
        """Keeps a block: in memory now, in lower tiers behind the caller's back."""
        self.ram.put_now(block, pinned=block.key in self._pinned)
        self._offer(self.ram.peek(block.key) or block)

    async def where(self, key: bytes) -> tuple[ShipSource.ValueType, ...]:
        """Tiers that hold a block now; nothing is read or counted. One that waits to be written is in memory."""
        held = await asyncio.gather(*(tier.holds(key) for tier in self.lower))
        in_ram = self._resident(key) is not None
        return tuple(tier.source for tier, holds in zip(self.tiers, (in_ram, *held), strict=True) if holds)

    def watch(self, key: bytes) -> AbstractContextManager[Watch]:
        """Tells the holder of a block whether a deletion of it has begun meanwhile."""
        return self._deleting.watch(key)

    async def kept(self, key: bytes, block: StoredBlock | None = None) -> tuple[ShipSource.ValueType, ...]:
        """Tiers that hold a block, once every lower tier that can keep it has it. The caller brings the time limit.

        Writers are waited for and nobody else; writers wait for their tiers alone.

        Args:
            key: The block.
            block: The block itself, where the caller has it. Without it one in memory is written, or else one that is
                read, where reading works and beats encoding.
        """
        with self.watch(key) as watch:
            held = self._resident(key) if block is None else block
            if held is not None:
                await self._write_everywhere(held, watch)
            elif await self._is_somewhere_only(key):
                async with self._fills:
                    found = None if watch.deleted else await self.find(key, None)
                    if found is not None:
                        await self._write_everywhere(found[0], watch)
        return await self.where(key)

    async def head(self, key: bytes) -> BlockHead | None:
        """A block's tokens and tenant from the nearest tier that has it; no KV is read, no hit counted.

        Raises:
            DrystoneError: BLOCK_UNAVAILABLE; no tier that could be read has it, and one could not be.
        """
        waiting = self._pending(key)
        if waiting is not None:
            return BlockHead(key, waiting.token_ids, waiting.tenant, waiting.birth)
        unreadable: DrystoneError | None = None
        for tier in self.tiers:
            try:
                if key not in self._deleting and (head := await tier.head(key)) is not None:
                    return head
            except DrystoneError as error:  # the tiers below may have it; else it is raised
                unreadable = error
        if unreadable is not None:
            raise unreadable
        return None

    async def delete(self, key: bytes) -> int:
        """Removes a block, and its pin, from every tier; returns the bytes freed.

        Reads and writes of it that are under way do not bring it back. A `put` meanwhile counts as later.

        Raises:
            DrystoneError: BLOCK_UNAVAILABLE; a tier may still have it. The others have not.
        """
        try:
            with self._deleting.of(key):
                self.pin(key, pinned=False)
                self._reads.pop(key, None)
                freed = self.ram.delete_now(key)
                outcomes = await asyncio.gather(
                    *(self._delete_below(behind, key) for behind in self._behind), return_exceptions=True
                )
        finally:
            later = self.ram.peek(key)
            if later is not None:
                self._offer(later)
        failed = next((one for one in outcomes if isinstance(one, BaseException)), None)
        if failed is not None:
            raise failed
        return freed + sum(one for one in outcomes if isinstance(one, int))

    def pin(self, key: bytes, *, pinned: bool) -> bool:
        """Keeps a block from eviction and expiry in every tier, or lets it go; True when that changed anything.

        A pin holds for a block that comes later too.
        """
        changed = pinned != (key in self._pinned)
        (self._pinned.add if pinned else self._pinned.discard)(key)
        for tier in self.tiers:
            tier.ledger.pin(key, pinned=pinned)
        return changed

    def restore_pins(self, keys: Iterable[bytes]) -> None:
        """Pins of an earlier life. Called before `start`."""
        self._pinned.update(keys)

    def pinned(self, key: bytes) -> bool:
        """Whether a block is pinned, be it here or not."""
        return key in self._pinned

    def keys(self) -> set[bytes]:
        """Every key on any tier's books."""
        return set().union(*(tier.ledger.keys() for tier in self.tiers))

    def entries_of(self, key: bytes) -> list[tuple[ShipSource.ValueType, Entry]]:
        """What each tier's books say of one key."""
        told = ((tier.source, tier.ledger.get(key)) for tier in self.tiers)
        return [(source, entry) for source, entry in told if entry is not None]

    def _pending(self, key: bytes) -> StoredBlock | None:
        return next((one for behind in self._behind if (one := behind.peek(key)) is not None), None)

    def _resident(self, key: bytes) -> StoredBlock | None:
        """A block in memory or on its way down; nothing is counted."""
        return self.ram.peek(key) or self._pending(key)

    async def _is_somewhere_only(self, key: bytes) -> bool:
        """True when some lower tiers have a block and others do not."""
        return len(set(await asyncio.gather(*(tier.holds(key) for tier in self.lower)))) > 1

    async def _write_everywhere(self, block: StoredBlock, watch: Watch) -> None:
        for behind in self._behind:
            # What came during a deletion is offered at the end of that.
            await behind.written(block, lambda: not watch.deleted and block.key not in self._deleting)

    def _offer(self, block: StoredBlock) -> None:
        """To the lower tiers that lack it. What is being deleted is offered at the end of that, if it came again."""
        if block.key not in self._deleting:
            for behind in self._behind:
                behind.offer(block)

    async def _read(self, key: bytes, tokens: int | None) -> Found | None:
        me = asyncio.current_task()
        try:
            for level, tier in enumerate(self.lower):
                block = await self._read_from(tier, key, tokens)
                if self._reads.get(key) is not me:
                    return None
                if block is not None:
                    self.ram.put_now(block, pinned=key in self._pinned)
                    for behind in self._behind[:level]:
                        behind.offer(block)
                    return block, tier.source
            return None
        finally:
            if self._reads.get(key) is me:
                del self._reads[key]

    async def _read_from(self, tier: Tier, key: bytes, tokens: int | None) -> StoredBlock | None:
        entry = tier.ledger.get(key)
        length = entry.tokens if tokens is None and entry is not None else tokens
        if length is not None and not tier.pays(length):
            return None
        try:
            return await tier.read(key)
        except Exception as error:  # noqa: BLE001 - whatever it was, the block can be had elsewhere or encoded again
            tier.meter.failures += 1
            self._log.error("read_failed", tier=tier.name, key=key.hex(), exc_info=error)
            return None

    async def _delete_below(self, behind: WriteBehind, key: bytes) -> int:
        await behind.forget(key)
        return await behind.tier.delete(key)

    async def _sweep(self, tier: Tier) -> None:
        while True:
            await asyncio.sleep(self._sweep_seconds)
            try:
                await tier.sweep()
            except Exception as error:  # noqa: BLE001 - the next sweep may succeed, and requests go on without it
                tier.meter.failures += 1
                self._log.error("sweep_failed", tier=tier.name, exc_info=error)
            self._apply_pins()

    def _apply_pins(self) -> None:
        """To what tiers have found by themselves."""
        for key in self._pinned:
            for tier in self.tiers:
                tier.ledger.pin(key, pinned=True)


async def _watch(task: asyncio.Task[None]) -> None:
    """Ends when a task does, raising what it raised; being cancelled does not cancel it."""
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
