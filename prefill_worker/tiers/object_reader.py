"""Reads of one store: a block, or its head alone; every bad file on the way is put aside."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.block_file import (
    BadBlockFileError,
    BlockHead,
    FileIdentity,
    decode_file,
    decode_head,
    head_bytes,
    tokens_of,
)
from prefill_worker.tiers.breaker import Breaker
from prefill_worker.tiers.ledger import UNKNOWN_TENANT, Entry
from prefill_worker.tiers.object_files import ObjectError
from prefill_worker.tiers.pace import Pace
from prefill_worker.tiers.shared_time import SharedTime
from prefill_worker.tiers.shelf import Shelf
from shared import logs
from shared.errors import DrystoneError, Reason

_log = logs.get("tiers")

# So long the books of a shared store are believed without asking it.
_SURE_SECONDS = 60.0
_MOST_SEEN = 65_536


class ObjectReader:
    """Reads for an `ObjectTier`; its twin writes.

    Args:
        shelf: The store and its books.
        identity: The model that blocks are of.
        pace: Told what reads take.
        breaker: Keeps reads away from a store that fails.
        own_folder: Folder in which a read is noted as a file's last use; None for what others use too.
        clock: Seconds, monotonic, for the time of reads.
    """

    def __init__(
        self,
        shelf: Shelf,
        identity: FileIdentity,
        pace: Pace,
        breaker: Breaker,
        own_folder: Path | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._shelf = shelf
        self._identity = identity
        self._pace = pace
        self.breaker = breaker
        self._own_folder = own_folder
        self._clock = clock
        self._under_way = SharedTime(clock)
        # When the store was listed, and when it was asked for a key since.
        self._listed_at = -math.inf
        self._seen: dict[bytes, float] = {}

    async def holds(self, key: bytes) -> bool:
        """By the books; a shared store is asked for what they do not know, or have not seen for a while.

        While it fails or rests, the books are what there is.
        """
        shelf = self._shelf
        entry = shelf.ledger.get(key)
        booked = entry is not None and key not in shelf.unwritten
        if not shelf.shared or key in shelf.unwritten or key in shelf.buried or self._is_sure(key, entry):
            return booked
        if not self.breaker.allows():
            return booked
        try:
            size = await shelf.files.size(shelf.names.block(key))
        except ObjectError as error:
            self.failed(error)
            return booked
        self.breaker.succeeded()
        tokens = None if size is None else tokens_of(size, self._identity)
        if size is None or tokens is None:
            self._is_gone(key, entry)
            return key in shelf.ledger and key not in shelf.unwritten
        if entry is None:
            await shelf.enter(key, tokens, size, UNKNOWN_TENANT)
        self._saw(key)
        return True

    def listed(self) -> None:
        """The books are as the store is."""
        self._listed_at = self._clock()
        self._seen.clear()

    async def read(self, key: bytes) -> StoredBlock | None:
        """A block, verified on a thread, over the bytes as they were read; None when it is not there, or was bad."""
        shelf, meter = self._shelf, self._shelf.meter
        entry = shelf.ledger.get(key)
        absent = key in shelf.buried if shelf.shared else entry is None or key in shelf.unwritten
        meter.misses += absent
        if absent or not self.breaker.allows():
            return None
        begun, share = self._clock(), self._under_way.begin()
        data, block, bad = None, None, None
        try:
            data = await shelf.files.get(shelf.names.block(key))
            if data is not None:
                block = await asyncio.to_thread(self._decode, data, key)
        except ObjectError as error:
            self.failed(error)
            return None
        except BadBlockFileError as error:
            bad = error
        finally:
            share = self._under_way.end(share)
        self.breaker.succeeded()
        if data is None:
            meter.misses += 1
            self._is_gone(key, entry)
        elif bad is not None:
            shelf.strike_off(key, entry)
            await shelf.put_aside(key, data.nbytes, bad.reason)
        if data is None or block is None:
            return None
        meter.hits += 1
        meter.read_bytes += block.bytes
        meter.on_read(self._clock() - begun)
        self._pace.measured(block.bytes, share)
        shelf.ledger.used(key)
        known = shelf.ledger.get(key)
        # What a listing could not say, or what others have written since.
        if (known is None and shelf.shared) or (known is not None and known.tenant != block.tenant):
            await shelf.enter(key, len(block.token_ids), data.nbytes, block.tenant)
        return block

    async def head(self, key: bytes) -> BlockHead | None:
        """A block's tokens and tenant, verified; None when it is not there, or was bad.

        Raises:
            DrystoneError: BLOCK_UNAVAILABLE: it may be there, and the store does not say.
        """
        shelf = self._shelf
        entry = shelf.ledger.get(key)
        if (entry is None and not shelf.shared) or key in shelf.buried or key in shelf.unwritten:
            return None
        if not self.breaker.allows():
            raise _unavailable(f"{shelf.tier} has failed too often and is left alone for a while")
        try:
            # Asked anew: a file that was cut off has another size than the books say, and no such range to read.
            size = await shelf.files.size(shelf.names.block(key))
            tokens = None if size is None else tokens_of(size, self._identity)
            data = None
            if tokens is not None:
                data = await shelf.files.beginning(shelf.names.block(key), head_bytes(tokens, self._identity))
        except ObjectError as error:
            self.failed(error)
            raise _unavailable(f"{shelf.tier}: block {key.hex()} could not be looked at: {error}") from error
        self.breaker.succeeded()
        if size is None or (tokens is not None and data is None):
            self._is_gone(key, entry)
            return None
        if tokens is None or data is None:
            shelf.strike_off(key, entry)
            await shelf.put_aside(key, size, "its size is of no block: cut off")
            return None
        try:
            head = decode_head(data, size, key, self._identity)
        except BadBlockFileError as error:
            shelf.strike_off(key, entry)
            await shelf.put_aside(key, size, error.reason)
            return None
        if entry is None:
            await shelf.enter(key, tokens, size, head.tenant)
        shelf.ledger.belongs(key, head.tenant)
        return head

    def failed(self, error: ObjectError) -> None:
        """A read has failed; after some of them the store is left alone for a while."""
        self._shelf.meter.failures += 1
        self.breaker.failed(error)

    def _is_sure(self, key: bytes, entry: Entry | None) -> bool:
        """Whether the books' word was the store's within the last minute: others may evict from a shared one."""
        seen = max(self._listed_at, self._seen.get(key, self._listed_at))
        return entry is not None and self._clock() - seen < _SURE_SECONDS

    def _saw(self, key: bytes) -> None:
        if len(self._seen) >= _MOST_SEEN:
            self._seen.clear()
        self._seen[key] = self._clock()

    def _is_gone(self, key: bytes, entry: Entry | None) -> None:
        if key not in self._shelf.unwritten:
            self._shelf.strike_off(key, entry)

    def _decode(self, data: memoryview, key: bytes) -> StoredBlock:
        block = decode_file(data, key, self._identity)
        if self._own_folder is not None:
            try:
                os.utime(self._own_folder / self._shelf.names.block(key))
            except (
                OSError
            ) as error:  # removed meanwhile, or a disk that takes no writes: the block is good all the same
                _log.debug("last_use_not_noted", key=key.hex(), error=str(error))
        return block


def _unavailable(message: str) -> DrystoneError:
    return DrystoneError(Reason.BLOCK_UNAVAILABLE, message, retry_after_ms=1000)
