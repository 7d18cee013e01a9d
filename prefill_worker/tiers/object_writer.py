"""Writes blocks to a store of objects."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.block_file import FileIdentity, encode_file
from prefill_worker.tiers.breaker import Breaker
from prefill_worker.tiers.object_files import ObjectError
from prefill_worker.tiers.shelf import Shelf
from shared import logs

_log = logs.get("tiers")


class ObjectWriter:
    """Books a block, makes room, writes it; what fails leaves the books as if it had not begun, but for the victims.

    A block is booked before it is written, so that writes at the same time keep the budget together.

    Args:
        shelf: Where it goes.
        identity: Of the model's files.
        breaker: Of writes.
    """

    def __init__(self, shelf: Shelf, identity: FileIdentity, breaker: Breaker) -> None:
        self._shelf = shelf
        self._identity = identity
        self._breaker = breaker

    async def write(self, block: StoredBlock, *, pinned: bool) -> bool:
        """True when the store has the block now."""
        shelf, key = self._shelf, block.key
        async with shelf.turn(key):
            if key in shelf.ledger:
                return True
            if not self._breaker.allows():
                shelf.meter.writes_dropped += 1
                return False
            try:
                pieces = encode_file(block, self._identity)
            except ValueError as error:
                _log.error("block_not_writable", tier=shelf.tier, key=key.hex(), error=str(error))
                shelf.meter.write_failures += 1
                return False
            size = sum(memoryview(piece).nbytes for piece in pieces)
            tokens = len(block.token_ids)
            victims = shelf.ledger.admit(key, tokens=tokens, bytes_=size, tenant=block.tenant, pinned=pinned)
            if victims is None:
                return False
            shelf.unwritten.add(key)
            written = False
            try:
                shelf.aside.forget(shelf.names.block(key))
                await shelf.evict(victims)
                await self._put(block, pieces)
                written = True
            except ObjectError as error:
                shelf.ledger.remove(key)
                await self._failed(error, size)
            finally:
                shelf.unwritten.discard(key)
                if not written:  # cancelled writes come here too
                    shelf.ledger.remove(key)
                    shelf.unsure[key] = shelf.clock()
            return written and await self._settled(key, size)

    async def _put(self, block: StoredBlock, pieces: Sequence[bytes | memoryview]) -> None:
        shelf, begun = self._shelf, time.perf_counter()
        await shelf.files.put(shelf.names.block(block.key), pieces)
        self._breaker.succeeded()
        shelf.meter.written_bytes += block.bytes
        shelf.meter.on_write(time.perf_counter() - begun)

    async def _settled(self, key: bytes, size: int) -> bool:
        """False for a block that became a victim itself while it was written."""
        self._shelf.buried.pop(key, None)
        if key in self._shelf.ledger:
            return True
        await self._shelf.clear(key, size)
        return False

    async def _failed(self, error: ObjectError, size: int) -> None:
        self._shelf.meter.write_failures += 1
        # A store without room answers well: no reason to leave it alone.
        self._breaker.failed(error, counts=not error.full)
        if error.full:
            await self._shelf.no_room(size)
